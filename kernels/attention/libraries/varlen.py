"""The FlashAttention-2 kernels that come with torch, for documents of different lengths, at any window.

The operators under torch.nn.attention.varlen (torch/nn/attention/varlen.py; aten/src/ATen/native/transformers/cuda/
attention_backward.cu), which take out and lse from outside, so that branches can be merged. Arguments are those that
torch 2.11 to 2.13 share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..plan import AttentionPlan
from . import packed
from .documents import Documents

NAME = "varlen"
aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log, fp32), differentiable once in both.

    Raises ValueError for what the kernels are not built for, and for a plan that is not documents and a window.
    """
    return packed.attention(_kernels(q), q, k, v, plan, scale)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `out` and `lse` may be merged ones. Raises ValueError as `attention` does."""
    return packed.attention_bwd(_kernels(q), dout, q, k, v, out, lse, plan, scale)


def _kernels(q: Tensor) -> packed.PackedKernels:
    packed.check(NAME, q, capabilities=range(8, 100))
    if not torch.backends.cuda.is_flash_attention_available():
        raise ValueError(f"implementation {NAME} needs a torch that is built with flash attention: use auto")
    return packed.PackedKernels(NAME, _forward, _backward)


def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, *_lengths(documents), 0.0, True, False, scale=scale, **_window(documents)
    )
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, documents: Documents, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Of dropout, which there is none of.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    with _same_bits_each_time():
        return aten._flash_attention_backward(
            dout, q, k, v, out, lse, *_lengths(documents), 0.0, True, seed, torch.empty(0, device=q.device),
            scale=scale, **_window(documents),
        )  # fmt: skip


def _lengths(documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    return documents.q_edges, documents.k_edges, documents.longest_q, documents.longest_k


def _window(documents: Documents) -> dict[str, Any]:
    """Keys left and right of the query's own; -1 is no limit."""
    left = -1 if documents.window_tokens is None else documents.window_tokens - 1
    return {"window_size_left": left, "window_size_right": 0}


@contextmanager
def _same_bits_each_time() -> Iterator[None]:
    """torch reads from a setting of the whole process whether dQ is summed in one order, when the kernel is launched.

    The public function for it would import the compiler, and change its settings too.
    """
    before = torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
