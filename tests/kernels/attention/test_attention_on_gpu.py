"""The kernels on a GPU, in the dtypes of training and real tile sizes; `tests/kernels/README.md` says how to run it."""

from functools import lru_cache
from unittest import mock

import pytest
import torch
from attention_plans import random_blocks, small_plans, with_sinks
from estimator_inputs import inputs as estimator_inputs
from numerics import assert_within_budget, attention_inputs, plain_attention

from ropewalk.kernels.attention import (
    AttentionPlan,
    anchor,
    block_lists,
    causal,
    lambda_branches,
    merge_branches,
    sliding_window,
    sparse_attention,
    sparse_attention_bwd,
)
from ropewalk.kernels.attention.estimators import flexprefill, moba, vertical_slash, xattention
from ropewalk.kernels.attention.tiles import TileLists

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = [700, 1333]
LOG_SUM_EXP = {"rtol": 1e-5, "atol": 1e-3}
"""In fp32 whatever the inputs' dtype: a bf16 rounding of a score of 80 would be 0.25."""
ESTIMATORS = {
    "vertical_slash": (vertical_slash, {"num_verticals": 3, "num_slashes": 4, "num_first": 1, "num_local": 2}),
    "flexprefill": (flexprefill, {"gamma": 0.6, "tau": 0.3, "min_budget_tokens": 16}),
    "xattention": (xattention, {"stride": 4, "threshold": 0.6}),
    "moba": (moba, {"chunk_tokens": 256, "top_k": 2}),
}


@lru_cache
def plans(row_tokens):
    """Every pattern, and lists of blocks as large as the largest tiles."""
    starts = [[0, 1, row_tokens // 3, row_tokens // 3 + 1], [0, row_tokens // 2]]
    lists = {
        f"block lists of {edge}": block_lists(
            random_blocks(2, 2, row_tokens, edge, block_tokens=edge), starts, row_tokens
        )
        for edge in (64, 128)
    }
    return small_plans(row_tokens) | lists | {"128 with sinks": with_sinks(lists["block lists of 128"], 20)}


def gradients(q, k, v, plan, dout, implementation="triton"):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*inputs, plan, implementation=implementation)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, dout)


