"""Both versions of attention over a rectangle or triangle (fused on the CPU, plain elsewhere) against the reference."""

import pytest
import torch
from numerics import DEVICES, assert_within_budget, attention_inputs, plain_attention

from ropewalk.kernels.attention import AttentionPlan, causal, rectangle, sparse_attention, sparse_attention_bwd

VERSIONS = [(rectangle.forward, rectangle.backward), (rectangle.plain_forward, rectangle.plain_backward)]


def plan_of(shape):
    if shape == "triangle":
        return causal(2, 37)
    zeros = torch.zeros(2, 1, 13, dtype=torch.int32)
    return AttentionPlan(zeros, zeros + 40, zeros, zeros, 41)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shape", ["triangle", "rectangle"])
@pytest.mark.parametrize("version", VERSIONS, ids=["fused", "plain"])
def test_keeps_the_error_budget(version, shape, num_kv_heads, dtype, device, monkeypatch):
    monkeypatch.setattr(rectangle, "CHUNK_QUERIES", 16)
    forward, backward = version
    plan = plan_of(shape).to(device)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=num_kv_heads, dtype=dtype)
    exact_inputs = [x.detach().double() for x in (q, k, v)]
    exact = sparse_attention(*exact_inputs, plan, implementation="reference")
    exact_grads = sparse_attention_bwd(dout.double(), *exact_inputs, *exact, plan, implementation="reference")
    plain = plain_attention(q, k, v, plan.visible())
    plain_grads = torch.autograd.grad(plain[0], (q, k, v), dout)
    with torch.no_grad():
        fast = forward(q, k, v, shape == "triangle", q.shape[-1] ** -0.5)
        fast_grads = backward(dout, q, k, v, *fast, shape == "triangle", q.shape[-1] ** -0.5)
    assert_within_budget("out", fast[0], plain[0], exact[0])
    # The log-sum-exp is kept in fp32 even for half precision.
    assert fast[1].dtype == torch.promote_types(dtype, torch.float32)
    assert_within_budget("lse", fast[1], plain[1].to(fast[1].dtype), exact[1])
    for name, *grads in zip(("dq", "dk", "dv"), fast_grads, plain_grads, exact_grads, strict=True):
        assert_within_budget(name, *grads)
