"""Vertical-slash lists against full attention and sets of token pairs."""

import pytest
import torch
from estimator_inputs import EDGE, LAYOUTS, any_in_block, documents, inputs, key_head, probabilities, with_own

from ropewalk.kernels.attention.estimators import vertical_slash


def top(sums, count, num_forced):
    ranked = sorted(range(len(sums)), key=lambda place: (place >= num_forced, -sums[place], place))
    return set(ranked[: max(count, num_forced)])


def by_definition(q, k, starts, num_verticals, num_slashes, num_first, num_local):
    num_heads, row_tokens = q.shape[1], q.shape[2]
    pairs = torch.zeros(len(q), num_heads, row_tokens, row_tokens, dtype=torch.bool)
    for row, start, stop in documents(starts, row_tokens):
        for head in range(num_heads):
            seen = probabilities(q[row, head, start:stop], key_head(k, row, head, num_heads)[start:stop])
            length = stop - start
            columns, distances, seen = [0.0] * length, [0.0] * length, seen.tolist()
            for i in range(max(0, length - 64), length):
                for j in range(i + 1):
                    columns[j] += seen[i][j]
                    distances[i - j] += seen[i][j]
            kept_columns = top(columns, num_verticals, num_first)
            kept_distances = top(distances, num_slashes, num_local)
            for i in range(length):
                kept = [j in kept_columns or i - j in kept_distances for j in range(i + 1)]
                pairs[row, head, start + i, start : start + i + 1] = torch.tensor(kept)
    return with_own(any_in_block(pairs))


@pytest.mark.parametrize("counts", [(3, 2, 0, 0), (6, 1, 2, 3), (0, 7, 0, 1)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lists_are_the_blocks_of_the_top_keys_and_distances(layout, counts):
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens)
    names = ("num_verticals", "num_slashes", "num_first", "num_local")
    found = vertical_slash(q, k, starts, **dict(zip(names, counts, strict=True)), block_tokens=EDGE)
    assert torch.equal(found.to_map(-(-row_tokens // EDGE)), by_definition(q, k, starts, *counts))


@pytest.mark.parametrize("seed", range(6))
def test_distances_that_end_before_a_document_begins_list_nothing(seed):
    starts = [[0, 24], [0, 30]]
    q, k = inputs(starts, 140, seed, num_heads=4, num_kv_heads=1)
    names = {"num_verticals": 0, "num_slashes": 4, "num_first": 0, "num_local": 0}
    found = vertical_slash(q, k, starts, **names, block_tokens=EDGE)
    assert torch.equal(found.to_map(9), by_definition(q, k, starts, *names.values()))


def test_a_planted_column_and_a_planted_distance_are_found():
    starts, row_tokens = [[0]], 320
    q, k = torch.zeros(1, 1, row_tokens, 4), torch.zeros(1, 1, row_tokens, 4)
    q[..., 0], k[:, :, 77, 0] = 20.0, 20.0
    found = vertical_slash(q, k, starts, num_verticals=1, num_slashes=1, num_first=0, num_local=1, block_tokens=EDGE)
    block_map = found.to_map(20)[0, 0]
    assert bool(block_map[4:, 4].all())
    # Distance 0 alone is the diagonal: nothing else is listed.
    assert int(block_map.sum()) == 20 + 15


def test_counts_below_zero_are_refused():
    q, k = inputs([[0]], 20)
    with pytest.raises(ValueError, match="num_slashes must be at least 0, got -1"):
        vertical_slash(q, k, [[0]], num_slashes=-1)
