"""flash-attn 2 and 4 and torch's varlen: what they are called with, on a CPU; what they compute, on a GPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from attention_plans import PLANS, small_plans
from numerics import assert_within_budget, attention_inputs, plain_attention

from ropewalk.kernels.attention import (
    AttentionPlan,
    causal,
    document,
    sliding_window,
    sparse_attention,
    sparse_attention_bwd,
)
from ropewalk.kernels.attention.libraries import packed, varlen

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LIBRARIES = ("flash_attn", "flash_attn_4", "varlen")
NAMES = ("causal", "after a cache", "documents", "window")
TINY = {
    **{name: PLANS[name] for name in NAMES},
    "one token": causal(1, 1),
    "one query": causal(2, 1, 40),
    "window of one": sliding_window([[0, 30], [0]], 50, window_tokens=1),
}


def windowed_after_a_cache(q_tokens, k_tokens, window_tokens):
    """The last queries of `k_tokens` keys, each with a window."""
    hi = torch.arange(k_tokens - q_tokens, k_tokens, dtype=torch.int32).view(1, 1, -1)
    zeros = torch.zeros_like(hi)
    return AttentionPlan((hi - window_tokens + 1).clamp(min=0), hi, zeros, zeros, k_tokens)


TINY["window after a cache"] = windowed_after_a_cache(30, 80, 20)


def dense(q, k, q_edges, k_edges, scale, left, right):
    """Scores [H, T, U] of packed documents, -inf where hidden: the bottom right corners aligned, as in flash-attn.

    `left` and `right` are keys beside the query's own; negative or None is no limit.
    """
    assert q.stride(-1) == k.stride(-1) == 1
    query, key = torch.arange(len(q)), torch.arange(len(k))
    of_query = torch.bucketize(query, q_edges[1:].long(), right=True)
    of_key = torch.bucketize(key, k_edges[1:].long(), right=True)
    last = (query - q_edges[of_query] + k_edges[of_query + 1] - q_edges[of_query + 1] + q_edges[of_query])[:, None]
    hidden = of_query[:, None] != of_key
    if right is not None and right >= 0:
        hidden |= key > last + right
    if left is not None and left >= 0:
        hidden |= key < last - left
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (torch.einsum("thd,uhd->htu", q, k) * scale).masked_fill(hidden, -torch.inf)


def dense_forward(q, k, v, *lengths_and_window):
    scores = dense(q, k, *lengths_and_window)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("htu,uhd->thd", scores.softmax(dim=-1), v), scores.logsumexp(dim=-1)


def dense_backward(dout, q, k, v, out, lse, *lengths_and_window):
    assert lse.is_contiguous()
    scale, group = lengths_and_window[2], q.shape[1] // k.shape[1]
    p = (dense(q, k, *lengths_and_window) - lse.unsqueeze(-1)).exp()
    k_, v_ = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    ds = p * (torch.einsum("thd,uhd->htu", dout, v_) - (dout * out).sum(dim=-1).T.unsqueeze(-1)) * scale
    dk, dv = torch.einsum("htu,thd->uhd", ds, q), torch.einsum("htu,thd->uhd", p, dout)
    dk, dv = (x.unflatten(1, (-1, group)).sum(dim=2) for x in (dk, dv))
    return torch.einsum("htu,uhd->thd", ds, k_), dk, dv


def flash_attn_2_of_2_8():
    """flash_attn_interface.py's two functions: argument names and order, layouts and results as there."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert causal and dropout_p == 0 and softcap == 0 and alibi_slopes is None
        assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
        window = (window_size_left, 0)
        out, lse = dense_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, *window)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert causal and dropout_p == 0 and softcap == 0 and alibi_slopes is None and deterministic is True
        assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), cu_seqlens_k.diff().max())
        found = dense_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, 0
        )
        for given, gradient in zip((dq, dk, dv), found, strict=True):
            given.copy_(gradient)
        return torch.empty(0)

    return module_of(_flash_attn_varlen_forward, _flash_attn_varlen_backward)


def flash_attn_4_beta_36():
    """cute/interface.py's two functions; what has a default there and is not given here is left out."""

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size=(None, None), deterministic=False, return_lse=False,
    ):  # fmt: skip
        assert causal and return_lse and qv is None
        return dense_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], 0)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False,
    ):  # fmt: skip
        assert causal and deterministic is True
        lengths = cu_seqlens_q, cu_seqlens_k, softmax_scale
        return dense_backward(dout, q, k, v, out, lse, *lengths, window_size_left, 0)

    return module_of(flash_attn_varlen_func, _flash_attn_bwd)


