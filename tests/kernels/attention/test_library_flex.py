"""torch's flex attention under a plan. Its CPU form has no backward that torch allows; the formulas behind it do."""

import pytest
import torch
from attention_plans import PLANS, random_blocks, small_plans
from numerics import assert_within_budget, attention_inputs, plain_attention, random_plan
from torch._dynamo.testing import CompileCounter

from ropewalk.kernels.attention import (
    AttentionPlan,
    block_lists,
    causal,
    document,
    sliding_window,
    sparse_attention,
    sparse_attention_bwd,
)
from ropewalk.kernels.attention.libraries import flex

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TINY = {**PLANS, "one token": causal(1, 1), "empty queries": random_plan(1, 70, 90, seed=5, plan_heads=4)}


@pytest.fixture(autouse=True)
def nothing_compiled(request):
    """torch counts the shapes of all tests together; on a GPU compiling anew would take minutes."""
    if request.node.get_closest_marker("gpu") is None:
        torch._dynamo.reset()


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """torch's uncompiled flex attention has a backward; it is only not allowed on a CPU."""
    monkeypatch.setattr(flex.library, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_checked", lambda *tensors: tensors)


def gradients(q, k, v, plan, dout, dlse, implementation):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*inputs, plan, implementation=implementation)
    seen = lse.isfinite()
    loss = (out * dout).sum() + (lse.masked_fill(~seen, 0.0) * dlse * seen).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, inputs)


