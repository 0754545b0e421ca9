"""The entry point: what it accepts, and that it names what it refuses."""

import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from numerics import attention_inputs

from ropewalk.kernels.attention import (
    Implementation,
    api,
    causal,
    document,
    segmented,
    sliding_window,
    sparse_attention,
    sparse_attention_bwd,
)

PLAN = causal(2, 5, 7)


def shaped(q=(2, 4, 5, 8), k=(2, 2, 7, 8), v=(2, 2, 7, 8)):
    return [torch.zeros(shape) for shape in (q, k, v)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (4, 5, 8)}, r"must be \[batch, heads, tokens, head_dim\], got q \[4, 5, 8\]"),
        ({"v": (2, 2, 6, 8)}, r"k and v must have the same shape, got .* v \[2, 2, 6, 8\]"),
        ({"q": (1, 4, 5, 8)}, r"agree in batch and head_dim, got q \[1, 4, 5, 8\]"),
        ({"q": (2, 4, 5, 6)}, r"agree in batch and head_dim, got q \[2, 4, 5, 6\]"),
        ({"q": (2, 3, 5, 8)}, r"multiple of the key/value heads, got q \[2, 3, 5, 8\]"),
        ({"q": (2, 4, 6, 8)}, r"the plan is for batch 2, 5 queries and 7 keys, got q \[2, 4, 6, 8\]"),
        ({"k": (2, 2, 8, 8), "v": (2, 2, 8, 8)}, "the plan is for batch 2, 5 queries and 7 keys"),
        ({"q": (1, 4, 5, 8), "k": (1, 2, 7, 8), "v": (1, 2, 7, 8)}, "the plan is for batch 2"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        sparse_attention(*shaped(**changes), PLAN)


def test_mixed_and_integer_dtypes_are_refused():
    q, k, v = shaped()
    with pytest.raises(ValueError, match=r"one floating dtype, got torch.bfloat16, torch.float32"):
        sparse_attention(q.bfloat16(), k, v, PLAN)
    with pytest.raises(ValueError, match=r"one floating dtype, got torch.int64"):
        sparse_attention(q.long(), k.long(), v.long(), PLAN)


def test_a_plan_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"one device, got cpu, cpu, cpu and meta; move the plan with plan.to"):
        sparse_attention(*shaped(), PLAN.to("meta"))


def test_backward_names_what_does_not_fit():
    q, k, v = shaped()
    lse = torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"dout must be \[2, 4, 5, 8\] in torch.float32 to fit q, got \[2, 4, 5, 7\]"):
        sparse_attention_bwd(q[..., :7], q, k, v, q, lse, PLAN)
    with pytest.raises(ValueError, match=r"lse must be \[2, 4, 5\] in torch.float32 to fit q, got \[2, 4, 6\]"):
        sparse_attention_bwd(q, q, k, v, q, torch.zeros(2, 4, 6), PLAN)
    with pytest.raises(ValueError, match=r"out must be .* in torch.float32 to fit q, got .* in torch.float64"):
        sparse_attention_bwd(q, q, k, v, q.double(), lse, PLAN)


@pytest.mark.parametrize("implementation", ["flash", ""])
def test_an_unknown_implementation_is_refused_not_replaced(implementation):
    q, k, v = shaped()
    with pytest.raises(ValueError, match=r"implementation must be one of auto, triton, .*, reference, got '"):
        sparse_attention(q, k, v, PLAN, implementation=implementation)
    with pytest.raises(ValueError, match=r"implementation must be one of auto, triton, .*, reference, got '"):
        sparse_attention_bwd(q, q, k, v, q, torch.zeros(2, 4, 5), PLAN, implementation=implementation)


def test_every_implementation_has_both_directions(monkeypatch):
    if not torch.cuda.is_available():  # With a GPU, kernels imported so would be interpreted in this process for good.
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    named = [name for name in get_args(Implementation) if name != "auto"]
    assert list(api.MODULES) == named
    for name in named:
        module = api._module(name, torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"), PLAN)
        assert callable(module.attention) and callable(module.attention_bwd)


@pytest.mark.parametrize(
    ("implementation", "package", "message"),
    [
        ("flash_attn", "flash_attn", "implementation flash_attn needs the package flash-attn: "),
        ("flash_attn_4", "flash_attn", "implementation flash_attn_4 needs the package flash-attn-4: "),
        ("triton", "triton", "implementation triton needs the package triton: "),
    ],
)
def test_a_missing_package_is_named(implementation, package, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, package, None)
    for loaded in [name for name in sys.modules if name.startswith("ropewalk.kernels.attention.on_triton")]:
        monkeypatch.delitem(sys.modules, loaded)
    q, k, v = shaped()
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, PLAN, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        sparse_attention_bwd(q, q, k, v, q, torch.zeros(2, 4, 5), PLAN, implementation=implementation)


@pytest.mark.parametrize("implementation", ["triton", "varlen"])
def test_kernels_for_gpus_are_refused_on_a_cpu(implementation, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"implementation {implementation} needs a GPU.*, but q is on cpu: use auto"):
        sparse_attention(*shaped(), PLAN, implementation=implementation)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_no_other_library(device):
    q: Any = SimpleNamespace(dtype=torch.bfloat16, shape=(2, 4, 5, 64), device=torch.device(device))
    for plan in (PLAN, document([[0, 3]], 9), sliding_window([[0]], 99, window_tokens=3)):
        assert api._chosen("auto", q, plan) in ("triton", "segmented", "tiled")


def test_the_reference_is_never_replaced_by_a_faster_one(monkeypatch):
    monkeypatch.delattr(segmented, "attention")
    q, k, v, _ = attention_inputs(PLAN)
    sparse_attention(q, k, v, PLAN, implementation="reference")
    with pytest.raises(AttributeError):
        sparse_attention(q, k, v, PLAN)


def test_scale_defaults_to_one_over_the_root_of_the_head_dim():
    q, k, v, _ = attention_inputs(PLAN, head_dim=16)
    torch.testing.assert_close(sparse_attention(q, k, v, PLAN), sparse_attention(q, k, v, PLAN, scale=0.25))
    assert not torch.allclose(sparse_attention(q, k, v, PLAN)[0], sparse_attention(q, k, v, PLAN, scale=0.5)[0])
