"""The definition: all logits in fp64, torch's cross-entropy.

Shape legend: N tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] in fp64, differentiable by autograd."""
    logits = hidden.double() @ weight.double().T
    return functional.cross_entropy(logits, targets, reduction="none")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, reduction: str
) -> Tensor:
    """Of the tokens given, all of which count; rounded to fp32 unless hidden is fp64."""
    losses = token_losses(hidden, weight, targets) * token_weights.double()
    if reduction == "mean":
        total = token_weights.double().sum()
        losses = losses.sum() / torch.where(total == 0, 1.0, total)
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(torch.promote_types(hidden.dtype, torch.float32))