def check(plan, dtype, **shape):
    """Out, lse and the gradients through both within the budget."""
    q, k, v, dout = attention_inputs(plan, dtype=dtype, **{"num_heads": 4, "num_kv_heads": 2} | shape)
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to(plan.device)
    exact = gradients(q.double(), k.double(), v.double(), plan, dout.double(), dlse.double(), "reference")
    sees = plan.visible().any(dim=-1).repeat_interleave(q.shape[1] // plan.plan_heads, dim=1)
    plain_out, plain_lse = plain_attention(q, k, v, plan.visible() | ~plan.visible().any(dim=-1, keepdim=True))
    plain_loss = (plain_out * dout * sees.unsqueeze(-1)).sum() + (plain_lse * dlse * sees).sum()
    plain_grads = torch.autograd.grad(plain_loss, (q, k, v))
    out, lse, grads = gradients(q, k, v, plan, dout, dlse, "flex")
    assert_within_budget("out", out, plain_out * sees.unsqueeze(-1), exact[0])
    assert_within_budget("lse", lse, plain_lse.masked_fill(~sees, -torch.inf).to(lse.dtype), exact[1])
    for name, fast, plain, right in zip(("dq", "dk", "dv"), grads, plain_grads, exact[2], strict=True):
        assert_within_budget(name, fast, plain, right)


def check_share_of_a_merged_gradient(plan, whole, dtype, tolerance):
    """The share of `plan` in the gradient of `whole`, which sees more keys, from the out and lse of `whole`."""
    q, k, v, dout = (x.detach() for x in attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=64, dtype=dtype))
    out, lse = sparse_attention(q, k, v, whole, implementation="reference")
    fast = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="flex")
    wide = (x.double() for x in (dout, q, k, v, out, lse))
    for one, other in zip(fast, sparse_attention_bwd(*wide, plan, implementation="reference"), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", TINY.values(), ids=TINY.keys())
def test_out_and_lse_keep_the_error_budget_on_a_cpu(plan, dtype):
    q, k, v, _ = (x.detach() for x in attention_inputs(plan, num_heads=4, num_kv_heads=2, dtype=dtype))
    out, lse = sparse_attention(q, k, v, plan, implementation="flex")
    exact = sparse_attention(q.double(), k.double(), v.double(), plan, implementation="reference")
    sees = plan.visible().any(dim=-1).repeat_interleave(4 // plan.plan_heads, dim=1)
    plain = plain_attention(q, k, v, plan.visible() | ~plan.visible().any(dim=-1, keepdim=True))
    assert_within_budget("out", out, plain[0] * sees.unsqueeze(-1), exact[0])
    assert_within_budget("lse", lse, plain[1].masked_fill(~sees, -torch.inf).to(lse.dtype), exact[1])


@pytest.mark.parametrize("plan", TINY.values(), ids=TINY.keys())
def test_what_flex_attention_differentiates_is_the_plan(plan, backward_on_cpu):
    check(plan, torch.float32)


@pytest.mark.parametrize("name", ["window", "block lists with sinks", "unrelated intervals"])
def test_a_share_of_a_merged_gradient_is_exact(name, backward_on_cpu):
    plan = PLANS[name]
    nothing = torch.zeros_like(plan.lo)
    whole = AttentionPlan(nothing, nothing + plan.k_tokens - 1, nothing, nothing, plan.k_tokens)
    check_share_of_a_merged_gradient(plan, whole, torch.float64, 1e-9)


def test_queries_that_no_branch_sees_have_no_share(backward_on_cpu):
    plan = PLANS["unrelated intervals"]
    assert not plan.visible().any(dim=-1).all()
    check_share_of_a_merged_gradient(plan, plan, torch.float64, 1e-9)


def test_blocks_are_skipped_where_nothing_is_seen_and_full_where_all_is():
    blocks = random_blocks(2, 2, 700, 0, block_tokens=32)
    plans = {**small_plans(700), "small blocks": block_lists(blocks, [[0], [0, 300]], 700)}
    num_full = 0
    for name, plan in plans.items():
        mask = flex.block_mask(plan)
        padding = (0, -plan.k_tokens % 128, 0, -plan.q_tokens % 128)
        cells = torch.nn.functional.pad(plan.visible().flatten(0, 1), padding)
        cells = cells.view(len(cells), cells.shape[1] // 128, 128, -1, 128)
        full = library_map(mask.full_kv_num_blocks, mask.full_kv_indices)
        partial = library_map(mask.kv_num_blocks, mask.kv_indices)
        assert not (full & partial).any(), name
        assert (cells.all(dim=4).all(dim=2) | ~full).all(), name
        assert (full | partial | ~cells.any(dim=4).any(dim=2)).all(), name
        if name in ("causal", "documents", "window", "small blocks"):
            assert torch.equal(full, cells.all(dim=4).all(dim=2)), name
            assert torch.equal(full | partial, cells.any(dim=4).any(dim=2)), name
        num_full += int(full.sum())
    assert num_full > 0


def library_map(counts, indices):
    """bool [rows, query blocks, key blocks] of a block mask's lists."""
    listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros_like(listed).scatter(-1, indices.long(), listed)[:, 0]


def test_plans_of_one_shape_share_what_was_compiled(monkeypatch):
    counter = CompileCounter()
    compiled = torch.compile(flex.library.flex_attention, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "_function", lambda device_type: compiled)
    plans = [causal(1, 183), document([[0, 50, 51]], 183), sliding_window([[0, 9]], 183, window_tokens=5, num_sinks=2)]
    q, k, v, _ = (x.detach() for x in attention_inputs(plans[0], dtype=torch.float32))
    for plan in plans * 2:
        found = sparse_attention(q, k, v, plan, implementation="flex")
        torch.testing.assert_close(found, sparse_attention(q, k, v, plan, implementation="reference"))
    assert counter.frame_count == 1
    q, k, v, _ = (x.detach() for x in attention_inputs(causal(1, 90), dtype=torch.float32))
    sparse_attention(q, k, v, causal(1, 90), implementation="flex")
    assert counter.frame_count == 2


def test_a_mask_is_built_once_for_a_plan_and_goes_with_it():
    plan = causal(1, 16)
    q, k, v, _ = (x.detach() for x in attention_inputs(plan))
    before = len(flex._MASKS)
    for _ in range(2):
        sparse_attention(q, k, v, plan, implementation="flex")
    assert len(flex._MASKS) == before + 1
    del plan
    assert len(flex._MASKS) == before


def test_a_backward_on_a_cpu_is_refused():
    plan = PLANS["documents"]
    q, k, v, dout = attention_inputs(plan)
    with pytest.raises(ValueError, match=r"flex has no backward on a CPU in torch 2\..*: use auto"):
        sparse_attention(q, k, v, plan, implementation="flex")
    with torch.no_grad():
        out, lse = sparse_attention(q, k, v, plan, implementation="flex")
    with pytest.raises(ValueError, match="flex has no backward on a CPU"):
        sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="flex")


def test_what_torch_has_no_kernel_for_is_refused():
    q = torch.empty(1, 1, 4, 8, device="meta")
    with pytest.raises(ValueError, match="head_dim of 16 or more, got 8"):
        flex._checked(q, q, q)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32 on a GPU, got torch\.float64"):
        flex._checked(q.double(), q.double(), q.double())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("plan", small_plans(700).values(), ids=PLANS.keys())
def test_compiled_kernels_keep_the_error_budget(plan):
    check(plan.to("cuda"), torch.bfloat16, head_dim=64)


@pytest.mark.gpu
@needs_gpu
def test_a_share_of_a_merged_gradient_is_right_on_a_gpu():
    plan = sliding_window([[0, 300]], 700, window_tokens=100).to("cuda")
    check_share_of_a_merged_gradient(plan, causal(1, 700).to("cuda"), torch.bfloat16, 3e-2)


@pytest.mark.gpu
@needs_gpu
def test_results_are_the_same_bits_each_time():
    plan = small_plans(700)["anchor"].to("cuda")
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    first = gradients(q, k, v, plan, dout, 0.0, "flex")
    for _ in range(10):
        again = gradients(q, k, v, plan, dout, 0.0, "flex")
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(one, other) for one, other in zip(first[2], again[2], strict=True))
