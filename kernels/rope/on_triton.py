"""The rotation of q and k in one Triton kernel; its backward is the same kernel, turning back.

A program works out cos and sin of a tile of tokens once and turns every head of q and of k by them. It reads and writes
each element once, so that memory sets its time; how long that is on a GPU is unmeasured. Dims that are not turned are
copied by torch.

Shape legend: B batch, H query heads, G key heads, L tokens, D head dim, R rotary dims, M tokens of a tile.
"""

from __future__ import annotations

# The language is not the one that its types describe: constants are constexpr, arguments are not what is annotated.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN201
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_OF_A_TILE = 16
NUM_WARPS = 4
RADIANS_A_STEP = tl.constexpr(6.283185307179586 / 2**32)
"""Of the upper half of an angle."""


def rotate(
    q: Tensor, k: Tensor, position_ids: Tensor, frequencies: Tensor, scaling: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """q and k turned by their angles, or back where `inverse`, times `scaling`."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = _like(q), _like(k)
    batch, num_heads, num_tokens, _ = q.shape
    positions = position_ids.expand(batch, num_tokens)
    num_tiles = triton.cdiv(num_tokens, TOKENS_OF_A_TILE)
    if batch * num_tiles == 0:
        return q_out, k_out
    # A kernel starts on torch's current device, which need not be that of its tensors.
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        rotate_heads[(batch * num_tiles,)](
            q, k, q_out, k_out, positions, frequencies.contiguous(), *_strides(q), *_strides(k), *_strides(q_out),
            *_strides(k_out), positions.stride(0), positions.stride(1), scaling, num_tokens, num_tiles,
            **constants(num_heads, k.shape[1], len(frequencies)), INVERSE=inverse, num_warps=NUM_WARPS,
        )  # fmt: skip
    for x, out in ((q, q_out), (k, k_out)):
        out[..., 2 * len(frequencies) :] = x[..., 2 * len(frequencies) :]
    return q_out, k_out


def constants(num_heads: int, kv_heads: int, num_pairs: int) -> dict[str, int]:
    """What the kernel is compiled for, beside the direction.

    Numbers of heads, as the interpreter of Triton 3.6 loops over no others; a model has one pair of them.
    """
    padded = triton.next_power_of_2(num_pairs)
    return {
        "NUM_HEADS": num_heads,
        "KV_HEADS": kv_heads,
        "PAIRS": num_pairs,
        "PAIRS_PADDED": padded,
        "M": TOKENS_OF_A_TILE,
    }


def _like(x: Tensor) -> Tensor:
    """Uninitialised, in the memory layout of x where that is dense and has contiguous columns."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


@triton.jit
def rotate_heads(
    q, k, q_out, k_out, position_ids, frequencies, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_qob, stride_qoh, stride_qol, stride_kob, stride_koh, stride_kol, stride_pb, stride_pl, scaling,
    num_tokens, num_tiles, NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr, M: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One tile of tokens: all heads of q and k."""
    program = tl.program_id(0)
    b = (program // num_tiles).to(tl.int64)
    tokens = ((program % num_tiles) * M + tl.arange(0, M)).to(tl.int64)
    pairs = tl.arange(0, PAIRS_PADDED)
    positions = tl.load(position_ids + b * stride_pb + tokens * stride_pl, mask=tokens < num_tokens, other=0)
    steps = positions.to(tl.int64)[:, None] * tl.load(frequencies + pairs, mask=pairs < PAIRS, other=0)[None, :]
    cos, sin = cos_and_sin(steps)
    cos, sin = cos * scaling, sin * scaling
    if INVERSE:
        sin = -sin
    for head in range(0, NUM_HEADS):
        rotate_tile(
            q + b * stride_qb + tl.cast(head, tl.int64) * stride_qh, stride_ql,
            q_out + b * stride_qob + tl.cast(head, tl.int64) * stride_qoh, stride_qol, tokens, num_tokens, cos, sin,
            PAIRS, PAIRS_PADDED,
        )  # fmt: skip
    for head in range(0, KV_HEADS):
        rotate_tile(
            k + b * stride_kb + tl.cast(head, tl.int64) * stride_kh, stride_kl,
            k_out + b * stride_kob + tl.cast(head, tl.int64) * stride_koh, stride_kol, tokens, num_tokens, cos, sin,
            PAIRS, PAIRS_PADDED,
        )  # fmt: skip


@triton.jit
def cos_and_sin(steps):
    """Of angles in steps of 2^-64 turn, int64, off by 2e-7 at most.

    Written out because the library's spill registers for the sake of large angles, which are no longer there: the
    product that made `steps` has wrapped. The nearest quarter turn is taken off in integers; the rest, at most an
    eighth of a turn, goes through Taylor polynomials, whose next terms are below 2e-9.
    """
    upper = steps >> 32
    quarter = (upper + 536870912) >> 30
    x = (upper - (quarter << 30)).to(tl.int32).to(tl.float32) * RADIANS_A_STEP
    y = x * x
    sin = x + x * y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880))))
    cos = 1.0 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 + y * (-1.0 / 3628800)))))
    swapped = (quarter & 1) == 1
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def rotate_tile(
    x, stride_x, out, stride_out, tokens, num_tokens, cos, sin, PAIRS: tl.constexpr, PAIRS_PADDED: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one head. Both halves are worked in fp32 and rounded when they are stored."""
    pairs = tl.arange(0, PAIRS_PADDED)[None, :]
    inside = (tokens[:, None] < num_tokens) & (pairs < PAIRS)
    places, places_out = tokens[:, None] * stride_x + pairs, tokens[:, None] * stride_out + pairs
    first = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + places + PAIRS, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(out + places_out, (first * cos - second * sin).to(kind), mask=inside)
    tl.store(out + places_out + PAIRS, (second * cos + first * sin).to(kind), mask=inside)
