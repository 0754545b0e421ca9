"""Tiles: what is visited covers exactly what is visible, full tiles are full, and both directions agree."""

import pytest
import torch
from attention_plans import PLANS, random_blocks, with_sinks
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import random_plan

from ropewalk.kernels.attention import anchor, block_lists, causal, sliding_window

TILES = [(16, 16), (32, 16), (16, 32)]


def check(plan, query_tile, key_tile):
    tiles = plan.tiles(query_tile, key_tile)
    visible = plan.visible()
    rows, columns = tiles.num_query_tiles * query_tile, tiles.num_key_tiles * key_tile
    # Beyond the last query everything counts as seen, beyond the last key nothing.
    padded = torch.nn.functional.pad(visible, (0, columns - plan.k_tokens))
    padded = torch.nn.functional.pad(padded, (0, 0, 0, rows - plan.q_tokens), value=True)
    grid = padded.unflatten(3, (-1, key_tile)).unflatten(2, (-1, query_tile))  # [B, P, Q, m, K, n]
    is_full = grid.all(dim=5).all(dim=3)
    real = torch.nn.functional.pad(visible, (0, columns - plan.k_tokens, 0, rows - plan.q_tokens))
    is_seen = real.unflatten(3, (-1, key_tile)).unflatten(2, (-1, query_tile)).any(dim=5).any(dim=3)
    visited = tiles.visited()
    assert not bool((is_seen & (visited == 0)).any()), "a visible pair is not visited"
    assert not bool(((visited == 2) & ~is_full).any()), "a tile called full is not"
    check_transposed(tiles, visited)
    check_items(tiles)
    return visited, is_full, is_seen


def check_transposed(tiles, visited):
    if tiles.key_lists is not None:
        assert torch.equal(tiles.key_lists.to_map(tiles.num_query_tiles).mT, visited)
        assert not tiles.has_gaps
        return
    query = torch.arange(tiles.num_query_tiles)
    begin, full_begin, full_end, end = (tiles.key_runs[..., n].unsqueeze(2) for n in range(4))
    covers = (begin <= query[:, None]) & (query[:, None] < end)
    full = (full_begin <= query[:, None]) & (query[:, None] < full_end)
    assert not bool(((visited > 0) & ~covers).any())
    assert tiles.has_gaps == bool((covers & (visited == 0)).any())
    assert bool((visited[full] == 2).all())


def check_items(tiles):
    num_tiles = tiles.key_runs.shape[0] * tiles.num_key_tiles
    chunks = {}
    for tile, chunk, num_chunks, slot in tiles.key_items.tolist():
        chunks.setdefault(tile, []).append((chunk, num_chunks, slot))
    assert sorted(chunks) == list(range(num_tiles))
    slots = []
    for found in chunks.values():
        assert sorted(chunk for chunk, _, _ in found) == list(range(found[0][1]))
        if len(found) == 1:
            assert found[0][2] == -1
        slots += [slot for _, _, slot in found if slot >= 0]
    assert sorted(slots) == list(range(tiles.num_slots))
    assert sorted(tiles.query_order.tolist()) == list(range(tiles.query_runs.shape[0] * tiles.num_query_tiles))


@pytest.mark.parametrize("sizes", TILES)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_every_visible_pair_is_visited_and_full_tiles_are_full(plan, sizes):
    check(plan, *sizes)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 70), st.integers(0, 10_000)),
    heads=st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_unrelated_intervals_are_visited(sizes, heads):
    check(random_plan(*sizes, plan_heads=heads), 16, 16)


@given(seed=st.integers(0, 10_000), row_tokens=st.integers(1, 130), density=st.floats(0, 1), sinks=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_lists_visit_no_block_that_is_not_listed_or_shared(seed, row_tokens, density, sinks):
    blocks = random_blocks(1, 2, row_tokens, seed, density)
    plan = with_sinks(block_lists(blocks, [[0]], row_tokens), min(sinks, row_tokens))
    visited, _, is_seen = check(plan, 16, 16)
    # With the row's start as the only document and whole blocks, every visited tile is seen but for the diagonal's.
    above = torch.ones(is_seen.shape[2:], dtype=torch.bool).triu(1)
    assert not bool(((visited > 0) & ~is_seen & ~above).any())
    assert torch.equal(plan.num_visible(), plan.visible().sum(dim=(2, 3)))


def test_structured_patterns_find_all_their_full_tiles():
    for name in ("causal", "documents", "window", "shifted groups"):
        visited, is_full, is_seen = check(PLANS[name], 16, 16)
        assert torch.equal(visited == 2, is_full & is_seen), name


def test_patterns_have_no_gaps():
    assert {name for name, plan in PLANS.items() if plan.tiles(16, 16).has_gaps} == {"runs with gaps"}


def test_the_border_of_two_documents_does_not_visit_what_lies_between_their_sinks():
    plan = sliding_window([[0, 520]], 1024, window_tokens=32, num_sinks=4)
    visited, _, is_seen = check(plan, 16, 16)
    assert torch.equal(visited > 0, is_seen)


def test_an_anchor_is_split_over_several_programs():
    tiles = anchor([[0, *range(1, 2048, 64)]], 2048).tiles(16, 16)
    (split,) = tiles.split_tiles.tolist()
    assert split[0] == 0 and split[2] > 4
    longest = tiles.key_items[:, 2].max()
    assert longest == split[2] == tiles.num_slots


def test_the_longest_work_is_launched_first():
    tiles = causal(1, 1024).tiles(16, 16)
    assert tiles.query_order.tolist() == list(range(63, -1, -1))


def test_a_plan_for_a_million_tokens_takes_a_few_megabytes():
    starts = [[0, *range(1, 2**20, 5000)]]
    tiles = anchor(starts, 2**20).tiles(128, 128)
    tensors = [tiles.query_runs, tiles.key_runs, tiles.query_order, tiles.key_items, tiles.split_tiles]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) < 2**20


def test_tile_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="query_tile must be a power of two, 16 or more, got 24"):
        causal(1, 64).tiles(24, 16)
    with pytest.raises(ValueError, match="key_tile 64 is larger than the plan's blocks of 32"):
        PLANS["block lists"].tiles(32, 64)


def test_tiles_are_worked_out_once():
    plan = causal(1, 64)
    assert plan.tiles(16, 16) is plan.tiles(16, 16)
    assert plan.to("cpu").tiles(16, 16) is not plan.tiles(16, 16)
