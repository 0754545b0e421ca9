"""Heads with one mask side by side: a plan with several plan heads as a larger batch with one."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(x: Tensor, plan_heads: int, num_heads: int) -> Tensor:
    """[B, N, ...] to [B * P, N / P, ...].

    Key/value heads that queries of several plan heads share are repeated to the `num_heads` of the queries first.
    """
    if plan_heads == 1:
        return x
    if x.shape[1] % plan_heads:
        x = x.repeat_interleave(num_heads // x.shape[1], dim=1)
    return x.unflatten(1, (plan_heads, -1)).flatten(0, 1)


def unfold(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `fold` for gradients, `shape` [B, N, T, D]: those of repeated heads are added up."""
    num_copies = x.numel() // shape.numel()
    if num_copies == 1:
        return x.reshape(shape)
    return x.reshape(shape[0], shape[1], num_copies, *shape[2:]).sum(dim=2)
