"""Launches the kernels: `attention` with its gradient, and `attention_bwd` alone.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

# A kernel is launched with other arguments than its types describe.
# pyright: reportArgumentType=false, reportCallIssue=false
import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..gradient import differentiable
from ..plan import AttentionPlan
from ..tiles import TileLists, TilePlan
from . import sizes as tile_sizes
from .backward import add_partial_sums, attention_backward_keys, attention_backward_queries, row_sums
from .forward import attention_forward

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROW_SUM_TILE = 64


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log, fp32), differentiable once in both.

    A query that sees nothing gives out 0 and lse -inf, and all its gradients are 0.
    """
    check(q)
    return differentiable(_forward, _backward, q, k, v, plan, scale)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `out` and `lse` may be merged ones."""
    check(q)
    return _backward(dout, q, k, v, out, lse, None, plan, scale)


def check(q: Tensor) -> None:
    """Raises ValueError for what the kernels are not built for."""
    if q.dtype not in DTYPES:
        raise ValueError(f"triton attention takes bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"triton attention takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]}")


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    size = _sizes(q, plan).forward
    tiles = plan.tiles(size.M, size.N)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    attention_forward[(len(tiles.query_order) * q.shape[1],)](
        q, k, v, out, lse, *_intervals(plan), tiles.query_order, tiles.query_runs, *_lists(tiles, tiles.query_lists),
        *_strides(q), *_strides(k), *_strides(v), *_strides(out), scale * math.log2(math.e), *_counts(q, k, plan),
        tiles.num_query_tiles, HAS_LISTS=tiles.query_lists is not None, **_constants(q, size),
    )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout = torch.zeros_like(out) if dout is None else dout
    dout, q, k, v, out = (_unit_stride(x) for x in (dout, q, k, v, out))
    delta, lse_log2 = _row_sums(dout, out, lse, dlse)
    dk, dv = _backward_keys(dout, q, k, v, delta, lse_log2, plan, scale)
    return _backward_queries(dout, q, k, v, delta, lse_log2, plan, scale), dk, dv


def _row_sums(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor]:
    lse = lse.contiguous()
    delta, lse_log2 = torch.empty_like(lse), torch.empty_like(lse)
    grid = (triton.cdiv(dout.shape[2], ROW_SUM_TILE), dout.shape[0] * dout.shape[1])
    given = lse if dlse is None else dlse.float().contiguous()
    row_sums[grid](
        dout, out, lse, given, delta, lse_log2, *_strides(dout), *_strides(out), dout.shape[1], dout.shape[2],
        D=dout.shape[3], D_PADDED=_padded(dout), M=ROW_SUM_TILE, HAS_DLSE=dlse is not None,
    )  # fmt: skip
    return delta, lse_log2


def _backward_keys(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse_log2: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    size = _sizes(q, plan).keys
    tiles = plan.tiles(size.M, size.N)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    kv_heads = k.shape[1]
    partial_sums = torch.empty(
        max(1, tiles.num_slots * kv_heads * 2 * size.N * _padded(q)), dtype=torch.float32, device=q.device
    )
    attention_backward_keys[(len(tiles.key_items) * kv_heads,)](
        q, k, v, dout, lse_log2, delta, dk, dv, partial_sums, *_intervals(plan), tiles.key_items, tiles.key_runs,
        tiles.query_runs, *_lists(tiles, tiles.key_lists), *_strides(q), *_strides(k), *_strides(v), *_strides(dout),
        scale, scale * math.log2(math.e), *_counts(q, k, plan), tiles.num_query_tiles, tiles.num_key_tiles,
        HAS_LISTS=tiles.key_lists is not None, **_constants(q, size),
    )  # fmt: skip
    if len(tiles.split_tiles):
        add_partial_sums[(len(tiles.split_tiles) * kv_heads,)](
            partial_sums, dk, dv, tiles.split_tiles, kv_heads, k.shape[2], tiles.num_key_tiles,
            D=q.shape[3], D_PADDED=_padded(q), N=size.N,
        )  # fmt: skip
    return dk, dv


def _backward_queries(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse_log2: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    size = _sizes(q, plan).queries
    tiles = plan.tiles(size.M, size.N)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attention_backward_queries[(len(tiles.query_order) * q.shape[1],)](
        q, k, v, dout, lse_log2, delta, dq, *_intervals(plan), tiles.query_order, tiles.query_runs,
        *_lists(tiles, tiles.query_lists), *_strides(q), *_strides(k), *_strides(v), *_strides(dout), scale,
        scale * math.log2(math.e), *_counts(q, k, plan), tiles.num_query_tiles,
        HAS_LISTS=tiles.query_lists is not None, **_constants(q, size),
    )  # fmt: skip
    return dq


def _sizes(q: Tensor, plan: AttentionPlan) -> tile_sizes.AttentionSizes:
    return tile_sizes.choose_sizes(q.shape[3], q.dtype, None if plan.blocks is None else plan.blocks.block_tokens)


def _intervals(plan: AttentionPlan) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in (plan.lo, plan.hi, plan.glo, plan.ghi))


def _lists(tiles: TilePlan, lists: TileLists | None) -> tuple[Tensor, Tensor]:
    """Offsets and entries; without lists, tensors that the kernel does not read."""
    return (tiles.query_runs, tiles.query_runs) if lists is None else (lists.offsets, lists.entries)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _counts(q: Tensor, k: Tensor, plan: AttentionPlan) -> tuple[int, ...]:
    return q.shape[1], k.shape[1], plan.plan_heads, q.shape[2], k.shape[2]


def _constants(q: Tensor, size: tile_sizes.KernelSizes) -> dict[str, Any]:
    return {
        "D": q.shape[3],
        "D_PADDED": _padded(q),
        "M": size.M,
        "N": size.N,
        "IEEE": q.dtype == torch.float32,
        "num_warps": size.num_warps,
        "num_stages": size.num_stages,
    }


def _padded(x: Tensor) -> int:
    return triton.next_power_of_2(x.shape[-1])


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read the head dim as contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
