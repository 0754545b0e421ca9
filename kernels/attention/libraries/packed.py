"""Attention by kernels that read a batch as one packed row of documents: layouts, gradients, checks.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim; packed: T = B * L
queries, U = B * S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..gradient import differentiable
from ..plan import AttentionPlan
from .documents import Documents, documents_of

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 257, 8)


@dataclass(frozen=True)
class PackedKernels:
    """A library's forward and backward."""

    name: str
    """Of the implementation, for errors."""
    forward: Callable[[Tensor, Tensor, Tensor, Documents, float], tuple[Tensor, Tensor]]
    """(out [T, H, D], lse [H, T] in natural log) of q [T, H, D], k and v [U, G, D], documents and a scale."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(dq, dk, dv) of `(dout, q, k, v, out, lse, documents, scale)`, packed; out and lse may be merged ones."""


def check(name: str, q: Tensor, capabilities: Container[int], head_dims: Container[int] = HEAD_DIMS) -> None:
    """Raises ValueError for what the kernels are not built for. `capabilities` are major ones: 9 is Hopper."""
    if q.device.type != "cuda":
        raise ValueError(f"implementation {name} needs a GPU, but q is on {q.device}: use auto")
    major, minor = torch.cuda.get_device_capability(q.device)
    if major not in capabilities:
        raise ValueError(f"implementation {name} does not run on a GPU of compute capability {major}.{minor}: use auto")
    if q.dtype not in DTYPES:
        raise ValueError(f"implementation {name} takes bfloat16 or float16, got {q.dtype}: use auto")
    if q.shape[-1] not in head_dims:
        raise ValueError(f"implementation {name} takes no head_dim of {q.shape[-1]} on this GPU: use auto")


def attention(
    kernels: PackedKernels, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log, fp32), differentiable once in both.

    Raises ValueError for a plan that is not documents and a window.
    """
    return differentiable(partial(_forward, kernels), partial(_gradients, kernels), q, k, v, plan, scale)


def attention_bwd(
    kernels: PackedKernels,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `out` and `lse` may be merged ones. Raises ValueError as `attention` does."""
    documents = documents_of(plan, kernels.name)
    packed_lse = lse.transpose(0, 1).flatten(1).contiguous()
    gradients = kernels.backward(*(_pack(x) for x in (dout, q, k, v, out)), packed_lse, documents, scale)
    dq, dk, dv = (_unpack(gradient, plan.batch) for gradient in gradients)
    return dq, dk, dv


def _forward(
    kernels: PackedKernels, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = kernels.forward(_pack(q), _pack(k), _pack(v), documents_of(plan, kernels.name), scale)
    return _unpack(out, plan.batch), lse.unflatten(1, (plan.batch, -1)).transpose(0, 1)


def _gradients(
    kernels: PackedKernels,
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v for gradients of out and of lse, where given."""
    dq = dk = dv = None
    if dout is not None:
        dq, dk, dv = attention_bwd(kernels, dout, q, k, v, out, lse, plan, scale)
    if dlse is not None:
        # The scores' gradient is dlse times the probabilities: that of values which are all the first unit vector, for
        # dout = dlse times it, and out = 0.
        unit = torch.zeros_like(v)
        unit[..., 0] = 1
        first = dlse.to(q.dtype).unsqueeze(-1) * unit[:1, :1, :1]
        dq_lse, dk_lse, _ = attention_bwd(kernels, first, q, k, unit, torch.zeros_like(q), lse, plan, scale)
        dq = dq_lse if dq is None else dq + dq_lse
        dk = dk_lse if dk is None else dk + dk_lse
    return dq, dk, dv


def _pack(x: Tensor) -> Tensor:
    """[B, N, T, D] to [B * T, N, D], with the head dim contiguous as the kernels read it; of one row a view."""
    packed = x.transpose(1, 2).flatten(0, 1)
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _unpack(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_pack`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
