"""The loss by chunks of tokens in plain torch: one chunk's logits exist at a time, worked in place in fp32.

A sum's gradients are formed in the forward pass, while the chunk's logits are at hand (as Liger does,
arXiv:2410.10989): three products in all, and the backward pass only scales. Kept until then are the gradient of hidden
in its own dtype and that of weight in fp32. They are formed for token weights brought to at most 1, as 1 / tokens, a
usual weight, would be lost in fp16, and scaled at the end by a power of two: a gradient rounded to bf16 and then
multiplied by 1.004 is biased by 0.2 percent, as all of it is rounded up. So what multiplies the loss belongs in the
token weights. Losses token by token have no gradient before each one's share
is known, so their backward pass makes the logits again: four products.

Products are worked by slices of the vocabulary. Where a device multiplies bf16 into fp32 (CUDA) the slices bound the
temporary of weight's gradient; elsewhere they bound the fp32 copy of the weights.

fp64 input is worked in fp64. Shape legend: N tokens, D hidden width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VOCABULARY_SLICE = 16384


def weighted_sum(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, chunk_tokens: int) -> Tensor:
    """The sum of losses times weights, a scalar; differentiable once in hidden and weight."""
    forms_grads = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _WeightedSum.apply(hidden, weight, targets, token_weights, chunk_tokens, forms_grads)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """[N]; differentiable once in hidden and weight."""
    return _TokenLosses.apply(hidden, weight, targets, chunk_tokens)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        token_weights: Tensor,
        chunk_tokens: int,
        forms_grads: bool,
    ) -> Tensor:
        if not forms_grads:
            losses, _, _ = _losses(hidden, weight, targets, None, chunk_tokens, False, False)
            return (losses * token_weights).sum()
        scale = _scale_of(token_weights)
        losses, dhidden, dweight = _losses(
            hidden, weight, targets, token_weights / scale, chunk_tokens, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(scale, dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return (losses * token_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        scale, dhidden, dweight = ctx.saved_tensors
        factor = scale * grad_outputs[0]
        dhidden = None if dhidden is None else _scaled(dhidden, factor, dhidden.dtype)
        dweight = None if dweight is None else _scaled(dweight, factor, ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk_tokens = chunk_tokens
        return _losses(hidden, weight, targets, None, chunk_tokens, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (dlosses,) = grad_outputs
        hidden, weight, targets = ctx.saved_tensors
        scale = _scale_of(dlosses)
        needed = ctx.needs_input_grad[:2]
        _, dhidden, dweight = _losses(hidden, weight, targets, dlosses / scale, ctx.chunk_tokens, *needed)
        dhidden = None if dhidden is None else _scaled(dhidden, scale, hidden.dtype)
        dweight = None if dweight is None else _scaled(dweight, scale, weight.dtype)
        return dhidden, dweight, None, None


def _losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shares: Tensor | None,
    chunk_tokens: int,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [N]; the gradients of the sum of losses times shares where needed, that of weight not rounded yet."""
    working = torch.promote_types(hidden.dtype, torch.float32)
    losses = torch.empty(len(hidden), dtype=working, device=hidden.device)
    dhidden = torch.empty_like(hidden) if needs_dhidden else None
    dweight = torch.zeros(weight.shape, dtype=working, device=weight.device) if needs_dweight else None
    largest = losses.new_ones(()) if shares is None else _largest(shares)
    with torch.autocast(hidden.device.type, enabled=False):
        for begin in range(0, len(hidden), chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            shares_C = None if shares is None else shares[rows] / largest
            # A call each, so that a chunk's logits are gone before the next ones are made.
            losses[rows], dhidden_CD = _chunk(hidden[rows], weight, targets[rows], shares_C, needs_dhidden, dweight)
            if dhidden is not None and dhidden_CD is not None:
                dhidden[rows] = dhidden_CD.mul_(largest)
    return losses, dhidden, None if dweight is None else dweight.mul_(largest)


def _chunk(
    hidden_CD: Tensor,
    weight: Tensor,
    targets_C: Tensor,
    shares_C: Tensor | None,
    needs_dhidden: bool,
    dweight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Losses [C] and the gradient of hidden [C, D], both unrounded; that of weight is added to `dweight`.

    Shares join after the logits' gradients p - 1 and p: in bf16 a share times -1 would round the same way for all
    targets, a bias of 0.2 percent. Equal shares are 1 here, so that hidden times them is not rounded.
    """
    working = torch.promote_types(hidden_CD.dtype, torch.float32)
    targets_C1 = targets_C.unsqueeze(1)
    exponentials_CV, totals_C1, losses_C = _exponentials(hidden_CD, weight, targets_C1, working)
    if shares_C is None:
        return losses_C, None
    shares_C1 = shares_C.unsqueeze(1)
    dlogits_CV = exponentials_CV.div_(totals_C1).scatter_add_(1, targets_C1, -torch.ones_like(totals_C1))
    if dweight is not None:
        shared_CD = hidden_CD * shares_C1
        for words in _slices(len(weight)):
            dweight[words] += _product(dlogits_CV[:, words].T, shared_CD, hidden_CD.dtype)
    return losses_C, _through_weight(dlogits_CV, weight).mul_(shares_C1) if needs_dhidden else None


def _exponentials(
    hidden_CD: Tensor, weight: Tensor, targets_C1: Tensor, working: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - their maximum) [C, V], its row sums [C, 1], losses [C]; one [C, V] is made, and worked in place."""
    logits_CV = torch.empty(len(hidden_CD), len(weight), dtype=working, device=hidden_CD.device)
    for words in _slices(len(weight)):
        logits_CV[:, words] = _product(hidden_CD, weight[words].T, hidden_CD.dtype)
    logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
    of_targets_C1 = logits_CV.gather(1, targets_C1)
    totals_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
    return logits_CV, totals_C1, (totals_C1.log() - of_targets_C1).squeeze(1)


def _through_weight(dlogits_CV: Tensor, weight: Tensor) -> Tensor:
    """[C, D], added up over the vocabulary's slices before it is rounded."""
    dhidden_CD = dlogits_CV.new_zeros(len(dlogits_CV), weight.shape[1])
    for words in _slices(len(weight)):
        dhidden_CD += _product(dlogits_CV[:, words], weight[words], weight.dtype)
    return dhidden_CD


def _slices(vocabulary: int) -> list[slice]:
    return [slice(begin, begin + VOCABULARY_SLICE) for begin in range(0, vocabulary, VOCABULARY_SLICE)]


def _product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y in fp32, or fp64 where one is; on CUDA from operands rounded to `dtype` if that is lower (unmeasured)."""
    if x.device.type == "cuda" and dtype.itemsize < 4:
        return torch.mm(x.to(dtype), y.to(dtype), out_dtype=torch.float32)
    working = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(working) @ y.to(working)


def _largest(shares: Tensor) -> Tensor:
    """The largest magnitude, 1 where there is none, as a scalar tensor."""
    largest = shares.abs().amax() if len(shares) else shares.new_zeros(())
    return torch.where(largest == 0, 1.0, largest)


def _scale_of(shares: Tensor) -> Tensor:
    """The power of two above the largest magnitude, 1 where there is none, as a scalar tensor."""
    largest = _largest(shares)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a scalar tensor, in the factor's precision: a tensor without dims would first be rounded to x's dtype."""
    return torch.mul(x, factor.view(1, 1), out=torch.empty_like(x, dtype=dtype))
