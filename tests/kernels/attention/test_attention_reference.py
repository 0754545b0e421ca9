"""The definition itself, against results that can be worked out by hand and against numerical derivatives."""

import math

import pytest
import torch
from numerics import attention_inputs, plain_attention, random_plan

from ropewalk.kernels.attention import AttentionPlan, anchor, causal, document, sparse_attention, sparse_attention_bwd


def reference(q, k, v, plan, **options):
    return sparse_attention(q, k, v, plan, implementation="reference", **options)


def test_equal_scores_average_the_visible_values():
    plan = anchor([[0, 1, 3]], 5)
    v = torch.arange(5.0, dtype=torch.float64).reshape(1, 1, 5, 1).expand(1, 1, 5, 2)
    out, lse = reference(torch.zeros_like(v), torch.ones_like(v), v, plan)
    # Query 4 sees the anchor (0) and its own document (3, 4).
    assert out[0, 0, :, 0].tolist() == pytest.approx([0, 0.5, 1.0, 1.5, 7 / 3])
    assert lse[0, 0].tolist() == pytest.approx([math.log(seen) for seen in (1, 2, 3, 2, 3)])


def test_two_keys_weigh_as_a_logistic_function():
    q = torch.tensor([[[[2.0], [2.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[1.0], [3.0]]]], dtype=torch.float64)
    v = torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64)
    out, lse = reference(q, k, v, causal(1, 2), scale=0.25)
    assert out.flatten().tolist() == pytest.approx([0.0, 1 / (1 + math.exp(-1.0))])
    assert lse.flatten().tolist() == pytest.approx([0.5, math.log(math.exp(0.5) + math.exp(1.5))])


def test_consecutive_query_heads_share_a_key_head():
    plan = causal(1, 3)
    q, k, v, _ = attention_inputs(plan, num_heads=4, num_kv_heads=2)
    out, lse = reference(q, k, v, plan)
    for head in range(4):
        own = slice(head // 2, head // 2 + 1)
        expected_out, expected_lse = reference(q[:, head : head + 1], k[:, own], v[:, own], plan)
        assert torch.equal(out[:, head : head + 1], expected_out)
        assert torch.equal(lse[:, head : head + 1], expected_lse)


@pytest.mark.parametrize("plan", [causal(2, 5, 7), document([[0, 1, 4], [0, 2, 3]], 6), anchor([[0, 1, 4]], 7)])
def test_agrees_with_textbook_attention(plan):
    q, k, v, _ = attention_inputs(plan, num_heads=4, num_kv_heads=2)
    expected_out, expected_lse = plain_attention(q, k, v, plan.visible())
    out, lse = reference(q, k, v, plan)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_derivatives_of_out_and_lse_are_the_numerical_ones():
    plan = random_plan(1, 4, 5, seed=3, has_empty_queries=False)
    q, k, v, _ = attention_inputs(plan, num_heads=2, num_kv_heads=1, head_dim=2)
    assert torch.autograd.gradcheck(lambda q, k, v: reference(q, k, v, plan), (q, k, v))


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan():
    lo = torch.tensor([[[0, 3, 0]]], dtype=torch.int32)
    hi = torch.tensor([[[0, 2, 1]]], dtype=torch.int32)
    plan = AttentionPlan(lo, hi, lo, lo, 3)
    q, k, v, dout = attention_inputs(plan)
    out, lse = reference(q, k, v, plan)
    (out * dout).sum().add(lse[lse.isfinite()].sum()).backward()
    assert out[:, :, 1].count_nonzero() == 0
    assert lse[:, :, 1].eq(-torch.inf).all()
    assert q.grad[:, :, 1].count_nonzero() == 0
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    # Key 2 is visible to nobody.
    assert k.grad[:, :, 2].count_nonzero() == v.grad[:, :, 2].count_nonzero() == 0


@pytest.mark.parametrize("seed", range(4))
def test_handwritten_backward_is_autograd(seed):
    plan = random_plan(2, 6, 7, seed)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, seed=seed)
    out, lse = reference(q, k, v, plan)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        actual = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="reference")
    torch.testing.assert_close(actual, expected)
