"""The entry point: checks shapes, picks an implementation, never falls back silently.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import math
import os
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .on_triton.sizes import HEAD_DIMS
from .plan import AttentionPlan

QUERIES_OF_A_PIECE = 32
TRITON_DTYPES = (torch.bfloat16, torch.float16)
"""Those that auto takes the kernels for: in fp32 they are there to be right."""
Implementation = Literal[
    "auto", "triton", "segmented", "tiled", "flash_attn", "flash_attn_4", "varlen", "flex", "reference"
]
MODULES = {
    "triton": ".on_triton.attention",
    "segmented": ".segmented",
    "tiled": ".tiled",
    "flash_attn": ".libraries.flash_attn_2",
    "flash_attn_4": ".libraries.flash_attn_4",
    "varlen": ".libraries.varlen",
    "flex": ".libraries.flex",
    "reference": ".reference",
}
"""Where each implementation's `attention` and `attention_bwd` are; imported when they are called."""


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys that the plan makes visible.

    q is [B, H, L, D], k and v are [B, G, S, D] with H a multiple of G (consecutive query heads share a key/value
    head), all of one floating dtype, on the plan's device. `scale` multiplies the scores, default 1 / sqrt(D).

    Returns out [B, H, L, D] in the dtype of q, and lse [B, H, L], the natural log of the sum of exponentials, in
    fp32 (fp64 for fp64 input). A query that sees nothing gives out 0 and lse -inf. Gradients flow through both.

    `implementation`: "auto" is the fastest that suits; "segmented" runs dense attention on each piece of the plan;
    "tiled" visits tiles, and takes any plan; "triton" is the same in kernels, for GPUs; "flash_attn", "flash_attn_4"
    and torch's "varlen" are other libraries' kernels for GPUs, in half precision, for documents with or without a
    window, and "flex" is torch's for any plan: never what auto takes; "reference" builds the dense mask and is the
    definition. Raises ValueError for an unknown one, one that is not installed or cannot do the plan, or shapes that do
    not fit, saying which.
    """
    _check(q, k, v, plan)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _module(implementation, q, plan).attention(q, k, v, plan, scale)


def sparse_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `sparse_attention` from its out and lse, for callers that merge branches themselves.

    Given the `out` and `lse` of several merged branches, this is the branch's share of the merged attention's
    gradient: sum the shares of all branches. dout and out are [B, H, L, D] in the dtype of q, lse is [B, H, L] in
    fp32 (fp64 for fp64 input); the rest as in `sparse_attention`, errors included. Not differentiable itself.
    """
    _check(q, k, v, plan)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    for name, tensor, shape, dtype in (
        ("dout", dout, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("lse", lse, q.shape[:3], lse_dtype),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {list(shape)} in {dtype} to fit q, got {list(tensor.shape)} in {tensor.dtype}"
            )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _module(implementation, q, plan).attention_bwd(dout, q, k, v, out, lse, plan, scale)


def _module(implementation: Implementation, q: Tensor, plan: AttentionPlan) -> Any:
    """The module that computes it. Raises ValueError for one that is unknown, or cannot run here."""
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {', '.join(get_args(Implementation))}, got {implementation!r}")
    chosen = _chosen(implementation, q, plan)
    if chosen == "triton" and q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"implementation triton needs a GPU, or TRITON_INTERPRET=1 for tests, but q is on {q.device}: use auto"
        )
    try:
        return import_module(MODULES[chosen], __package__)
    except ImportError as error:
        raise ValueError(f"implementation {chosen} needs the package {error.name}: {error}") from None


def _chosen(implementation: Implementation, q: Tensor, plan: AttentionPlan) -> Implementation:
    """On a GPU the kernels, for what they are built for; elsewhere pieces where they are long on average, or tiles."""
    if implementation != "auto":
        return implementation
    if q.device.type == "cuda" and q.dtype in TRITON_DTYPES and q.shape[-1] in HEAD_DIMS:
        return "triton"
    if plan.blocks is None and plan.num_breaks * QUERIES_OF_A_PIECE <= plan.lo.numel():
        return "segmented"
    return "tiled"


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], got {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in batch and head_dim, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the key/value heads, got {shapes}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if (q.shape[0], q.shape[2], k.shape[2]) != (plan.batch, plan.q_tokens, plan.k_tokens):
        raise ValueError(
            f"the plan is for batch {plan.batch}, {plan.q_tokens} queries and {plan.k_tokens} keys, got {shapes}"
        )
    if q.shape[1] % plan.plan_heads:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the plan's {plan.plan_heads} plan heads")
    if not q.device == k.device == v.device == plan.device:
        raise ValueError(
            f"q, k, v and the plan must lie on one device, got {q.device}, {k.device}, {v.device} and {plan.device}; "
            "move the plan with plan.to(device)"
        )
