"""Tile sizes of each kernel: what compiles for Hopper without spilling, and what plans with blocks allow.

The sizes for bf16 are the largest tried that Triton 3.6 and 3.9 compile for sm_90 with no spill, with wgmma and within
227 KiB of shared memory (`tests/kernels/attention/test_triton_compiles.py`). One is not clean: dK/dV at head_dim 256
spills some hundred bytes, up to 1.1 KB with Triton 3.6, in any size with wgmma, which needs 64 keys. With 64 queries in
place of 32, dK/dV at 80 to 128 spills too. Which sizes are fastest is unmeasured, and smaller ones, for plans with
blocks below 128, are not checked.

Shape legend: M queries of a tile, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class KernelSizes:
    """How one kernel is launched."""

    M: int
    N: int
    num_warps: int
    num_stages: int

    def within(self, most: int) -> KernelSizes:
        """No tile larger than this."""
        return replace(self, M=min(self.M, most), N=min(self.N, most))


@dataclass(frozen=True)
class AttentionSizes:
    """Of the three kernels that visit tiles."""

    forward: KernelSizes
    keys: KernelSizes
    queries: KernelSizes

    def within(self, most: int) -> AttentionSizes:
        """No tile larger than this."""
        return AttentionSizes(self.forward.within(most), self.keys.within(most), self.queries.within(most))


SMALL_HEADS = AttentionSizes(KernelSizes(128, 128, 8, 3), KernelSizes(64, 128, 8, 2), KernelSizes(128, 64, 8, 2))
MEDIUM_HEADS = AttentionSizes(KernelSizes(128, 128, 8, 2), KernelSizes(32, 128, 8, 2), KernelSizes(128, 64, 8, 2))
LARGE_HEADS = AttentionSizes(KernelSizes(128, 64, 8, 2), KernelSizes(32, 64, 8, 2), KernelSizes(64, 32, 8, 2))
SINGLE_PRECISION = AttentionSizes(KernelSizes(64, 32, 4, 2), KernelSizes(32, 32, 4, 1), KernelSizes(32, 32, 4, 1))


def choose_sizes(head_dim: int, dtype: torch.dtype, block_tokens: int | None) -> AttentionSizes:
    """For a head dim, a dtype, and the edge of the plan's blocks if it has any."""
    if dtype == torch.float32:
        sizes = SINGLE_PRECISION
    elif head_dim <= 64:
        sizes = SMALL_HEADS
    else:
        sizes = MEDIUM_HEADS if head_dim <= 128 else LARGE_HEADS
    return sizes if block_tokens is None else sizes.within(block_tokens)
