"""The entry point: checks shapes, picks an implementation, never falls back silently.

Shape legend: N tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["auto", "chunked", "liger", "reference"]
Reduction = Literal["sum", "mean", "none"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_tokens: int = 2048,
    reduction: Reduction = "sum",
    implementation: Implementation = "auto",
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T, of which only `chunk_tokens` rows exist at a time.

    hidden is [N, D], weight [V, D] of the same floating dtype, targets [N] int64: the word that follows each hidden
    state, so the caller shifts. Where `loss_mask` [N], bool, is False a token is left out: nothing is computed for it,
    its target is not read, its loss and gradient are 0. `token_weights` [N], floating and without gradient, multiply
    the losses; a weight of 0 costs as much as any other.

    `reduction`: "sum" of weighted losses; "mean", the same over the sum of weights (0 where that is 0, or where no
    token is left); "none", weighted losses [N], whose backward pass makes the logits again. In fp32, or fp64 for fp64
    input. Gradients flow once into hidden and weight; a factor on the loss is best put in `token_weights`. Memory
    beside the arguments: chunk_tokens x V in fp32, and for "sum" and "mean" the gradients, from the forward pass on,
    that of weight in fp32.

    `implementation`: "chunked" (= "auto") is plain torch; "liger" is liger-kernel's, on a GPU, without token weights
    or "none"; "reference" makes all logits in fp64. Under ZeRO-3 the weight must be gathered around the call and its
    backward pass. Raises ValueError for an unknown one, one that cannot run, or arguments that do not fit.
    """
    _check(hidden, weight, targets, loss_mask, token_weights, chunk_tokens, reduction)
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be one of {', '.join(get_args(Implementation))}, got {implementation!r}")
    if implementation == "liger" and (token_weights is not None or reduction == "none"):
        raise ValueError("implementation liger takes no token_weights and no reduction 'none': use chunked")
    kept = None if loss_mask is None else loss_mask.nonzero().squeeze(1)
    working = torch.promote_types(hidden.dtype, torch.float32)
    shares = torch.ones(len(hidden), device=hidden.device) if token_weights is None else token_weights
    shares = shares.to(working)
    num_tokens = len(hidden)
    if kept is not None:
        hidden, targets, shares = hidden[kept], targets[kept], shares[kept]
    _check_targets(targets, len(weight))
    losses = _computed(hidden, weight, targets, shares, chunk_tokens, reduction, implementation)
    if reduction == "none" and kept is not None:
        return losses.new_zeros(num_tokens).index_put((kept,), losses)
    return losses


def _computed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: Tensor,
    chunk_tokens: int,
    reduction: Reduction,
    implementation: Implementation,
) -> Tensor:
    if implementation == "reference":
        from . import reference

        return reference.linear_cross_entropy(hidden, weight, targets, shares, reduction)
    if implementation == "liger":
        from . import liger

        return liger.linear_cross_entropy(hidden, weight, targets, reduction)
    from . import chunked

    if reduction == "none":
        return chunked.token_losses(hidden, weight, targets, chunk_tokens) * shares
    if reduction == "mean":
        total = shares.sum()
        shares = shares / torch.where(total == 0, 1.0, total)
    return chunked.weighted_sum(hidden, weight, targets, shares, chunk_tokens)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_mask: Tensor | None,
    token_weights: Tensor | None,
    chunk_tokens: int,
    reduction: Reduction,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(
            "hidden must be [tokens, width] and weight [vocabulary, width], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if loss_mask is not None and loss_mask.dtype != torch.bool:
        raise ValueError(f"loss_mask must be bool, got {loss_mask.dtype}: token_weights take numbers")
    if token_weights is not None and (not token_weights.is_floating_point() or token_weights.requires_grad):
        raise ValueError("token_weights must be floating and without gradient; with reduction 'none' multiply outside")
    for name, tensor in (("targets", targets), ("loss_mask", loss_mask), ("token_weights", token_weights)):
        if tensor is not None and tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must be [{len(hidden)}] to fit hidden, got {list(tensor.shape)}")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must lie on {hidden.device} as hidden does, got {tensor.device}")
    if weight.device != hidden.device:
        raise ValueError(f"weight must lie on {hidden.device} as hidden does, got {weight.device}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be 1 or more, got {chunk_tokens}")
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if not len(targets):
        return
    lowest, highest = torch.stack(targets.aminmax()).tolist()
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"targets must be 0 to {vocabulary - 1} where they count, got {wrong}: mask others out")
