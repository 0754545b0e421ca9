"""Exact attention that visits visible keys only: dense attention on each piece of the plan, merged by log-sum-exp.

Linear in the visible area for plans with long runs (causal, packed documents, anchor, shared prefixes); no mask is
ever built. Keys outside a query's pieces are not read. See `pieces.py` for how a plan is cut.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rectangle
from .folding import fold, unfold
from .gradient import differentiable
from .pieces import Piece
from .plan import AttentionPlan


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log), differentiable once in both.

    A query that sees nothing gives out 0 and lse -inf, and all its gradients are 0.
    """
    q_, k_, v_ = (fold(x, plan.plan_heads, q.shape[1]) for x in (q, k, v))
    out, lse = differentiable(_forward, _gradients, q_, k_, v_, plan, scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each summed over the pieces in fp32 or better; `out` and `lse` may be merged ones."""
    dout_, q_, k_, v_, out_, lse_ = (fold(x, plan.plan_heads, q.shape[1]) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = _backward(dout_, q_, k_, v_, out_, lse_, plan, scale)
    return dq.reshape(q.shape), unfold(dk, k.shape), unfold(dv, v.shape)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (_unit_stride(tensor) for tensor in (dout, q, k, v, out))
    dq, dk, dv = (torch.zeros(x.shape, dtype=_working_dtype(x), device=x.device) for x in (q, k, v))
    for piece in plan.pieces:
        rows, queries, keys = _slices(piece)
        own = (rows, slice(None), queries)
        seen = (rows, slice(None), keys)
        gradients = rectangle.backward(dout[own], q[own], k[seen], v[seen], out[own], lse[own], piece.causal, scale)
        dq[own] += gradients[0]
        dk[seen] += gradients[1]
        dv[seen] += gradients[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _gradients(
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
        dq, dk, dv = _backward(dout, q, k, v, out, lse, plan, scale)
    if dlse is not None:
        dq_lse, dk_lse = _lse_bwd(dlse, q, k, lse, plan, scale)
        dq = dq_lse if dq is None else dq + dq_lse
        dk = dk_lse if dk is None else dk + dk_lse
    return dq, dk, dv


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_unit_stride(tensor) for tensor in (q, k, v))
    working = _working_dtype(q)
    out = torch.zeros(q.shape, dtype=working, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=working, device=q.device)
    for piece in plan.pieces:
        rows, queries, keys = _slices(piece)
        own = (rows, slice(None), queries)
        seen = (rows, slice(None), keys)
        piece_out, piece_lse = rectangle.forward(q[own], k[seen], v[seen], piece.causal, scale)
        # Queries without an earlier piece hold out 0 and lse -inf, which exp turns to 0; piece_lse is finite.
        merged = torch.logaddexp(lse[own], piece_lse)
        kept, added = ((part - merged).exp().unsqueeze(-1) for part in (lse[own], piece_lse))
        out[own], lse[own] = out[own] * kept + piece_out * added, merged
    return out.to(q.dtype), lse


def _lse_bwd(
    dlse: Tensor, q: Tensor, k: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """(dq, dk) of sum(dlse * lse): the gradient of the scores is dlse times the probabilities.

    That is the ordinary backward for values that are all the first unit vector, dout = dlse times it, and out = 0.
    """
    unit = torch.zeros(k.shape[-1], dtype=k.dtype, device=k.device)
    unit[0] = 1
    dout = dlse.to(q.dtype).unsqueeze(-1) * unit
    dq, dk, _ = _backward(dout, q, k, unit.expand(k.shape), torch.zeros_like(q), lse, plan, scale)
    return dq, dk


def _slices(piece: Piece) -> tuple[slice, slice, slice]:
    return (
        slice(piece.row_start, piece.row_stop),
        slice(piece.q_start, piece.q_stop),
        slice(piece.k_start, piece.k_stop),
    )


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unit_stride(x: Tensor) -> Tensor:
    """torch's fused attention reads the head dim as contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
