"""The kernels against the dense fp64 reference: on a GPU where there is one, else in Triton's interpreter (fp32)."""

import pytest
import torch
from attention_plans import small_plans
from numerics import assert_within_budget, attention_inputs, plain_attention

from ropewalk.kernels.attention import causal, sliding_window, sparse_attention, sparse_attention_bwd
from ropewalk.kernels.attention.on_triton import sizes
from ropewalk.kernels.attention.on_triton.sizes import AttentionSizes, KernelSizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLANS = small_plans(700 if DEVICE == "cuda" else 65)  # The interpreter takes a millisecond for each operation.
SMALL = AttentionSizes(KernelSizes(32, 16, 4, 1), KernelSizes(16, 32, 4, 1), KernelSizes(32, 32, 4, 1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles for few tokens; on a GPU the real ones."""
    if DEVICE == "cpu":
        monkeypatch.setattr(sizes, "SINGLE_PRECISION", SMALL)


def gradients(q, k, v, plan, dout, implementation):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*inputs, plan, implementation=implementation)
    return out.detach(), lse.detach(), torch.autograd.grad(out, inputs, dout)


def check(plan, **shape):
    plan = plan.to(DEVICE)
    shape = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "dtype": torch.float32} | shape
    q, k, v, dout = attention_inputs(plan, **shape)
    exact = gradients(q.double(), k.double(), v.double(), plan, dout.double(), "reference")
    sees = plan.visible().any(dim=-1).repeat_interleave(q.shape[1] // plan.plan_heads, dim=1)
    plain_out, plain_lse = plain_attention(q, k, v, plan.visible() | ~plan.visible().any(dim=-1, keepdim=True))
    plain_grads = torch.autograd.grad(plain_out, (q, k, v), dout * sees.unsqueeze(-1))
    out, lse, grads = gradients(q, k, v, plan, dout, "triton")
    assert_within_budget("out", out, plain_out * sees.unsqueeze(-1), exact[0])
    assert_within_budget("lse", lse, plain_lse.float().masked_fill(~sees, -torch.inf), exact[1])
    for name, fast, plain, right in zip(("dq", "dk", "dv"), grads, plain_grads, exact[2], strict=True):
        assert_within_budget(name, fast, plain, right)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_out_lse_and_gradients_keep_the_error_budget(plan):
    check(plan, num_kv_heads=2)


@pytest.mark.parametrize("head_dim", [8, 24, 32, 80, 96, 128, 192, 256])
def test_every_head_dim_keeps_the_error_budget(head_dim):
    check(sliding_window([[0, 20]], 37, window_tokens=17, num_sinks=2), head_dim=head_dim, num_heads=1, num_kv_heads=1)


@pytest.mark.parametrize("row_tokens", [1, 15, 16, 17, 33])
def test_odd_lengths_keep_the_error_budget(row_tokens):
    check(causal(1, row_tokens), num_heads=2, num_kv_heads=2)


@pytest.mark.parametrize("magnitude", [4.0, 16.0])
def test_gradients_stay_exact_for_large_scores(magnitude):
    check(PLANS["anchor"], score_magnitude=magnitude, num_heads=2, num_kv_heads=1)


def test_a_plan_with_gaps_is_one_for_these_tiles():
    size = SMALL.keys if DEVICE == "cpu" else sizes.SINGLE_PRECISION.keys
    assert PLANS["runs with gaps"].tiles(size.M, size.N).has_gaps


def test_queries_that_see_nothing_give_zeros():
    check(PLANS["unrelated intervals"], num_kv_heads=2)
    plan = PLANS["block lists"].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=4, head_dim=64, dtype=torch.float32)
    out, lse, grads = gradients(q, k, v, plan, dout, "triton")
    blind = ~plan.visible().any(dim=-1).repeat_interleave(2, dim=1)
    assert blind.any() and bool((out[blind] == 0).all()) and bool((lse[blind] == -torch.inf).all())
    assert bool((grads[0][blind] == 0).all()) and all(bool(grad.isfinite().all()) for grad in grads)


def test_results_are_the_same_bits_each_time_and_no_memory_is_read_unwritten(monkeypatch):
    plan = PLANS["anchor"].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    first = gradients(q, k, v, plan, dout, "triton")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    for _ in range(100 if DEVICE == "cuda" else 2):
        again = gradients(q, k, v, plan, dout, "triton")
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(one, other) for one, other in zip(first[2], again[2], strict=True))


def test_gradients_flow_through_lse_and_the_backward_alone_agrees():
    plan = PLANS["window with sinks"].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float32)
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = {}
    for implementation in ("tiled", "triton"):
        out, lse = sparse_attention(q, k, v, plan, implementation=implementation)
        found[implementation] = torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), (q, k, v))
    torch.testing.assert_close(found["triton"], found["tiled"], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        out, lse = sparse_attention(q, k, v, plan)
        alone = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="triton")
        other = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="tiled")
    torch.testing.assert_close(alone, other, rtol=1e-4, atol=1e-4)


def test_inputs_need_not_be_contiguous():
    plan = PLANS["documents"].to(DEVICE)
    q, k, v, _ = attention_inputs(plan, num_heads=4, head_dim=64, dtype=torch.float32)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(
        sparse_attention(*strided, plan, implementation="triton")[0],
        sparse_attention(q, k, v, plan, implementation="triton")[0],
    )


def test_what_the_kernels_are_not_built_for_is_refused(monkeypatch):
    plan = causal(1, 16).to(DEVICE)
    q, k, v, _ = attention_inputs(plan, head_dim=100, dtype=torch.float32)
    with pytest.raises(ValueError, match="head_dim of 8, 16, 24 and so on up to 256, got 100"):
        sparse_attention(q, k, v, plan, implementation="triton")
    q, k, v, _ = attention_inputs(plan, head_dim=64)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32, got torch\.float64"):
        sparse_attention(q, k, v, plan, implementation="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            sparse_attention(q, k, v, plan, implementation="triton")
