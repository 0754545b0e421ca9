"""Attention over the keys that a plan makes visible: patterns, the entry point and its backward.

`sparse_attention(q, k, v, document([[0, 700, 3000]], row_tokens=4096))` attends inside three packed documents.
"""

from .api import Implementation, sparse_attention, sparse_attention_bwd
from .merge import merge_branches
from .patterns import (
    anchor,
    block_lists,
    causal,
    document,
    lambda_branches,
    shared_prefix,
    shifted_groups,
    sink_shifted_groups,
    sliding_window,
)
from .plan import AttentionPlan, BlockLists

__all__ = [
    "AttentionPlan",
    "BlockLists",
    "Implementation",
    "anchor",
    "block_lists",
    "causal",
    "document",
    "lambda_branches",
    "merge_branches",
    "shared_prefix",
    "shifted_groups",
    "sink_shifted_groups",
    "sliding_window",
    "sparse_attention",
    "sparse_attention_bwd",
]
