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


def random_blocks(batch, plan_heads, row_tokens, seed, density=0.4, block_tokens=32):
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-row_tokens // block_tokens)
    block_map = torch.rand(batch, plan_heads, blocks, blocks, generator=generator) < density
    return BlockLists.from_map(block_map, block_tokens)


def with_sinks(plan, num_sinks):
    """The same plan with the first keys visible to all."""
    ghi = torch.minimum(plan.hi + 1, torch.tensor(num_sinks)).clamp(min=0).int()
    return AttentionPlan(plan.lo, plan.hi, torch.zeros_like(plan.lo), ghi, plan.k_tokens, plan.blocks)


def with_gaps(row_tokens):
    """Tiles of queries return to keys that those before them do not see: a key tile's queries are no run."""
    query = torch.arange(row_tokens, dtype=torch.int32).view(1, 1, -1)
    period = row_tokens * 3 // 4 // 16 * 16
    nothing = torch.zeros_like(query)
    return AttentionPlan(query % period // 16 * 16, query % period, nothing, nothing, row_tokens)


def small_plans(row_tokens: int, num_plans_heads: int = 2) -> dict[str, AttentionPlan]:
    """Every pattern over rows of packed documents, of one token too; at least 62 tokens."""
    third = row_tokens // 3
    starts = [[0, 1, third, third + 1, 2 * third], [0, 1, row_tokens // 2]]
    listed = block_lists(random_blocks(2, num_plans_heads, row_tokens, 0), starts, row_tokens)
    groups = [[[0, 15, third, third + 1], [2 * third, 2 * third + 9]], [[0, third, 2 * third]]]
    return {
        "causal": causal(2, row_tokens),
        "after a cache": causal(1, third, row_tokens),
        "documents": document(starts, row_tokens),
        "anchor": anchor(starts, row_tokens),
        "window": sliding_window(starts, row_tokens, window_tokens=37),
        "window with sinks": sliding_window([[0], [0]], row_tokens, window_tokens=20, num_sinks=5),
        "shifted groups": shifted_groups(starts, row_tokens, group_tokens=48),
        "sinks and shifted groups": sink_shifted_groups(starts, row_tokens, group_tokens=48, num_sinks=3),
        "shared prefix": shared_prefix(groups, row_tokens),
        "block lists": listed,
        "block lists with sinks": with_sinks(listed, 20),
        "runs with gaps": with_gaps(row_tokens),
        "unrelated intervals": random_plan(2, third, row_tokens // 2, seed=3, plan_heads=2),
    }


PLANS = small_plans(183)