def module_of(*functions):
    module = ModuleType("interface")
    for function in functions:
        setattr(module, function.__name__, function)
    return module


class DenseOperators:
    """torch.ops.aten's two operators; `check_schema` holds their arguments against torch's own."""

    def _flash_attention_forward(self, *args, **named):
        q, k, v, q_edges, k_edges, *longest, dropout_p, is_causal, return_debug_mask = args
        check_schema("_flash_attention_forward", args, named)
        assert longest == [q_edges.diff().max(), k_edges.diff().max()]
        assert is_causal and dropout_p == 0 and not return_debug_mask
        window = named["window_size_left"], named["window_size_right"]
        out, lse = dense_forward(q, k, v, q_edges, k_edges, named["scale"], *window)
        return out, lse, None, None, None

    def _flash_attention_backward(self, *args, **named):
        dout, q, k, v, out, lse, q_edges, k_edges, *longest, dropout_p, is_causal, _seed, _unused = args
        check_schema("_flash_attention_backward", args, named)
        assert longest == [q_edges.diff().max(), k_edges.diff().max()]
        assert is_causal and dropout_p == 0 and torch.are_deterministic_algorithms_enabled()
        window = named["window_size_left"], named["window_size_right"]
        return dense_backward(dout, q, k, v, out, lse, q_edges, k_edges, named["scale"], *window)


POSITIONAL = {
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused"
    ),
}


def check_schema(name, args, named):
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    assert [a.name for a in arguments if not a.kwarg_only] == POSITIONAL[name].split()
    assert len(args) == len(POSITIONAL[name].split())
    assert set(named) <= {a.name for a in arguments if a.kwarg_only}


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch):
    """The implementation's name, over plain torch in place of its package, on the CPU."""
    monkeypatch.setattr(packed, "check", lambda *args, **named: None)
    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    package.flash_attn_interface, package.cute, cute.interface = flash_attn_2_of_2_8(), cute, flash_attn_4_beta_36()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(varlen, "aten", DenseOperators())
    return request.param


def gradients(q, k, v, plan, dout, dlse, implementation):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*inputs, plan, implementation=implementation)
    return out.detach(), lse.detach(), torch.autograd.grad((out * dout).sum() + (lse * dlse).sum(), inputs)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("plan", TINY.values(), ids=TINY.keys())
def test_the_call_says_what_the_plan_says(plan, num_kv_heads, library):
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=num_kv_heads)
    dlse = torch.randn(q.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = gradients(q, k, v, plan, dout, dlse, library)
    right = gradients(q, k, v, plan, dout, dlse, "reference")
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("plan", TINY.values(), ids=TINY.keys())
def test_the_backward_alone_takes_merged_out_and_lse(plan, library):
    q, k, v, dout = (x.detach() for x in attention_inputs(plan, num_heads=4, num_kv_heads=2))
    out, lse = torch.randn_like(q), torch.randn(q.shape[:3], dtype=torch.float64) + 5
    found = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation=library)
    torch.testing.assert_close(found, sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation="reference"))


def test_one_gradient_of_the_two_is_enough(library):
    plan = PLANS["window"]
    q, k, v, _ = attention_inputs(plan)
    for part in (0, 1):
        found, right = (
            torch.autograd.grad(
                sparse_attention(q, k, v, plan, implementation=name)[part].sum(), (q, k, v), allow_unused=True,
                materialize_grads=True,
            )
            for name in (library, "reference")
        )  # fmt: skip
        torch.testing.assert_close(found, right)


