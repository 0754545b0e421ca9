"""Pieces: whatever the plan, each visible pair lies in exactly one piece, and packed rows need few."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import random_plan

from ropewalk.kernels.attention import AttentionPlan, anchor, causal, document


def covered(plan):
    """How many pieces hold each pair, int [batch, 1, q_tokens, k_tokens], painted pair by pair."""
    counts = torch.zeros(plan.batch, 1, plan.q_tokens, plan.k_tokens, dtype=torch.int64)
    for piece in plan.pieces:
        if piece.causal:
            assert piece.q_stop - piece.q_start == piece.k_stop - piece.k_start
        for i in range(piece.q_start, piece.q_stop):
            k_stop = piece.k_start + i - piece.q_start + 1 if piece.causal else piece.k_stop
            counts[piece.row_start : piece.row_stop, 0, i, piece.k_start : k_stop] += 1
    return counts


def check(plan):
    assert torch.equal(covered(plan), plan.visible().long())
    for piece in plan.pieces:
        assert piece.row_start < piece.row_stop
        assert piece.q_start < piece.q_stop
        assert piece.k_start < piece.k_stop


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_unrelated_intervals_are_covered_exactly_once(batch, q_tokens, k_tokens, seed):
    check(random_plan(batch, q_tokens, k_tokens, seed))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2)), min_size=1))
@settings(max_examples=150, deadline=None)
def test_runs_of_flat_growing_and_sliding_intervals_are_covered_exactly_once(runs):
    k_tokens = 40
    edges = []
    for length, start, width, kind in runs[:6]:
        for step in range(length):
            first = start + (step if kind == 2 else 0)
            edges.append((first, first + width + (step if kind == 1 else 0) - 1 + (step if kind == 2 else 0)))
    lo, hi = torch.tensor(edges, dtype=torch.int32).T[:, None, None]
    glo = torch.full_like(lo, 2)
    check(AttentionPlan(lo.contiguous(), hi.contiguous(), glo, glo + 3, k_tokens))


def test_strictly_causal_queries_leave_the_first_one_empty():
    hi = torch.arange(-1, 4, dtype=torch.int32)[None, None]
    zeros = torch.zeros_like(hi)
    check(AttentionPlan(zeros, hi, zeros, zeros, 5))


def test_packed_rows_are_cut_into_one_triangle_a_document():
    plan = document([[0, 5, 9], [0, 5, 9]], 16)
    assert len(plan.pieces) == 3
    assert all(piece.causal and piece.row_stop == 2 for piece in plan.pieces)
    check(plan)


def test_an_anchor_costs_one_piece_more():
    plan = anchor([[0, 1, 5, 9]], 16)
    assert len(plan.pieces) == 5
    check(plan)


def test_queries_after_a_cache_are_a_triangle_and_a_rectangle():
    assert [piece.causal for piece in causal(2, 3, 9).pieces] == [True, False]
    assert [piece.causal for piece in causal(2, 1, 9).pieces] == [False]
    check(causal(2, 3, 9))


def test_rows_with_different_policies_have_their_own_pieces():
    plan = AttentionPlan.stack([causal(2, 8), document([[0, 3]], 8), causal(1, 8)])
    assert [(piece.row_start, piece.row_stop) for piece in plan.pieces] == [(0, 2), (2, 3), (2, 3), (3, 4)]
    check(plan)
