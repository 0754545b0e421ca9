"""Segmented attention against the dense fp64 reference, within the error budget of plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICES, assert_within_budget, attention_inputs, plain_attention, random_plan

from ropewalk.kernels.attention import AttentionPlan, anchor, causal, document, sparse_attention, sparse_attention_bwd

PLANS = {
    "one token": causal(1, 1),
    "causal": causal(2, 67),
    "one query after a cache": causal(2, 1, 33),
    "queries after a cache": causal(1, 9, 33),
    "documents": document([[0, 1, 2, 40, 66], [0, 33, 34, 50]], 67),
    "anchor": anchor([[0, 1, 2, 40, 66], [0, 1, 34, 50]], 67),
    "policies of each row": AttentionPlan.stack([causal(1, 50), document([[0, 7]], 50), anchor([[0, 1, 30]], 50)]),
    "unrelated intervals": random_plan(2, 19, 23, seed=1, has_empty_queries=False),
}


def exact_attention(q, k, v, plan, dout):
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*inputs, plan, implementation="reference")
    return out, lse, torch.autograd.grad(out, inputs, dout.double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_out_lse_and_gradients_keep_the_error_budget(plan, num_kv_heads, dtype, device):
    plan = plan.to(device)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=num_kv_heads, dtype=dtype)
    exact_out, exact_lse, exact_grads = exact_attention(q, k, v, plan, dout)
    plain_out, plain_lse = plain_attention(q, k, v, plan.visible())
    plain_grads = torch.autograd.grad(plain_out, (q, k, v), dout)
    out, lse = sparse_attention(q, k, v, plan, implementation="segmented")
    assert_within_budget("out", out, plain_out, exact_out)
    assert_within_budget("lse", lse, plain_lse.to(lse.dtype), exact_lse)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for name, fast, plain, exact in zip(("dq", "dk", "dv"), grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(name, fast, plain, exact)


@pytest.mark.parametrize("magnitude", [0.25, 1.0, 4.0, 16.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_exact_for_small_and_large_scores(dtype, magnitude):
    """A scale applied in low precision passes at unit scores and ruins dq at 16 times as much."""
    plan = PLANS["anchor"]
    q, k, v, dout = attention_inputs(plan, dtype=dtype, score_magnitude=magnitude)
    _, exact_lse, exact_grads = exact_attention(q, k, v, plan, dout)
    # fp32: a probability is exp(score - lse), to which one rounding of either costs eps * |score|.
    # bfloat16: scores are fp32 inside, so a few roundings of the inputs and outputs are all.
    eps = torch.finfo(dtype).eps
    bound = 4 * eps if dtype == torch.bfloat16 else eps * exact_lse.detach().abs().max().clamp(min=1)
    grads = torch.autograd.grad(sparse_attention(q, k, v, plan)[0], (q, k, v), dout)
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert (grad.double() - exact).norm() <= bound * exact.norm()


@given(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_any_plan_equals_the_reference_in_fp64_empty_queries_included(batch, q_tokens, k_tokens, seed):
    plan = random_plan(batch, q_tokens, k_tokens, seed)
    q, k, v, dout = attention_inputs(plan, num_heads=2, num_kv_heads=1, head_dim=4, seed=seed)
    exact_out, exact_lse, exact_grads = exact_attention(q, k, v, plan, dout)
    out, lse = sparse_attention(q, k, v, plan, implementation="segmented")
    torch.testing.assert_close(out, exact_out)
    torch.testing.assert_close(lse, exact_lse)
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), dout), exact_grads)


def test_the_lse_has_a_gradient_too():
    plan = PLANS["policies of each row"]
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2)

    def loss(implementation):
        out, lse = sparse_attention(q, k, v, plan, implementation=implementation)
        return (out * dout).sum() + (lse * dout[..., 0]).sum()

    expected = torch.autograd.grad(loss("reference"), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(loss("segmented"), (q, k, v)), expected)
    dq_only = torch.autograd.grad(sparse_attention(q, k, v, plan)[1].sum(), q)
    torch.testing.assert_close(dq_only, torch.autograd.grad(loss_of_lse(q, k, v, plan), q))


def loss_of_lse(q, k, v, plan):
    return sparse_attention(q, k, v, plan, implementation="reference")[1].sum()


def test_tensors_laid_out_as_models_make_them_give_the_same():
    plan = causal(2, 10)
    q, k, v, dout = attention_inputs(plan)
    expected_out, _ = sparse_attention(q, k, v, plan)
    # [batch, tokens, heads, head_dim] in memory, a head dim that is not contiguous, and an expanded gradient.
    strided = [q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v]
    out, _ = sparse_attention(*strided, plan)
    torch.testing.assert_close(out, expected_out)
    expected = torch.autograd.grad(expected_out, (q, k, v), torch.ones_like(dout))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), (q, k, v)), expected)


def test_keys_of_other_documents_are_not_read():
    plan = document([[0, 6, 11]], 16)
    q, k, v, dout = attention_inputs(plan)
    poison = torch.zeros(1, 1, 16, 1, dtype=torch.float64)
    poison[:, :, 6:11] = torch.nan
    out, _ = sparse_attention(q, k + poison, v + poison, plan, implementation="segmented")
    expected, _ = sparse_attention(q, k, v, plan)
    clean = [0, 1, 2, 3, 4, 5, 11, 12, 13, 14, 15]
    torch.testing.assert_close(out[:, :, clean], expected[:, :, clean])
    assert out[:, :, 6:11].isnan().all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert not any(grad[:, :, clean].isnan().any() for grad in (dq, dk, dv))


def test_results_are_the_same_bits_each_time():
    plan = PLANS["anchor"]
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, dtype=torch.float32)

    def run():
        out, lse = sparse_attention(q, k, v, plan)
        return out, lse, *torch.autograd.grad(out, (q, k, v), dout)

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


def test_one_shared_anchor_equals_an_anchor_copied_before_each_document():
    """The two engines of AnchorAttention (arXiv:2411.13476): a copy has the anchor's key and value and sees itself."""
    anchored = anchor([[0, 1, 8, 13]], 20)
    q, k, v, dout = attention_inputs(anchored, num_heads=4, num_kv_heads=2)
    copied = [0, *range(1, 8), 0, *range(8, 13), 0, *range(13, 20)]
    # Gathering repeats the anchor; its gradient gathers over the copies in turn. Copies bear no loss.
    replicated = document([[0, 8, 14]], len(copied))
    is_copy = torch.tensor([position == 0 for position in copied])
    out, lse = sparse_attention(q, k, v, anchored)
    out_copied, lse_copied = sparse_attention(q[:, :, copied], k[:, :, copied], v[:, :, copied], replicated)
    torch.testing.assert_close(out_copied, out[:, :, copied])
    torch.testing.assert_close(lse_copied, lse[:, :, copied])
    dout_copied = dout[:, :, copied].masked_fill(is_copy[:, None], 0.0)
    dout_anchored = dout.clone()
    dout_anchored[:, :, 0] = 0.0
    torch.testing.assert_close(
        torch.autograd.grad(out_copied, (q, k, v), dout_copied), torch.autograd.grad(out, (q, k, v), dout_anchored)
    )


def test_public_backward_equals_the_references_autograd_at_any_scale():
    plan = PLANS["anchor"]
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2)
    out, lse = sparse_attention(q, k, v, plan, scale=0.3, implementation="reference")
    expected = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        actual = sparse_attention_bwd(dout, q, k, v, out, lse, plan, scale=0.3)
    torch.testing.assert_close(actual, expected)
