"""Small plans of every pattern, for tests of what reads plans."""

import torch
from numerics import random_plan

from ropewalk.kernels.attention import (
    AttentionPlan,
    BlockLists,
    anchor,
    block_lists,
    causal,
    document,
    shared_prefix,
    shifted_groups,
    sink_shifted_groups,
    sliding_window,
)

STARTS = [[0, 1, 40, 41, 100, 150], [0, 1, 77]]
ROW = 183


def random_blocks(batch, plan_heads, row_tokens, seed, density=0.4, block_tokens=32):
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-row_tokens // block_tokens)
    block_map = torch.rand(batch, plan_heads, blocks, blocks, generator=generator) < density
    return BlockLists.from_map(block_map, block_tokens)


def with_sinks(plan, num_sinks):
    """The same plan with the first keys visible to all."""
    ghi = torch.minimum(plan.hi + 1, torch.tensor(num_sinks)).clamp(min=0).int()
    return AttentionPlan(plan.lo, plan.hi, torch.zeros_like(plan.lo), ghi, plan.k_tokens, plan.blocks)


LISTED = block_lists(random_blocks(2, 2, ROW, 0), STARTS, ROW)
PLANS = {
    "causal": causal(2, ROW),
    "after a cache": causal(1, 40, ROW),
    "documents": document(STARTS, ROW),
    "anchor": anchor(STARTS, ROW),
    "window": sliding_window(STARTS, ROW, window_tokens=37),
    "window with sinks": sliding_window([[0], [0]], ROW, window_tokens=20, num_sinks=5),
    "shifted groups": shifted_groups(STARTS, ROW, group_tokens=48),
    "sinks and shifted groups": sink_shifted_groups(STARTS, ROW, group_tokens=48, num_sinks=3),
    "shared prefix": shared_prefix([[[0, 30, 60, 61], [100, 120]], [[0, 100, 140]]], ROW),
    "block lists": LISTED,
    "block lists with sinks": with_sinks(LISTED, 20),
    "unrelated intervals": random_plan(2, 75, 90, seed=3, plan_heads=2),
}
