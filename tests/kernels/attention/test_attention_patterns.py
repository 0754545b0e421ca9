"""Patterns against their definitions, written out as Python predicates over documents."""

from bisect import bisect_right

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.kernels.attention import (
    BlockLists,
    anchor,
    block_lists,
    causal,
    document,
    lambda_branches,
    shared_prefix,
    shifted_groups,
    sink_shifted_groups,
    sliding_window,
)


@st.composite
def packed_rows(draw, *, has_anchor):
    """(starts per row, row_tokens); documents of one token and rows of one token included."""
    row_tokens = draw(st.integers(1, 14))
    fixed = {0, 1} if has_anchor and row_tokens > 1 else {0}
    rows = st.sets(st.integers(0, row_tokens - 1)).map(lambda starts: sorted(starts | fixed))
    return draw(st.lists(rows, min_size=1, max_size=3)), row_tokens


def assert_mask(plan, predicate, q_tokens, k_tokens, head=0):
    mask = plan.visible()
    assert mask.shape == (plan.batch, plan.plan_heads, q_tokens, k_tokens)
    for row in range(plan.batch):
        for i in range(q_tokens):
            for j in range(k_tokens):
                assert bool(mask[row, head, i, j]) == predicate(row, i, j), (row, i, j)


def own_past(starts, i, j):
    return j <= i and document_of(starts, i) == document_of(starts, j)


def place(starts, position):
    """Position inside the document."""
    return position - starts[document_of(starts, position)]


def document_of(starts, position):
    return bisect_right(starts, position) - 1


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_causal_queries_are_the_last_of_the_keys(batch, q_tokens, num_past):
    plan = causal(batch, q_tokens, q_tokens + num_past)
    assert_mask(plan, lambda row, i, j: j <= i + num_past, q_tokens, q_tokens + num_past)


@given(packed_rows(has_anchor=False))
@settings(max_examples=60, deadline=None)
def test_document_sees_its_own_past_only(packed):
    rows, row_tokens = packed

    def predicate(row, i, j):
        return j <= i and document_of(rows[row], i) == document_of(rows[row], j)

    assert_mask(document(rows, row_tokens), predicate, row_tokens, row_tokens)


@given(packed_rows(has_anchor=True))
@settings(max_examples=60, deadline=None)
def test_anchor_adds_document_zero_for_everyone(packed):
    rows, row_tokens = packed

    def predicate(row, i, j):
        own, other = document_of(rows[row], i), document_of(rows[row], j)
        return j <= i and (own == other or other == 0)

    assert_mask(anchor(rows, row_tokens), predicate, row_tokens, row_tokens)


