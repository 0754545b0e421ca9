"""One autograd function for every implementation that has a backward of its own.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plan import AttentionPlan

Forward = Callable[[Tensor, Tensor, Tensor, AttentionPlan, float], tuple[Tensor, Tensor]]
"""(out, lse) of q [B, H, L, D], k and v [B, G, S, D], a plan and a scale."""
Backward = Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
"""(dq, dk, dv) of `(dout, q, k, v, out, lse, dlse, plan, scale)`; of dout and dlse at least one is given."""


def differentiable(
    forward: Forward, backward: Backward, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L]) with gradients, once, through both."""
    return _Attention.apply(q, k, v, plan, scale, forward, backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scale: float,
        forward: Forward,
        backward: Backward,
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.run_backward = plan, scale, backward
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        dout, dlse = grad_outputs
        if dout is None and dlse is None:
            return (None,) * 7
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.run_backward(dout, q, k, v, out, lse, dlse, ctx.plan, ctx.scale), None, None, None, None