def seeing(plan, num_heads):
    """bool [B, H, L]: queries that see a key."""
    return plan.visible().any(dim=-1).repeat_interleave(num_heads // plan.plan_heads, dim=1)


def with_blind_queries_seeing_all(plan):
    """bool [B, P, L, S], for plain attention, which must not be blind."""
    visible = plan.visible()
    return visible | ~visible.any(dim=-1, keepdim=True)


def check(plan, dtype, **shape):
    plan = plan.to(DEVICE)
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 128} | shape
    q, k, v, dout = attention_inputs(plan, dtype=dtype, **shape)
    exact = gradients(q.double(), k.double(), v.double(), plan, dout.double(), "reference")
    sees = seeing(plan, q.shape[1])
    plain_out, _ = plain_attention(q, k, v, with_blind_queries_seeing_all(plan))
    plain = (plain_out * sees.unsqueeze(-1), *torch.autograd.grad(plain_out, (q, k, v), dout * sees.unsqueeze(-1)))
    out, lse, *grads = gradients(q, k, v, plan, dout)
    torch.testing.assert_close(lse, exact[1].float(), **LOG_SUM_EXP)
    for name, fast, in_dtype, right in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), plain, (exact[0], *exact[2:]), strict=True
    ):
        assert_within_budget(name, fast, in_dtype, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_tokens", LENGTHS)
@pytest.mark.parametrize("name", plans(LENGTHS[0]))
def test_out_lse_and_gradients_keep_the_error_budget(name, row_tokens, dtype):
    check(plans(row_tokens)[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["anchor", "128 with sinks"])
@pytest.mark.parametrize("head_dim", [8, 24, 32, 64, 80, 96, 192, 256])
def test_every_head_dim_keeps_the_error_budget(head_dim, name, dtype):
    check(plans(700)[name], dtype, head_dim=head_dim)


def test_the_narrowest_heads_keep_the_error_budget_in_small_blocks():
    check(plans(700)["block lists of 64"], torch.bfloat16, head_dim=8)


@pytest.mark.parametrize("name", ["anchor", "block lists of 128"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 1), (32, 8)])
def test_grouped_heads_keep_the_error_budget(num_heads, num_kv_heads, name):
    check(plans(700)[name], torch.bfloat16, num_heads=num_heads, num_kv_heads=num_kv_heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [4.0, 16.0])
@pytest.mark.parametrize("name", ["anchor", "window with sinks", "block lists of 128"])
def test_large_scores_keep_the_error_budget(name, magnitude, dtype):
    check(plans(700)[name], dtype, score_magnitude=magnitude)


@pytest.mark.parametrize("row_tokens", [1, 15, 17, 127, 128, 129, 257])
def test_lengths_around_a_tile_keep_the_error_budget(row_tokens):
    check(causal(1, row_tokens), torch.bfloat16)


def test_key_tiles_that_are_split_keep_the_error_budget():
    plan = anchor([[0, *range(1, 8219, 200)]], 8219)
    with mock.patch.object(AttentionPlan, "tiles", autospec=True, side_effect=AttentionPlan.tiles) as asked:
        check(plan, torch.bfloat16, num_heads=2, num_kv_heads=1)
    assert any(call.args[0].tiles(*call.args[1:]).num_slots for call in asked.call_args_list)


@pytest.mark.parametrize("name", ["unrelated intervals", "block lists of 128"])
def test_queries_that_see_nothing_give_zeros(name):
    plan = plans(700)[name].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=4, head_dim=128, dtype=torch.bfloat16)
    out, lse, *grads = gradients(q, k, v, plan, dout)
    blind = ~seeing(plan, 4)
    assert blind.any() and bool((out[blind] == 0).all()) and bool((lse[blind] == -torch.inf).all())
    assert bool((grads[0][blind] == 0).all()) and all(bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("name", ["anchor", "block lists of 128"])
def test_results_are_the_same_bits_a_hundred_times_and_no_memory_is_read_unwritten(name, monkeypatch):
    plan = plans(4099)[name].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    first = gradients(q, k, v, plan, dout)
    for maker in ("empty", "empty_like"):
        monkeypatch.setattr(torch, maker, poisoned(getattr(torch, maker)))
    for _ in range(100):
        again = gradients(q, k, v, plan, dout)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def poisoned(make):
    def filled(*args, **kwargs):
        made = make(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return filled


@pytest.mark.parametrize("name", ["documents", "block lists of 128"])
def test_inputs_need_not_be_contiguous(name):
    plan = plans(700)[name].to(DEVICE)
    packed = torch.randn(2, 700, 8, 128, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).half()
    q, k, v = packed.transpose(1, 2).split([4, 2, 2], dim=1)  # As one projection gives them: [B, L, H, D] in memory.
    dout = torch.randn_like(packed[:, :, :4]).transpose(1, 2)
    assert not any(x.is_contiguous() for x in (q, k, v, dout))
    strided = gradients(q, k, v, plan, dout)
    contiguous = gradients(*(x.contiguous() for x in (q, k, v)), plan, dout.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(strided, contiguous, strict=True))


def test_the_gradient_of_a_sum_has_no_strides_and_is_taken():
    plan = plans(700)["documents"].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    expanded = gradients(q, k, v, plan, torch.ones((), dtype=q.dtype, device=DEVICE).expand_as(dout))
    full = gradients(q, k, v, plan, torch.ones_like(dout))
    assert all(torch.equal(one, other) for one, other in zip(expanded, full, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["window with sinks", "block lists of 128"])
def test_gradients_flow_through_lse(name, dtype):
    plan = plans(700)[name].to(DEVICE)
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=128, dtype=dtype)
    sees = seeing(plan, 4)
    dlse = torch.randn(q.shape[:3], device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) * sees

    def through_both(out, lse, inputs):
        # A blind query's lse is -inf, and its gradient 0.
        value = (out * dout.to(out.dtype)).sum(dtype=torch.float64) + (lse.masked_fill(~sees, 0.0) * dlse).sum()
        return torch.autograd.grad(value, inputs)

    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = through_both(*sparse_attention(*exact_inputs, plan, implementation="reference"), exact_inputs)
    plain_out, plain_lse = plain_attention(q, k, v, with_blind_queries_seeing_all(plan))
    plain = through_both(plain_out * sees.unsqueeze(-1), plain_lse, (q, k, v))
    fast = through_both(*sparse_attention(q, k, v, plan, implementation="triton"), (q, k, v))
    for part, found, in_dtype, right in zip(("dq", "dk", "dv"), fast, plain, exact, strict=True):
        assert_within_budget(part, found, in_dtype, right)


def test_merged_branches_keep_the_error_budget_and_their_backward_takes_merged_out_and_lse():
    starts, row_tokens = [[0, 300], [0, 1]], 700
    branches = [plan.to(DEVICE) for plan in lambda_branches(starts, row_tokens, window_tokens=129, num_sinks=4)]
    whole = sliding_window(starts, row_tokens, window_tokens=129, num_sinks=4).to(DEVICE)
    q, k, v, dout = attention_inputs(whole, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    exact = gradients(q.double(), k.double(), v.double(), whole, dout.double(), "reference")
    plain_out, _ = plain_attention(q, k, v, whole.visible())
    plain = (plain_out, *torch.autograd.grad(plain_out, (q, k, v), dout))
    out, lse = merge_branches([sparse_attention(q, k, v, plan, implementation="triton") for plan in branches])
    found = (out, *torch.autograd.grad(out, (q, k, v), dout))
    torch.testing.assert_close(lse.detach(), exact[1].float(), **LOG_SUM_EXP)
    # A branch's gradient is rounded before the branches are added: twice what one rounding gives.
    with torch.no_grad():
        shares = [
            sparse_attention_bwd(dout, q, k, v, out.detach(), lse.detach(), plan, implementation="triton")
            for plan in branches
        ]
    summed = (out, *(sum(parts) for parts in zip(*shares, strict=True)))
    for results in (found, summed):
        for part, fast, in_dtype, right in zip(
            ("out", "dq", "dk", "dv"), results, plain, (exact[0], *exact[2:]), strict=True
        ):
            assert_within_budget(part, fast, in_dtype, right)


def test_auto_is_these_kernels():
    plan = plans(700)["anchor"].to(DEVICE)
    q, k, v, _ = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    found = [sparse_attention(q, k, v, plan, implementation=name) for name in ("auto", "triton")]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("name", plans(LENGTHS[0]))
def test_tiles_of_a_plan_on_the_gpu_are_those_of_the_cpu(name):
    plan = plans(1333)[name]
    edge = 128 if plan.blocks is None else plan.blocks.block_tokens
    here, there = plan.tiles(edge // 2, edge), plan.to(DEVICE).tiles(edge // 2, edge)
    assert_same_tensors(here, there)


def assert_same_tensors(here, there):
    for field, value in vars(here).items():
        other = getattr(there, field)
        if isinstance(value, torch.Tensor):
            assert other.device.type == DEVICE and torch.equal(value, other.cpu()), field
        elif isinstance(value, TileLists):
            assert_same_tensors(value, other)
        else:
            assert value == other, field


@pytest.mark.parametrize("name", ESTIMATORS)
def test_lists_estimated_on_the_gpu_are_those_of_the_cpu_and_are_attended(name):
    estimate, options = ESTIMATORS[name]
    starts, row_tokens = [[0, 1, 500], [0, 777]], 1333
    q, k = estimator_inputs(starts, row_tokens, head_dim=128)
    here = estimate(q, k, starts, **options, block_tokens=128)
    there = estimate(q.to(DEVICE), k.to(DEVICE), starts, **options, block_tokens=128)
    assert torch.equal(here.offsets, there.offsets.cpu()) and torch.equal(here.keys, there.keys.cpu())
    plan = block_lists(there, starts, row_tokens)
    assert plan.device.type == DEVICE
    check(plan, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_addresses_beyond_two_to_the_31_are_right(layout):
    tokens, heads, head_dim = 131072 + 77, 128, 128
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB of GPU memory")
    plan = sliding_window([[0]], tokens, window_tokens=300, num_sinks=4).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (1, heads, tokens, head_dim) if layout == "heads first" else (1, tokens, heads, head_dim)
    drawn = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator) for _ in range(4)]
    q, k, v, dout = drawn if layout == "heads first" else [x.transpose(1, 2) for x in drawn]
    assert q.numel() > 2**31
    found = gradients(q, k, v, plan, dout)
    for first in (0, heads - 2):
        some = [x[:, first : first + 2].contiguous() for x in (q, k, v, dout)]
        for whole, part in zip(found, gradients(*some[:3], plan, some[3]), strict=True):
            # Not bits: other counts of heads are other kernels to the compiler.
            error = (whole[:, first : first + 2].float() - part.float()).norm() / part.float().norm()
            assert error < 1e-3
