"""Merges attention over disjoint sets of keys into attention over their union.

Shape legend: B batch, H query heads, L query tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_branches(branches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (out [B, H, L, D], lse [B, H, L]) of a softmax over all branches' keys, exact, merged in fp32 or better.

    Each branch is an (out, lse) of the same queries, and no key may be in two of them. Differentiable in every out
    and lse. A query that no branch sees gives out 0, lse -inf and zero gradients.

    Raises ValueError if there is no branch or their shapes differ.
    """
    if not branches:
        raise ValueError("merge_branches needs at least one (out, lse)")
    shapes = [(list(out.shape), list(lse.shape)) for out, lse in branches]
    if any(shape != shapes[0] for shape in shapes) or shapes[0][0][:-1] != shapes[0][1]:
        raise ValueError(f"branches must agree in the shapes of out [B, H, L, D] and lse [B, H, L], got {shapes}")
    working = torch.promote_types(branches[0][0].dtype, torch.float32)
    lses = torch.stack([lse.to(working) for _, lse in branches])
    highest = lses.detach().amax(dim=0)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    total = (lses - highest).exp().sum(dim=0)
    is_empty = total == 0
    # log(0) would be right in the value and NaN in the gradient.
    finite = total.masked_fill(is_empty, 1.0).log() + highest
    weights = (lses - finite).exp().unsqueeze(-1)
    outs = torch.stack([out.to(working) for out, _ in branches])
    return (weights * outs).sum(dim=0).to(branches[0][0].dtype), finite.masked_fill(is_empty, -torch.inf)
