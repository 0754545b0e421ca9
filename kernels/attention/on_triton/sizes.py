"""Tile sizes of each kernel: what compiles for Hopper without spilling, and what plans with blocks allow.

All that is known comes from compiling for sm_90 with Triton 3.6 and 3.9 (`compile_for_hopper.py`); which sizes are
fastest is unmeasured. The sizes for bf16 and fp16 are the largest tried that fit 227 KiB of shared memory and keep all
in registers, with the widest wgmma. Three stages wherever they fit: a tile is asked for at the end of a step, so with
two it has only the last product of the step to arrive in.

* dQ at 80 to 128 would hold 128 keys, but in two stages.
* dK/dV at 64 spills with 128 queries and 128 keys.
* dK/dV at 256 keeps half of all registers as sums. It spills some 200 bytes with Triton 3.9, nothing with 3.6. With 32
  queries 3.9 spills 30, but wgmma is 16 wide in place of 32 and takes longer to read its operands than to multiply.
* Single precision is there to be right: no tensor core multiplies it, and it spills in every size tried.
* Plans with blocks below 128: a warpgroup for each tile of 64 queries, so that wgmma stays 64 wide, and two stages, so
  that two programs fit a multiprocessor up to head_dim 128. dK/dV would spill so, and keeps two warpgroups. Blocks
  below 64 are too small for wgmma.

Shape legend: M queries of a tile, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = range(8, 257, 8)
"""Tensor descriptors need rows of whole 16 bytes. Compiled and checked: 32, 64, 80, 96, 128, 192, 256."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST_PADDED = 16
"""Columns that a product of tiles needs."""


@dataclass(frozen=True)
class KernelSizes:
    """How one kernel is launched."""

    M: int
    N: int
    num_warps: int
    num_stages: int

    def within(self, most: int, most_warps: int) -> KernelSizes:
        """No tile larger than this; if one is cut, no more than two stages, and warps than these."""
        if max(self.M, self.N) <= most:
            return self
        num_warps, num_stages = min(self.num_warps, most_warps), min(self.num_stages, 2)
        return KernelSizes(min(self.M, most), min(self.N, most), num_warps, num_stages)


@dataclass(frozen=True)
class AttentionSizes:
    """Of the three kernels that visit tiles."""

    forward: KernelSizes
    keys: KernelSizes
    queries: KernelSizes

    def within(self, most: int) -> AttentionSizes:
        """No tile larger than this."""
        return AttentionSizes(self.forward.within(most, 4), self.keys.within(most, 8), self.queries.within(most, 4))


SMALL_HEADS = AttentionSizes(KernelSizes(128, 128, 8, 3), KernelSizes(64, 128, 8, 3), KernelSizes(128, 128, 8, 3))
MEDIUM_HEADS = AttentionSizes(KernelSizes(128, 128, 8, 3), KernelSizes(64, 128, 8, 3), KernelSizes(128, 64, 8, 3))
LARGE_HEADS = AttentionSizes(KernelSizes(128, 64, 8, 2), KernelSizes(64, 64, 8, 2), KernelSizes(128, 32, 8, 2))
SINGLE_PRECISION = AttentionSizes(KernelSizes(64, 32, 4, 2), KernelSizes(32, 32, 4, 1), KernelSizes(32, 32, 4, 1))


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: the next power of two."""
    return max(LEAST_PADDED, 1 << (head_dim - 1).bit_length())


def choose_sizes(head_dim: int, dtype: torch.dtype, block_tokens: int | None) -> AttentionSizes:
    """For a head dim, a dtype, and the edge of the plan's blocks if it has any."""
    if dtype == torch.float32:
        sizes = SINGLE_PRECISION
    elif head_dim <= 64:
        sizes = SMALL_HEADS
    else:
        sizes = MEDIUM_HEADS if head_dim <= 128 else LARGE_HEADS
    return sizes if block_tokens is None else sizes.within(block_tokens)
