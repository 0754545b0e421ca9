"""FlashAttention-4, package flash-attn-4 (beta): its kernels for documents of different lengths, at any window.

Dao-AILab/flash-attention: flash_attn/cute/interface.py. The public function gives out and lse, but takes no merged ones
for its backward, so that one is called below it. Read in 4.0.0b36: betas before 4.0.0b8 have no deterministic backward
for Hopper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import AttentionPlan
from . import packed
from .documents import Documents

NAME = "flash_attn_4"
HOPPER, BLACKWELL = 9, (10, 11)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log, fp32), differentiable once in both.

    Raises ValueError without the package, for what its kernels are not built for, and for a plan that is not documents
    and a window.
    """
    return packed.attention(_kernels(q), q, k, v, plan, scale)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `out` and `lse` may be merged ones. Raises ValueError as `attention` does."""
    return packed.attention_bwd(_kernels(q), dout, q, k, v, out, lse, plan, scale)


def _kernels(q: Tensor) -> packed.PackedKernels:
    try:
        from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"implementation {NAME} needs the package flash-attn-4: {error}") from None
    # `_flash_attn_bwd` has no deterministic mode, or none at all, for other GPUs.
    packed.check(NAME, q, (HOPPER, *BLACKWELL), _head_dims(q))

    def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
        left, right = _window(documents)
        out, lse, *_ = interface.flash_attn_varlen_func(
            q, k, v, **_arguments(documents, scale), window_size=(left, right), return_lse=True
        )
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = _window(documents)
        dq, dk, dv = interface._flash_attn_bwd(
            q, k, v, out, dout, lse, **_arguments(documents, scale),
            window_size_left=left, window_size_right=right, deterministic=True,
        )  # fmt: skip
        return dq, dk, dv

    return packed.PackedKernels(NAME, forward, backward)


def _head_dims(q: Tensor) -> tuple[int, ...]:
    """`_validate_head_dims`: multiples of 8, on Blackwell up to 128, and 256."""
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device)[0] in BLACKWELL:
        return (*range(8, 129, 8), 256)
    return tuple(packed.HEAD_DIMS)


def _window(documents: Documents) -> tuple[int | None, int]:
    """Keys left and right of the query's own; None is no limit."""
    return (None if documents.window_tokens is None else documents.window_tokens - 1), 0


def _arguments(documents: Documents, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": documents.q_edges,
        "cu_seqlens_k": documents.k_edges,
        "max_seqlen_q": documents.longest_q,
        "max_seqlen_k": documents.longest_k,
        "softmax_scale": scale,
        "causal": True,
    }
