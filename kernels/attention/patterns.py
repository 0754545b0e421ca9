"""Named attention patterns. Each returns an `AttentionPlan`; positions count tokens inside a row.

Documents of packed rows are given per row as their start offsets, strictly increasing, the first 0; a document ends
where the next one starts, the last one with the row. Plans are built on the CPU; move them with `plan.to(device)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import AttentionPlan


def causal(batch: int, q_tokens: int, k_tokens: int | None = None) -> AttentionPlan:
    """visible(i, j) = j <= i. With more keys than queries (a KV cache) the queries are the last of the keys.

    Raises ValueError if there are fewer keys than queries.
    """
    k_tokens = q_tokens if k_tokens is None else k_tokens
    if batch < 1 or q_tokens < 1 or k_tokens < q_tokens:
        raise ValueError(
            f"causal needs batch >= 1 and k_tokens >= q_tokens >= 1, got {batch=}, {q_tokens=}, {k_tokens=}"
        )
    hi = torch.arange(k_tokens - q_tokens, k_tokens, dtype=torch.int32).repeat(batch, 1)
    zeros = torch.zeros_like(hi)
    return AttentionPlan(zeros, hi, zeros, zeros, k_tokens)


def document(document_starts: Sequence[Sequence[int]], row_tokens: int) -> AttentionPlan:
    """visible(i, j) = j <= i and doc(i) = doc(j): causal inside each document, one list of starts per row.

    Raises ValueError without rows, and, naming the row, for starts that are not strictly increasing from 0 and below
    `row_tokens`.
    """
    if not document_starts:
        raise ValueError("document_starts must have one list of starts for each row, got none")
    lo = torch.stack([_starts_by_position(row, starts, row_tokens) for row, starts in enumerate(document_starts)])
    hi = torch.arange(row_tokens, dtype=torch.int32).expand_as(lo)
    zeros = torch.zeros_like(lo)
    return AttentionPlan(lo, hi, zeros, zeros, row_tokens)


def anchor(document_starts: Sequence[Sequence[int]], row_tokens: int) -> AttentionPlan:
    """visible(i, j) = j <= i and (doc(i) = doc(j) or doc(j) = 0): documents see themselves and the anchor token.

    The anchor is document 0, the single token at position 0, so each list of starts begins 0, 1. Wang et al., "When
    Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context Training" (arXiv:2411.13476); position ids
    run through the whole row.

    Raises ValueError as `document` does, and for a row whose document 0 is longer than one token.
    """
    for row, starts in enumerate(document_starts):
        if row_tokens > 1 and (len(starts) < 2 or starts[1] != 1):
            raise ValueError(
                f"row {row}: the anchor is position 0 alone, so document starts must begin 0, 1; got {list(starts[:3])}"
            )
    own = document(document_starts, row_tokens)
    return AttentionPlan(own.lo, own.hi, own.glo, torch.ones_like(own.ghi), row_tokens)


def _starts_by_position(row: int, starts: Sequence[int], row_tokens: int) -> Tensor:
    """int32 [row_tokens]: where the document of each position starts."""
    edges = torch.tensor([*starts, row_tokens], dtype=torch.int32)
    if len(starts) == 0 or starts[0] != 0 or bool((edges.diff() <= 0).any()):
        raise ValueError(
            f"row {row}: document starts must increase strictly from 0 and stay below row_tokens={row_tokens}, "
            f"got {list(starts[:8])}"
        )
    return edges[:-1].repeat_interleave(edges.diff())
