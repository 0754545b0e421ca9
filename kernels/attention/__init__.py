"""Attention over the keys that a plan makes visible: patterns, the entry point and its backward.

`sparse_attention(q, k, v, document([[0, 700, 3000]], row_tokens=4096))` attends inside three packed documents.
"""

from .api import Implementation, sparse_attention, sparse_attention_bwd
from .merge import merge_branches
from .patterns import anchor, causal, document
from .plan import AttentionPlan

__all__ = [
    "AttentionPlan",
    "Implementation",
    "anchor",
    "causal",
    "document",
    "merge_branches",
    "sparse_attention",
    "sparse_attention_bwd",
]
