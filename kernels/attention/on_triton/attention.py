"""Launches the kernels: `attention` with its gradient, and `attention_bwd` alone.

Shape legend: B batch, H query heads, G key/value heads, L query tokens, S key tokens, D head dim.
"""

from __future__ import annotations

# A kernel is launched with other arguments than its types describe.
# pyright: reportArgumentType=false, reportCallIssue=false
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..gradient import differentiable
from ..plan import LARGEST_TILE, AttentionPlan
from ..tiles import TileLists, TilePlan
from . import sizes as tile_sizes
from .backward import add_partial_sums, attention_backward_keys, attention_backward_queries, row_sums
from .forward import attention_forward

ROW_SUM_TILE = 64
LARGEST_STRIDE = 2**24
"""Of a token, in elements: places inside a tile are counted in 32 bits."""


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
    if q.dtype not in tile_sizes.DTYPES:
        raise ValueError(f"triton attention takes bfloat16, float16 or float32, got {q.dtype}")
    if q.shape[-1] not in tile_sizes.HEAD_DIMS:
        raise ValueError(f"triton attention takes a head_dim of 8, 16, 24 and so on up to 256, got {q.shape[-1]}")


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on torch's current device, which need not be that of their tensors."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    with _on_device_of(q):
        return _launch_forward(q, k, v, plan, scale)


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_describable(x) for x in (q, k, v))
    size = _sizes(q, plan).forward
    tiles = plan.tiles(size.M, size.N)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    attention_forward[(len(tiles.query_order) * q.shape[1],)](
        q, _tiled(k, size.N), _tiled(v, size.N), _tiled(out, size.M), lse, plan.padded_intervals, tiles.query_order,
        tiles.query_runs, *_lists(tiles, tiles.query_lists), *_strides(q), scale * math.log2(math.e), q.shape[1],
        k.shape[1], plan.plan_heads, q.shape[2], _padded_tokens(q), tiles.num_query_tiles,
        HAS_LISTS=tiles.query_lists is not None, **_constants(q, size),
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
    dout, q, k, v, out = (_describable(x) for x in (dout, q, k, v, out))
    with _on_device_of(q):
        row_terms = _row_terms(dout, out, lse, dlse)
        dk, dv = _backward_keys(dout, q, k, v, row_terms, plan, scale)
        return _backward_queries(dout, q, k, v, row_terms, plan, scale), dk, dv


def _row_terms(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    lse = lse.contiguous()
    padded = _padded_tokens(dout)
    row_terms = torch.empty(*dout.shape[:2], 2, padded, dtype=torch.float32, device=dout.device)
    grid = (padded // ROW_SUM_TILE * dout.shape[0] * dout.shape[1],)
    given = lse if dlse is None else dlse.float().contiguous()
    row_sums[grid](
        dout, out, lse, given, row_terms, *_strides(dout), *_strides(out), dout.shape[1], dout.shape[2], padded,
        D=dout.shape[3], D_PADDED=_padded(dout), M=ROW_SUM_TILE, HAS_DLSE=dlse is not None,
    )  # fmt: skip
    return row_terms


def _backward_keys(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, row_terms: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    size = _sizes(q, plan).keys
    tiles = plan.tiles(size.M, size.N)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    kv_heads = k.shape[1]
    partial_sums = torch.empty(
        max(1, tiles.num_slots), kv_heads, 2 * size.N, _padded(q), dtype=torch.float32, device=q.device
    )
    outputs = _tiled(dk, size.N), _tiled(dv, size.N), _tiled(partial_sums, size.N)
    attention_backward_keys[(len(tiles.key_items) * kv_heads,)](
        _tiled(q, size.M), k, v, _tiled(dout, size.M), _rows(row_terms, size.M), *outputs,
        _rows(plan.padded_intervals, size.M), tiles.key_items, tiles.key_runs, tiles.query_runs,
        *_lists(tiles, tiles.key_lists), *_strides(k), *_strides(v), scale, scale * math.log2(math.e), q.shape[1],
        kv_heads, plan.plan_heads, k.shape[2], tiles.num_query_tiles, tiles.num_key_tiles,
        HAS_LISTS=tiles.key_lists is not None, HAS_GAPS=tiles.has_gaps, **_constants(q, size),
    )  # fmt: skip
    if len(tiles.split_tiles):
        dk_tiles, dv_tiles, sums = outputs
        add_partial_sums[(len(tiles.split_tiles) * kv_heads,)](
            sums, dk_tiles, dv_tiles, tiles.split_tiles, kv_heads, tiles.num_key_tiles, D_PADDED=_padded(q), N=size.N,
            num_warps=8,
        )  # fmt: skip
    return dk, dv


def _backward_queries(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, row_terms: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    size = _sizes(q, plan).queries
    tiles = plan.tiles(size.M, size.N)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attention_backward_queries[(len(tiles.query_order) * q.shape[1],)](
        q, _tiled(k, size.N), _tiled(v, size.N), dout, row_terms, _tiled(dq, size.M), plan.padded_intervals,
        tiles.query_order, tiles.query_runs, *_lists(tiles, tiles.query_lists), *_strides(q), *_strides(dout), scale,
        scale * math.log2(math.e), q.shape[1], k.shape[1], plan.plan_heads, q.shape[2], _padded_tokens(q),
        tiles.num_query_tiles, HAS_LISTS=tiles.query_lists is not None, **_constants(q, size),
    )  # fmt: skip
    return dq


def _sizes(q: Tensor, plan: AttentionPlan) -> tile_sizes.AttentionSizes:
    return tile_sizes.choose_sizes(q.shape[3], q.dtype, None if plan.blocks is None else plan.blocks.block_tokens)


def _lists(tiles: TilePlan, lists: TileLists | None) -> tuple[Tensor, Tensor]:
    """Offsets and entries; without lists, tensors that the kernel does not read."""
    return (tiles.query_runs, tiles.query_runs) if lists is None else (lists.offsets, lists.entries)


def _tiled(x: Tensor, rows: int) -> TensorDescriptor:
    """Describes x [.., .., tokens, D] in tiles of `rows` tokens; columns up to the padded head dim read as 0."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, _padded(x)])


def _rows(x: Tensor, tokens: int) -> TensorDescriptor:
    """Describes x [.., .., fields, tokens] in pieces of one field."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, 1, tokens])


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


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
    return tile_sizes.padded_head_dim(x.shape[-1])


def _padded_tokens(q: Tensor) -> int:
    return triton.cdiv(q.shape[2], LARGEST_TILE) * LARGEST_TILE


def _describable(x: Tensor) -> Tensor:
    """x, or a copy that Hopper's tensor descriptors can describe: 16-byte steps, and no row that stands for several."""
    step = 16 // x.element_size()
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and x.stride(2) < LARGEST_STRIDE
    if fits and all(stride > 0 and stride % step == 0 for stride in x.stride()[:3]):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
