"""The definition: dense attention over `plan.visible()` alone, in the precision of its inputs. Slow, quadratic memory.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import AttentionPlan


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log), differentiable by autograd in both.

    A query that sees nothing gives out 0 and lse -inf, and all its gradients are 0. Half precision is worked in fp32.
    """
    working = torch.promote_types(q.dtype, torch.float32)
    scores = _scores(q.to(working), k.to(working), plan, scale)
    lse = scores.logsumexp(dim=-1)
    # -inf minus -inf is NaN; with 0 in its place the probabilities of an empty row come out as 0.
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = probabilities @ _repeat_heads(v.to(working), q.shape[1])
    return out.to(q.dtype), lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), written out by hand from out and lse, which may be those of a larger, merged attention."""
    working = torch.promote_types(q.dtype, torch.float32)
    dout_, q_, out_ = (tensor.to(working) for tensor in (dout, q, out))
    k_, v_ = (_repeat_heads(tensor.to(working), q.shape[1]) for tensor in (k, v))
    lse_ = lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)
    probabilities = (_scores(q_, k.to(working), plan, scale) - lse_).exp()
    dscores = probabilities * (dout_ @ v_.mT - (dout_ * out_).sum(dim=-1, keepdim=True))
    grouped = (k.shape[1], q.shape[1] // k.shape[1])
    dq = dscores @ k_ * scale
    dk = (dscores.mT @ q_ * scale).unflatten(1, grouped).sum(dim=2)
    dv = (probabilities.mT @ dout_).unflatten(1, grouped).sum(dim=2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """[B, H, L, S]; -inf where the key is not visible."""
    hidden = _repeat_heads(~plan.visible(), q.shape[1])
    return (q @ _repeat_heads(k, q.shape[1]).mT * scale).masked_fill(hidden, -torch.inf)


def _repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, G, ...] to [B, H, ...]: consecutive query heads share a key/value head, or a plan head."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)
