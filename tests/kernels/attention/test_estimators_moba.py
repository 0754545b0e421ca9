"""MoBA's lists against gates worked out query by query."""

import pytest
import torch
from estimator_inputs import EDGE, LAYOUTS, documents, inputs, key_head, with_own

from ropewalk.kernels.attention.estimators import moba


def by_definition(q, k, starts, chunk_tokens, top_k):
    num_heads, row_tokens = q.shape[1], q.shape[2]
    num_blocks, per_chunk = -(-row_tokens // EDGE), chunk_tokens // EDGE
    block_map = torch.zeros(len(q), num_heads, num_blocks, num_blocks, dtype=torch.bool)
    for row, start, stop in documents(starts, row_tokens):
        for head in range(num_heads):
            keys = key_head(k, row, head, num_heads)
            for n in range(start // EDGE, (stop - 1) // EDGE + 1):
                queries = [i for i in range(n * EDGE, (n + 1) * EDGE) if start <= i < stop]
                gates = {}
                for c in range(start // chunk_tokens, n // per_chunk):
                    members = [j for j in range(c * chunk_tokens, (c + 1) * chunk_tokens) if start <= j < stop]
                    mean_key = sum(keys[j] for j in members) / len(members)
                    gates[c] = sum(float(q[row, head, i] @ mean_key) for i in queries) / len(queries)
                chosen = [n // per_chunk, *sorted(gates, key=lambda c: -gates[c])[: top_k - 1]]
                for block in range(start // EDGE, n + 1):
                    block_map[row, head, n, block] |= block // per_chunk in chosen
    return with_own(block_map)


@pytest.mark.parametrize(("chunk_tokens", "top_k"), [(16, 3), (32, 2), (64, 1), (48, 2)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lists_are_the_own_chunk_and_the_best_past_ones(layout, chunk_tokens, top_k):
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens)
    found = moba(q, k, starts, chunk_tokens=chunk_tokens, top_k=top_k, block_tokens=EDGE)
    expected = by_definition(q, k, starts, chunk_tokens, top_k)
    assert torch.equal(found.to_map(-(-row_tokens // EDGE)), expected)


def test_where_all_queries_of_a_block_agree_the_choice_is_each_querys_own():
    q, k = inputs([[0]], 128)
    q = q[:, :, ::EDGE].repeat_interleave(EDGE, dim=2)
    found = moba(q, k, [[0]], chunk_tokens=EDGE, top_k=2, block_tokens=EDGE).to_map(8)
    means = k.unflatten(2, (8, EDGE)).mean(dim=3).repeat_interleave(2, dim=1)
    gates = q @ means.transpose(-1, -2)
    for i in range(EDGE, 128):
        best = gates[0, :, i, : i // EDGE].argmax(dim=-1)
        assert bool(found[0, torch.arange(4), i // EDGE, best].all()), i


@pytest.mark.parametrize(
    ("options", "message"),
    [({"top_k": 0}, "top_k must be at least 1"), ({"chunk_tokens": 100}, "must be a multiple of block_tokens 128")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    q, k = inputs([[0]], 20)
    with pytest.raises(ValueError, match=message):
        moba(q, k, [[0]], **options)
