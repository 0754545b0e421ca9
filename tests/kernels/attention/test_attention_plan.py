"""The plan: what its intervals mean, what it refuses, stacking and counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import random_plan

from ropewalk.kernels.attention import AttentionPlan, causal, document

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))


def visible_by_definition(plan: AttentionPlan, row: int, i: int, j: int) -> bool:
    lo, hi, glo, ghi = (int(getattr(plan, name)[row, 0, i]) for name in ("lo", "hi", "glo", "ghi"))
    return lo <= j <= hi or glo <= j < ghi


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_visible_is_the_union_of_both_intervals(sizes):
    plan = random_plan(*sizes)
    mask = plan.visible()
    assert mask.shape == (plan.batch, 1, plan.q_tokens, plan.k_tokens)
    for row in range(plan.batch):
        for i in range(plan.q_tokens):
            for j in range(plan.k_tokens):
                assert bool(mask[row, 0, i, j]) == visible_by_definition(plan, row, i, j)


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_num_visible_counts_a_key_in_both_intervals_once(sizes):
    plan = random_plan(*sizes)
    assert torch.equal(plan.num_visible(), plan.visible().sum(dim=(2, 3)))


def test_density_is_relative_to_causal_attention():
    assert causal(3, 7).density() == 1.0
    assert causal(1, 3, 10).density() == 1.0
    # Triangles of 4 + 4 tokens in one of 8: (10 + 10) / 36.
    assert document([[0, 4]], 8).density() == pytest.approx(20 / 36)


def test_stacked_plans_keep_their_own_patterns():
    plans = [causal(2, 6), document([[0, 2]], 6)]
    stacked = AttentionPlan.stack(plans)
    assert stacked.batch == 3
    assert torch.equal(stacked.visible(), torch.cat([plan.visible() for plan in plans]))


def test_stacking_refuses_none_and_unequal_lengths():
    with pytest.raises(ValueError, match="at least one plan"):
        AttentionPlan.stack([])
    with pytest.raises(ValueError, match="must agree"):
        AttentionPlan.stack([causal(1, 4), causal(1, 5)])


@given(SIZES, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_within_a_window_a_query_sees_what_it_saw_of_the_last_keys_before_it(sizes, window_tokens):
    plan = random_plan(*sizes)
    mask, narrowed = plan.visible(), plan.within_window(window_tokens).visible()
    for i in range(plan.q_tokens):
        place = i + plan.k_tokens - plan.q_tokens
        for j in range(plan.k_tokens):
            expected = mask[:, :, i, j] if place - j < window_tokens else torch.zeros_like(mask[:, :, i, j])
            assert torch.equal(narrowed[:, :, i, j], expected)


def test_a_window_is_worked_out_once_and_must_hold_a_key():
    plan = causal(1, 5)
    assert plan.within_window(2) is plan.within_window(2)
    with pytest.raises(ValueError, match="window_tokens must be at least 1, got 0"):
        plan.within_window(0)


def test_moving_a_plan_keeps_its_mask():
    plan = causal(1, 5)
    assert torch.equal(plan.to("cpu").visible(), plan.visible())
    assert plan.to("meta").device.type == "meta"
    assert plan.device.type == "cpu"


def tensors(**changes):
    zeros = torch.zeros(2, 1, 4, dtype=torch.int32)
    return {"lo": zeros, "hi": zeros, "glo": zeros, "ghi": zeros, "k_tokens": 4} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lo": torch.zeros(2, 4, dtype=torch.int32)}, r"lo must be \[batch, plan_heads, q_tokens\]"),
        ({"lo": torch.zeros(0, 1, 4, dtype=torch.int32)}, "no empty dimension"),
        ({"hi": torch.zeros(2, 1, 4, dtype=torch.int64)}, "hi must be int32, got torch.int64"),
        ({"glo": torch.zeros(2, 1, 5, dtype=torch.int32)}, r"glo must match lo .* got \[2, 1, 5\]"),
        ({"ghi": torch.zeros(2, 1, 4, dtype=torch.int32, device="meta")}, "ghi must match lo .* on meta"),
        ({"hi": torch.full((2, 1, 4), 4, dtype=torch.int32)}, r"hi must lie in \[-1, 3\] for k_tokens=4"),
        ({"lo": torch.full((2, 1, 4), -1, dtype=torch.int32)}, r"lo must lie in \[0, 4\]"),
        ({"ghi": torch.full((2, 1, 4), 5, dtype=torch.int32)}, r"ghi must lie in \[0, 4\]"),
        ({"glo": torch.full((2, 1, 4), -2, dtype=torch.int32)}, r"glo must lie in \[0, 4\]"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan(**tensors(**changes))


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        causal(1, 4).k_tokens = 5
