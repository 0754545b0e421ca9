"""torch's flex attention, for any plan: a mask function over the plan's intervals, its tiles as the blocks to visit.

Dong et al., "Flex Attention" (arXiv:2412.05496; torch/nn/attention/flex_attention.py). Compiled on a GPU, once for each
shape: plans of one shape share what was compiled. On a CPU torch (2.13) has the forward alone, and uncompiled: that
holds all scores.

Shape legend: B batch, P plan heads, H query heads, G key/value heads, L query tokens, S key tokens, D head dim, Q query
blocks, K key blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as library
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from ..folding import fold
from ..plan import FIELDS, AttentionPlan

NAME = "flex"
BLOCK = 128
MOST_SHAPES = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_HEAD_DIM = 16
_MASKS: WeakKeyDictionary[AttentionPlan, BlockMask] = WeakKeyDictionary()
"""A mask is built once a batch, not once a layer."""


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log), differentiable by autograd in both.

    A query that sees nothing gives out 0 and lse -inf, and all its gradients are 0. Raises ValueError for what torch
    has no kernel for.
    """
    q_, k_, v_ = (fold(x, plan.plan_heads, q.shape[1]) for x in _checked(q, k, v))
    if plan not in _MASKS:
        _MASKS[plan] = block_mask(plan)
    # Past the limit torch would go on uncompiled, which holds all scores; `fullgraph` makes that an error.
    with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
        out, aux = _function(q.device.type)(
            q_,
            k_,
            v_,
            block_mask=_MASKS[plan],
            scale=scale,
            enable_gqa=q_.shape[1] != k_.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out.reshape(q.shape), aux.lse.reshape(q.shape[:3])


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `out` and `lse` may be merged ones. It costs a forward more. Raises ValueError as `attention` does.

    Flex attention differentiates from its own out and lse alone. With own probabilities p and w = exp(own lse - lse),
    the scores' gradient w p (dout.v - dout.out) is its own one, p (dout'.v - dout'.own out + dlse'), for dout' = w dout
    and dlse' = dout'.own out - w dout.out.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        own_out, own_lse = attention(q, k, v, plan, scale)
    working = own_lse.dtype
    # -inf minus -inf is NaN; a query that sees nothing here has no share.
    weight = (own_lse.detach() - lse).exp().masked_fill(own_lse == -torch.inf, 0.0)
    own_dout = (weight.unsqueeze(-1) * dout.to(working)).to(q.dtype)
    own_delta = (own_dout.to(working) * own_out.detach().to(working)).sum(dim=-1)
    dlse = own_delta - weight * (dout.to(working) * out.to(working)).sum(dim=-1)
    dq, dk, dv = torch.autograd.grad((own_out, own_lse), (q, k, v), (own_dout, dlse))
    return dq, dk, dv


def block_mask(plan: AttentionPlan) -> BlockMask:
    """The plan over B * P rows, the plan heads as a larger batch, with blocks of 128."""
    size = BLOCK if plan.blocks is None else min(BLOCK, plan.blocks.block_tokens)
    visited = _coarser(plan.tiles(size, size).visited().flatten(0, 1), BLOCK // size)
    if plan.q_tokens % BLOCK:
        visited[:, -1].clamp_(max=1)
    return BlockMask.from_kv_blocks(
        *_ordered(visited.unsqueeze(1) == 1),
        *_ordered(visited.unsqueeze(1) == 2),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(plan),
        seq_lengths=(plan.q_tokens, plan.k_tokens),
    )


def _checked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raises ValueError for what torch has no kernel for."""
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(f"implementation {NAME} has no backward on a CPU in torch {torch.__version__}: use auto")
        return q.detach(), k.detach(), v.detach()
    if q.dtype not in DTYPES:
        raise ValueError(f"implementation {NAME} takes bfloat16, float16 or float32 on a GPU, got {q.dtype}: use auto")
    if q.shape[-1] < LEAST_HEAD_DIM:
        raise ValueError(f"implementation {NAME} takes a head_dim of {LEAST_HEAD_DIM} or more, got {q.shape[-1]}")
    return q, k, v


@lru_cache(maxsize=2)
def _function(device_type: str) -> Any:
    if device_type == "cpu":
        return library.flex_attention
    return torch.compile(library.flex_attention, dynamic=False, fullgraph=True)


def _visible(plan: AttentionPlan) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask function: `plan.visible()` for one query and key. It holds the plan's tensors, not the plan."""
    lo, hi, glo, ghi = (getattr(plan, name).flatten(0, 1).contiguous() for name in FIELDS)
    edge, listed = 0, None
    if plan.blocks is not None:
        edge = plan.blocks.block_tokens
        listed = plan.blocks.to_map(-(-plan.k_tokens // edge)).flatten(0, 1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (lo[row, query] <= key) & (key <= hi[row, query])
        if listed is not None:
            own = own & listed[row, query // edge, key // edge]
        return own | ((glo[row, query] <= key) & (key < ghi[row, query]))

    return visible


def _coarser(visited: Tensor, times: int) -> Tensor:
    """int8 [B * P, Q, K] of blocks `times` as long: 0 if no part is visited, 2 if all are full, else 1."""
    if times == 1:
        return visited
    rows, queries, keys = visited.shape
    # Blocks that reach beyond the last query or key are partial: flex attention expects no full ones there.
    padded = torch.nn.functional.pad(visited, (0, -keys % times, 0, -queries % times))
    parts = padded.view(rows, -(-queries // times), times, -1, times)
    most, least = parts.amax((2, 4)), parts.amin((2, 4))
    return torch.where(most == 0, most, least.clamp(min=1))


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(counts int32 [..., Q], indices int32 [..., Q, K]): the chosen key blocks first, ascending."""
    return chosen.sum(dim=-1).int(), chosen.int().argsort(dim=-1, descending=True, stable=True).int()
