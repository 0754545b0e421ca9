"""The rotation in plain torch, worked in fp32 (fp64 for fp64 input) and rounded once.

Shape legend: B batch, N heads, L tokens, D head dim, R rotary dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .angles import cos_and_sin


def rotate(
    q: Tensor, k: Tensor, position_ids: Tensor, frequencies: Tensor, scaling: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by their angles, or back where `inverse`, times `scaling`."""
    working = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (x.unsqueeze(1) * scaling for x in cos_and_sin(position_ids, frequencies, working))
    sin = -sin if inverse else sin
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)
    out = torch.empty_like(x)
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