def test_inputs_need_not_be_contiguous(library):
    plan = TINY["window after a cache"]
    q, k, v, _ = (x.detach() for x in attention_inputs(plan, num_heads=4))
    strided = [x.mT.contiguous().mT for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    found = sparse_attention(*strided, plan, implementation=library)
    torch.testing.assert_close(found, sparse_attention(q, k, v, plan, implementation="reference"))


def test_a_plan_that_is_no_documents_is_refused(library):
    plan = PLANS["anchor"]
    q, k, v, dout = (x.detach() for x in attention_inputs(plan))
    with pytest.raises(ValueError, match=rf"implementation {library} cannot express a shared interval .*: use auto"):
        sparse_attention(q, k, v, plan, implementation=library)
    with pytest.raises(ValueError, match=f"implementation {library} cannot express"):
        sparse_attention_bwd(dout, q, k, v, q, q[..., 0], plan, implementation=library)


@pytest.mark.parametrize("before", [(False, False), (True, True), (True, False)])
def test_the_order_of_sums_is_fixed_for_the_call_alone(before):
    mode, warn_only = before
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    try:
        with pytest.raises(RuntimeError, match="inside"), varlen._same_bits_each_time():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise RuntimeError("inside")
        after = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        assert after == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_returns_the_packed_layouts():
    q = torch.empty(70, 4, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(90, 2, 64, dtype=torch.bfloat16, device="meta")
    edges = torch.empty(3, dtype=torch.int32, device="meta")
    found = packed.Documents(edges, edges, 70, 90, 8)
    out, lse = varlen._forward(q, k, k, found, 0.1)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 70), torch.float32)
    assert [x.shape for x in varlen._backward(q, q, k, k, out, lse, found, 0.1)] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "implementation varlen needs a GPU, but q is on cpu: use auto"),
        ({"capability": (7, 5)}, r"does not run on a GPU of compute capability 7\.5: use auto"),
        ({"dtype": torch.float32}, r"takes bfloat16 or float16, got torch\.float32: use auto"),
        ({"head_dim": 60}, "takes no head_dim of 60 on this GPU: use auto"),
        ({"head_dim": 264}, "takes no head_dim of 264"),
    ],
)
def test_what_the_kernels_are_not_built_for_is_refused(changes, message, monkeypatch):
    given = {"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "head_dim": 64} | changes

    shape = (1, 1, 1, given["head_dim"])
    q: Any = SimpleNamespace(device=torch.device(given["device"]), dtype=given["dtype"], shape=shape)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    with pytest.raises(ValueError, match=message):
        packed.check("varlen", q, capabilities=range(8, 100))


GPU_PLANS = {name: small_plans(700)[name] for name in NAMES} | {
    "window after a cache": windowed_after_a_cache(130, 700, 90),
    "many documents": document([list(range(0, 1333, 13)), [0, 1, 1332]], 1333),
}


@pytest.fixture(params=LIBRARIES)
def installed(request):
    if request.param == "flash_attn":
        pytest.importorskip("flash_attn.flash_attn_interface", exc_type=ImportError)
    if request.param == "flash_attn_4":
        pytest.importorskip("flash_attn.cute.interface", exc_type=ImportError)
    return request.param


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("plan", GPU_PLANS.values(), ids=GPU_PLANS.keys())
def test_kernels_keep_the_error_budget(plan, num_kv_heads, head_dim, installed):
    plan = plan.to("cuda")
    q, k, v, dout = attention_inputs(
        plan, num_heads=4, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=torch.bfloat16
    )
    dlse = torch.randn(q.shape[:3], generator=torch.Generator().manual_seed(1)).to("cuda")
    exact = gradients(q.double(), k.double(), v.double(), plan, dout.double(), dlse.double(), "reference")
    plain_out, plain_lse = plain_attention(q, k, v, plan.visible())
    plain_grads = torch.autograd.grad((plain_out * dout).sum() + (plain_lse * dlse).sum(), (q, k, v))
    out, lse, grads = gradients(q, k, v, plan, dout, dlse, installed)
    assert_within_budget("out", out, plain_out, exact[0])
    assert_within_budget("lse", lse, plain_lse.float(), exact[1])
    for name, fast, plain, right in zip(("dq", "dk", "dv"), grads, plain_grads, exact[2], strict=True):
        assert_within_budget(name, fast, plain, right)


@pytest.mark.gpu
@needs_gpu
def test_a_share_of_a_merged_gradient_is_right(installed):
    plan = GPU_PLANS["window"].to("cuda")
    whole = GPU_PLANS["causal"].to("cuda")
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
    q, k, v, dout = (x.detach() for x in attention_inputs(plan, **shape))
    out, lse = sparse_attention(q, k, v, whole, implementation="reference")
    fast = sparse_attention_bwd(dout, q, k, v, out, lse, plan, implementation=installed)
    wide = (x.double() for x in (dout, q, k, v, out, lse))
    for one, right in zip(fast, sparse_attention_bwd(*wide, plan, implementation="reference"), strict=True):
        torch.testing.assert_close(one.double(), right, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@needs_gpu
def test_results_are_the_same_bits_each_time(installed):
    plan = GPU_PLANS["window"].to("cuda")
    q, k, v, dout = attention_inputs(plan, num_heads=4, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    first = gradients(q, k, v, plan, dout, 1.0, installed)
    for _ in range(20):
        again = gradients(q, k, v, plan, dout, 1.0, installed)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert all(torch.equal(one, other) for one, other in zip(first[2], again[2], strict=True))