@given(packed_rows(has_anchor=False), st.integers(1, 6), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_a_window_moves_inside_the_document_and_its_first_tokens_stay_visible(packed, window, sinks):
    rows, row_tokens = packed

    def predicate(row, i, j):
        starts = rows[row]
        return own_past(starts, i, j) and (i - j < window or place(starts, j) < sinks)

    plan = sliding_window(rows, row_tokens, window_tokens=window, num_sinks=sinks)
    assert_mask(plan, predicate, row_tokens, row_tokens)


@given(packed_rows(has_anchor=False), st.integers(1, 6), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_the_lambdas_branches_are_near_and_far_and_share_no_key(packed, window, sinks):
    rows, row_tokens = packed
    near, far = lambda_branches(rows, row_tokens, window_tokens=window, num_sinks=sinks)
    assert_mask(near, lambda r, i, j: own_past(rows[r], i, j) and i - j < window, row_tokens, row_tokens)

    def is_far(row, i, j):
        return own_past(rows[row], i, j) and i - j >= window and place(rows[row], j) < sinks

    assert_mask(far, is_far, row_tokens, row_tokens)
    assert not bool((near.visible() & far.visible()).any())


@given(packed_rows(has_anchor=False), st.integers(1, 4).map(lambda half: 2 * half), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_shifted_groups_see_their_group_and_never_the_end_of_the_row(packed, group, sinks):
    rows, row_tokens = packed
    borders = {0: range(0, row_tokens + group, group), 1: [0, *range(group // 2, row_tokens + group, group)]}

    def predicate(shifted, sinks):
        def sees(row, i, j):
            same = bisect_right(list(borders[shifted]), i) == bisect_right(list(borders[shifted]), j)
            return own_past(rows[row], i, j) and (same or place(rows[row], j) < sinks)

        return sees

    plain = shifted_groups(rows, row_tokens, group_tokens=group)
    for head in (0, 1):
        assert_mask(plain, predicate(head, 0), row_tokens, row_tokens, head)
    sunk = sink_shifted_groups(rows, row_tokens, group_tokens=group, num_sinks=sinks, plan_heads=3, num_shifted=1)
    for head in range(3):
        assert_mask(sunk, predicate(int(head == 2), sinks), row_tokens, row_tokens, head)


@st.composite
def prompts_with_answers(draw):
    """(groups of starts, row_tokens): one row, groups of a prompt and up to three answers."""
    lengths = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=3))
    groups, at = [], 0
    for group in lengths:
        groups.append([])
        for length in group:
            groups[-1].append(at)
            at += length
    return groups, at


@given(prompts_with_answers())
@settings(max_examples=60, deadline=None)
def test_answers_see_their_prompt_and_themselves_but_no_other_answer(drawn):
    groups, row_tokens = drawn
    owners = []
    for number, group in enumerate(groups):
        ends = [*group[1:], groups[number + 1][0] if number + 1 < len(groups) else row_tokens]
        for part, (start, end) in enumerate(zip(group, ends, strict=True)):
            owners += [(number, part)] * (end - start)

    def predicate(row, i, j):
        (group, part), (other_group, other_part) = owners[i], owners[j]
        return j <= i and group == other_group and other_part in (0, part)

    assert_mask(shared_prefix([groups], row_tokens), predicate, row_tokens, row_tokens)


@given(st.integers(1, 70), st.integers(0, 1000), st.sets(st.integers(1, 60), max_size=2))
@settings(max_examples=40, deadline=None)
def test_block_lists_hide_what_is_in_no_listed_block(row_tokens, seed, more_starts):
    starts = [0, *sorted(start for start in more_starts if start < row_tokens)]
    blocks = -(-row_tokens // 16)
    listed = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < 0.5
    plan = block_lists(BlockLists.from_map(listed, 16), [starts], row_tokens)
    for head in (0, 1):
        assert_mask(
            plan,
            lambda r, i, j, head=head: own_past(starts, i, j) and bool(listed[0, head, i // 16, j // 16]),
            row_tokens,
            row_tokens,
            head,
        )


def test_block_lists_that_do_not_fit_are_refused():
    listed = BlockLists.from_map(torch.ones(1, 1, 4, 4, dtype=torch.bool), 16)
    with pytest.raises(ValueError, match="block offsets must be"):
        block_lists(listed, [[0]], 100)
    with pytest.raises(ValueError, match=r"listed key blocks must lie inside 20 keys"):
        block_lists(BlockLists.from_map(torch.ones(1, 1, 2, 4, dtype=torch.bool), 16), [[0]], 20)
    with pytest.raises(ValueError, match="must ascend, each once"):
        BlockLists(torch.tensor([[[0, 2]]]), torch.tensor([1, 0], dtype=torch.int32), 16)
    with pytest.raises(ValueError, match="block_tokens must be a power of two, 16 or more, got 24"):
        BlockLists.from_map(torch.ones(1, 1, 1, 1, dtype=torch.bool), 24)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sliding_window([[0]], 8, window_tokens=0), "window_tokens must be at least 1, got 0"),
        (lambda: sliding_window([[0]], 8, window_tokens=2, num_sinks=-1), "num_sinks must be at least 0"),
        (lambda: shifted_groups([[0]], 8, group_tokens=3), "group_tokens must be even and at least 2, got 3"),
        (
            lambda: sink_shifted_groups([[0]], 8, group_tokens=4, num_sinks=0, plan_heads=2, num_shifted=3),
            "num_shifted must be at most plan_heads 2, got 3",
        ),
        (lambda: shared_prefix([[[0, 3, 3]]], 8), "row 0: document starts must increase"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_anchor_mask_of_two_documents_as_drawn_by_hand():
    drawn = ["x....", "xx...", "xxx..", "x..x.", "x..xx"]
    mask = anchor([[0, 1, 3]], 5).visible()[0, 0]
    assert ["".join("x" if seen else "." for seen in query) for query in mask.tolist()] == drawn


@pytest.mark.parametrize("starts", [[], [1], [0, 3, 3], [0, 4, 2], [0, 8], [0, -1]])
@pytest.mark.parametrize("pattern", [document, anchor])
def test_starts_that_are_not_a_packing_are_refused_by_row(pattern, starts):
    with pytest.raises(ValueError, match="row 1: "):
        pattern([[0, 1], starts], 8)


def test_an_anchor_of_two_tokens_is_refused():
    with pytest.raises(ValueError, match=r"row 0: the anchor is position 0 alone.*got \[0, 2\]"):
        anchor([[0, 2]], 8)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (1, 0, 4), (1, 5, 4)])
def test_causal_refuses_fewer_keys_than_queries_and_empty_batches(sizes):
    with pytest.raises(ValueError, match="causal needs"):
        causal(*sizes)


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="one list of starts for each row, got none"):
        document([], 8)
