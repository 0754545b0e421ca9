"""XAttention's lists against antidiagonals summed one by one."""

from importlib import import_module

import pytest
import torch
from estimator_inputs import EDGE, LAYOUTS, documents, inputs, key_head

from ropewalk.kernels.attention.estimators import xattention as estimate

MODULE = import_module("ropewalk.kernels.attention.estimators.xattention")


def masses_by_definition(q, keys, start, stop, stride):
    """{(block of queries, block of keys): mass} of one document of a row, q and keys [L, D]."""
    masses = {}
    for r in range(start // stride, (stop - 1) // stride + 1):
        columns = range(start // stride, r + 1)
        coarse = []
        for c in columns:
            total = 0.0
            for t in range(stride):
                i, j = r * stride + stride - 1 - t, c * stride + t
                if start <= i < stop and start <= j < stop:
                    total += float(q[i] @ keys[j])
            coarse.append(total / stride / q.shape[-1] ** 0.5)
        weights = torch.softmax(torch.tensor(coarse, dtype=torch.float64), dim=0)
        for c, weight in zip(columns, weights.tolist(), strict=True):
            pair = (r * stride // EDGE, c * stride // EDGE)
            masses[pair] = masses.get(pair, 0.0) + weight
    return masses


def by_definition(q, k, starts, stride, threshold):
    num_heads, row_tokens = q.shape[1], q.shape[2]
    num_blocks = -(-row_tokens // EDGE)
    kept = torch.zeros(len(q), num_heads, num_blocks, num_blocks, dtype=torch.bool)
    for row, start, stop in documents(starts, row_tokens):
        for head in range(num_heads):
            masses = masses_by_definition(q[row, head], key_head(k, row, head, num_heads), start, stop, stride)
            first = start // EDGE
            for n in range(first, (stop - 1) // EDGE + 1):
                total = sum(masses[n, c] for c in range(first, n + 1))
                chosen = {n, first}
                for c in sorted(range(first, n + 1), key=lambda c: -masses[n, c]):
                    if sum(masses[n, c] for c in chosen) >= threshold * total:
                        break
                    chosen.add(c)
                kept[row, head, n, list(chosen)] = True
    return kept


@pytest.mark.parametrize(("stride", "threshold"), [(4, 0.6), (8, 0.9), (16, 0.8), (1, 0.5)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lists_are_the_smallest_sets_of_the_antidiagonals(layout, stride, threshold, monkeypatch):
    # A few blocks of queries at a time, so that their borders are met.
    monkeypatch.setattr(MODULE, "MOST_SCORES", 4 * 16 * 40)
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens, magnitude=2.0, num_heads=2, num_kv_heads=1)
    found = estimate(q, k, starts, stride=stride, threshold=threshold, block_tokens=EDGE)
    assert torch.equal(found.to_map(-(-row_tokens // EDGE)), by_definition(q, k, starts, stride, threshold))


def test_blocks_without_mass_are_left_out_and_the_planted_one_is_kept():
    q, k = torch.zeros(1, 1, 160, 4), torch.zeros(1, 1, 160, 4)
    q[..., 0], k[:, :, 64:80, 0] = 20.0, 20.0
    found = estimate(q, k, [[0]], threshold=0.9, block_tokens=EDGE).to_map(10)[0, 0]
    expected = torch.eye(10, dtype=torch.bool)
    expected[:, 0] = True
    expected[4:, 4] = True
    assert torch.equal(found[4:], expected[4:])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stride": 3}, "stride must divide block_tokens 128, got 3"), ({"threshold": 1.1}, "threshold must lie in")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    q, k = inputs([[0]], 20)
    with pytest.raises(ValueError, match=message):
        estimate(q, k, [[0]], **options)
