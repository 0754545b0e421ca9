"""Patterns against their definitions, written out as Python predicates over documents."""

from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.kernels.attention import anchor, causal, document


@st.composite
def packed_rows(draw, *, has_anchor):
    """(starts per row, row_tokens); documents of one token and rows of one token included."""
    row_tokens = draw(st.integers(1, 14))
    fixed = {0, 1} if has_anchor and row_tokens > 1 else {0}
    rows = st.sets(st.integers(0, row_tokens - 1)).map(lambda starts: sorted(starts | fixed))
    return draw(st.lists(rows, min_size=1, max_size=3)), row_tokens


def assert_mask(plan, predicate, q_tokens, k_tokens):
    mask = plan.visible()
    assert mask.shape == (plan.batch, 1, q_tokens, k_tokens)
    for row in range(plan.batch):
        for i in range(q_tokens):
            for j in range(k_tokens):
                assert bool(mask[row, 0, i, j]) == predicate(row, i, j), (row, i, j)


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
