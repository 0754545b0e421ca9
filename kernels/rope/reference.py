"""The definition: transformers' rotate-half formula in fp64 from beginning to end, rounded at the end.

Shape legend: B batch, N heads, L tokens, D head dim, R rotary dims.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope(
    q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor, attention_scaling: float
) -> tuple[Tensor, Tensor]:
    """(q, k), differentiable by autograd. An angle at position p is off by p * 1e-16 radians."""
    angles = position_ids.double().unsqueeze(-1) * inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1).unsqueeze(1)
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling

    def rotated(x: Tensor) -> Tensor:
        turned, kept = x.double().split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, kept], dim=-1).to(x.dtype)

    return rotated(q), rotated(k)
