"""FlashAttention-2, package flash-attn: its kernels for documents of different lengths, at any window.

Dao (arXiv:2307.08691; Dao-AILab/flash-attention: flash_attn/flash_attn_interface.py). The public function keeps out and
lse to itself until its own backward; the two functions below it take them from outside, so that branches can be merged.
Names and order of arguments are those of 2.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..plan import AttentionPlan
from . import packed
from .documents import Documents

NAME = "flash_attn"


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
        from flash_attn import flash_attn_interface as interface  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"implementation {NAME} needs the package flash-attn: {error}") from None
    # csrc/flash_attn/flash_api.cpp, mha_varlen_fwd: Ampere or newer, a head_dim of at most 256 in steps of 8.
    packed.check(NAME, q, capabilities=range(8, 100))

    def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, **_arguments(documents, scale))
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        interface._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, **_arguments(documents, scale), deterministic=True
        )
        return dq, dk, dv

    return packed.PackedKernels(NAME, forward, backward)


def _arguments(documents: Documents, scale: float) -> dict[str, Any]:
    return {
        "cu_seqlens_q": documents.q_edges,
        "cu_seqlens_k": documents.k_edges,
        "max_seqlen_q": documents.longest_q,
        "max_seqlen_k": documents.longest_k,
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": True,
        # Keys left of the query's own; -1 is no limit (src/mask.h, apply_mask_local).
        "window_size_left": -1 if documents.window_tokens is None else documents.window_tokens - 1,
        "window_size_right": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
    }
