"""Attention tile by tile against the dense fp64 reference, within the error budget of plain torch."""

import pytest
import torch
from attention_plans import PLANS
from numerics import DEVICES, assert_within_budget, attention_inputs, plain_attention, random_plan

from ropewalk.kernels.attention import causal, segmented, sliding_window, sparse_attention, sparse_attention_bwd, tiled

TINY = {**PLANS, "one token": causal(1, 1), "empty queries": random_plan(1, 70, 90, seed=5, plan_heads=4)}


def gradients(q, k, v, plan, dout, implementation):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*inputs, plan, implementation=implementation)
    return out.detach(), lse.detach(), torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("plan", TINY.values(), ids=TINY.keys())
def test_out_lse_and_gradients_keep_the_error_budget(plan, num_kv_heads, dtype, device, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", 16)
    monkeypatch.setattr(tiled, "MOST_SCORES", 16 * 60)
    plan = plan.to(device)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=num_kv_heads, dtype=dtype)
    exact = gradients(q.double(), k.double(), v.double(), plan, dout.double(), "reference")
    # Queries that see nothing are NaN in plain attention: both ways they are 0.
    sees = plan.visible().any(dim=-1).repeat_interleave(4 // plan.plan_heads, dim=1)
    plain_out, plain_lse = plain_attention(q, k, v, plan.visible() | ~plan.visible().any(dim=-1, keepdim=True))
    plain_grads = torch.autograd.grad(plain_out, (q, k, v), dout * sees.unsqueeze(-1))
    out, lse, grads = gradients(q, k, v, plan, dout, "tiled")
    shown = sees.unsqueeze(-1)
    assert_within_budget("out", out, plain_out * shown, exact[0])
    assert_within_budget("lse", lse, plain_lse.masked_fill(~sees, -torch.inf).to(lse.dtype), exact[1])
    for name, fast, plain, right in zip(("dq", "dk", "dv"), grads, plain_grads, exact[2], strict=True):
        assert_within_budget(name, fast, plain, right)


@pytest.mark.parametrize("name", ["window with sinks", "block lists with sinks", "shifted groups"])
def test_gradients_flow_through_lse_and_the_backward_alone_agrees(name):
    plan = PLANS[name]
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2)
    dlse = torch.randn(q.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {}
    for implementation in ("reference", "tiled"):
        out, lse = sparse_attention(q, k, v, plan, implementation=implementation)
        seen = lse.isfinite()
        found[implementation] = torch.autograd.grad(
            (out * dout).sum() + (lse.masked_fill(~seen, 0.0) * dlse * seen).sum(), (q, k, v)
        )
    for fast, exact in zip(found["tiled"], found["reference"], strict=True):
        torch.testing.assert_close(fast, exact)
    with torch.no_grad():
        out, lse = sparse_attention(q, k, v, plan, implementation="tiled")
        alone = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="tiled")
        exact = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="reference")
    for fast, right in zip(alone, exact, strict=True):
        torch.testing.assert_close(fast, right)


def test_auto_takes_pieces_for_long_runs_and_tiles_for_the_rest(monkeypatch):
    taken = []
    for module, name in ((segmented, "segmented"), (tiled, "tiled")):
        original = module.attention
        monkeypatch.setattr(
            module, "attention", lambda *args, name=name, original=original: (taken.append(name), original(*args))[1]
        )
    for name in ("causal", "window", "block lists", "shared prefix"):
        q, k, v, _ = attention_inputs(PLANS[name], num_heads=4)
        sparse_attention(q, k, v, PLANS[name])
    assert taken == ["segmented", "tiled", "tiled", "segmented"]


def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch():
    plan = PLANS["window with sinks"]
    q, k, v, _ = attention_inputs(plan, dtype=torch.float32)
    with torch.no_grad():
        whole, _ = sparse_attention(q, k, v, plan, implementation="tiled")
        alone = sliding_window([[0]], plan.q_tokens, window_tokens=20, num_sinks=5)
        part, _ = sparse_attention(q[:1], k[:1], v[:1], alone, implementation="tiled")
    assert torch.equal(whole[:1], part)
