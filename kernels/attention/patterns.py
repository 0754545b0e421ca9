"""Named attention patterns. Each returns an `AttentionPlan`; positions count tokens inside a row.

Documents of packed rows are given per row as their start offsets, strictly increasing, the first 0; a document ends
where the next one starts, the last one with the row. Every pattern composes with documents: a query never sees beyond
its own, but for an anchor. Plans are built on the CPU; move them with `plan.to(device)`.

Where heads differ the plan has several plan heads; the query heads of a model are divided among them in order.

Notation: d(i) is the start of the document of i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import AttentionPlan, BlockLists

DocumentStarts = Sequence[Sequence[int]]


def causal(batch: int, q_tokens: int, k_tokens: int | None = None) -> AttentionPlan:
    """visible(i, j) = j <= i. With more keys than queries (a KV cache) the queries are the last of the keys.

    Raises ValueError if there are fewer keys than queries.
    """
    k_tokens = q_tokens if k_tokens is None else k_tokens
    if batch < 1 or q_tokens < 1 or k_tokens < q_tokens:
        raise ValueError(
            f"causal needs batch >= 1 and k_tokens >= q_tokens >= 1, got {batch=}, {q_tokens=}, {k_tokens=}"
        )
    hi = torch.arange(k_tokens - q_tokens, k_tokens, dtype=torch.int32).repeat(batch, 1, 1)
    zeros = torch.zeros_like(hi)
    return AttentionPlan(zeros, hi, zeros, zeros, k_tokens)


def document(document_starts: DocumentStarts, row_tokens: int) -> AttentionPlan:
    """visible(i, j) = d(i) <= j <= i: causal inside each document, one list of starts per row.

    Raises ValueError without rows, and, naming the row, for starts that are not strictly increasing from 0 and below
    `row_tokens`.
    """
    lo = _document_of(document_starts, row_tokens)
    return _plan(lo, torch.zeros_like(lo), torch.zeros_like(lo))


def anchor(document_starts: DocumentStarts, row_tokens: int) -> AttentionPlan:
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
    lo = _document_of(document_starts, row_tokens)
    return _plan(lo, torch.zeros_like(lo), torch.ones_like(lo))


def sliding_window(
    document_starts: DocumentStarts, row_tokens: int, *, window_tokens: int, num_sinks: int = 0
) -> AttentionPlan:
    """visible(i, j) = j <= i and (i - j < window_tokens or j < d(i) + num_sinks), inside the document of i.

    With sinks this is the Λ shape: Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (arXiv:2309.17453), and Han et al., "LM-Infinite" (arXiv:2308.16137), without its distance limit
    (`lambda_branches`).

    Raises ValueError as `document` does, or if `window_tokens` is below 1 or `num_sinks` below 0.
    """
    _check_at_least(window_tokens=(window_tokens, 1), num_sinks=(num_sinks, 0))
    starts = _document_of(document_starts, row_tokens)
    position = torch.arange(row_tokens, dtype=torch.int32)
    lo = torch.maximum(starts, position - (window_tokens - 1))
    return _plan(lo, starts, torch.minimum(starts + num_sinks, position + 1))


def lambda_branches(
    document_starts: DocumentStarts, row_tokens: int, *, window_tokens: int, num_sinks: int
) -> tuple[AttentionPlan, AttentionPlan]:
    """LM-Infinite's Λ with its distance limit, as two plans over disjoint keys: (near, far).

    near: i - j < window_tokens. far: j < d(i) + num_sinks and i - j >= window_tokens. Far scores are those of queries
    rotated to one position, the limit, and keys that are not rotated at all, so that no distance exceeds what training
    knew; so the branches need two pairs of q and k. Attend to each, and merge them with `merge_branches`. Han et al.
    (arXiv:2308.16137, section 4; Glaciohound/LM-Infinite: models/lambda_attention.py).

    Raises ValueError as `sliding_window` does.
    """
    near = sliding_window(document_starts, row_tokens, window_tokens=window_tokens)
    _check_at_least(num_sinks=(num_sinks, 0))
    starts = _document_of(document_starts, row_tokens)
    position = torch.arange(row_tokens, dtype=torch.int32)
    stop = torch.minimum(starts + num_sinks, position - window_tokens + 1).clamp(min=0)
    nothing = torch.zeros_like(near.lo)
    far = AttentionPlan(nothing, nothing - 1, starts, torch.maximum(stop, nothing), row_tokens)
    return near, far


def shifted_groups(document_starts: DocumentStarts, row_tokens: int, *, group_tokens: int) -> AttentionPlan:
    """S2-Attn: half of the heads attend inside groups of `group_tokens`, the other half inside groups shifted by half.

    The groups of the second half of the heads are [0, G/2), [G/2, 3G/2), ...: what the flash version of the published
    code does. Its other version rolls the sequence, so that the first tokens see the last ones; that leak is not here.
    Chen et al., "LongLoRA" (arXiv:2309.12307; dvlab-research/LongLoRA: llama_attn_replace.py). Two plan heads.

    Raises ValueError as `document` does, or if `group_tokens` is odd or below 2.
    """
    return sink_shifted_groups(
        document_starts, row_tokens, group_tokens=group_tokens, num_sinks=0, plan_heads=2, num_shifted=1
    )


def sink_shifted_groups(
    document_starts: DocumentStarts,
    row_tokens: int,
    *,
    group_tokens: int,
    num_sinks: int,
    plan_heads: int = 4,
    num_shifted: int = 1,
) -> AttentionPlan:
    """SF-Attn: as `shifted_groups` with fewer shifted heads, and the first tokens of the document visible to all.

    The last `num_shifted` of `plan_heads` equal shares of the heads are shifted. Zhang, "SinkLoRA" (arXiv:2406.05678):
    a part of the shifted heads goes back to the plain groups, and initial tokens become global. The public code has
    neither, so the shares are ours to choose.

    Raises ValueError as `shifted_groups` does, or for counts of heads and sinks that make no sense.
    """
    _check_at_least(num_sinks=(num_sinks, 0), plan_heads=(plan_heads, 1), num_shifted=(num_shifted, 0))
    if num_shifted > plan_heads:
        raise ValueError(f"num_shifted must be at most plan_heads {plan_heads}, got {num_shifted}")
    if group_tokens < 2 or group_tokens % 2:
        raise ValueError(f"group_tokens must be even and at least 2, got {group_tokens}")
    starts = _document_of(document_starts, row_tokens)
    position = torch.arange(row_tokens, dtype=torch.int32)
    half = group_tokens // 2
    plain = position // group_tokens * group_tokens
    shifted = ((position + half) // group_tokens * group_tokens - half).clamp(min=0)
    groups = torch.stack([plain] * (plan_heads - num_shifted) + [shifted] * num_shifted)
    lo = torch.maximum(starts, groups)
    sinks = torch.minimum(starts + num_sinks, position + 1)
    return _plan(lo, starts.expand_as(lo), sinks.expand_as(lo))


def shared_prefix(groups: Sequence[Sequence[Sequence[int]]], row_tokens: int) -> AttentionPlan:
    """Several answers after one prompt, which is there once: each answer sees the prompt and itself, not the others.

    `groups` holds for each row its groups, and for each group the start of the prompt and of each answer, all strictly
    increasing through the row, the first 0. A chosen and a rejected answer are a group of three starts; a group of one
    is a document. Preference pairs: frankxwang/dpo-prefix-sharing (modeling/dpo_flex_attn_masks.py); groups of n:
    PrefixGrouper. Position ids should continue from the prompt in each answer.

    Raises ValueError, naming the row, for starts that are not strictly increasing from 0 and below `row_tokens`.
    """
    flat = [[start for group in row for start in group] for row in groups]
    lo = _document_of(flat, row_tokens)
    prompts = [[group[0] for group in row] for row in groups]
    glo = _document_of(prompts, row_tokens)
    ends = [[group[1] if len(group) > 1 else group[0] for group in row] for row in groups]
    ghi = torch.stack(
        [
            torch.tensor(row_ends, dtype=torch.int32)[_number_of(row_prompts, row_tokens)]
            for row_ends, row_prompts in zip(ends, prompts, strict=True)
        ]
    ).unsqueeze(1)
    # A prompt's own tokens see it causally, through the own interval.
    return _plan(lo, glo, torch.where(lo == glo, glo, ghi))


def block_lists(blocks: BlockLists, document_starts: DocumentStarts, row_tokens: int) -> AttentionPlan:
    """visible(i, j) = d(i) <= j <= i and the block of j is listed for the block of i: anything found at run time.

    The block of a query's own position must be listed for it to see itself. Estimators that make lists from q and k are
    in `estimators/`. The plan has as many plan heads as the lists.

    Raises ValueError as `document` does, or if the lists do not fit.
    """
    lo = _document_of(document_starts, row_tokens).to(blocks.keys.device)
    lo = lo.expand(-1, blocks.offsets.shape[1], -1).contiguous()
    hi = torch.arange(row_tokens, dtype=torch.int32, device=lo.device).expand_as(lo)
    zeros = torch.zeros_like(lo)
    return AttentionPlan(lo, hi, zeros, zeros, row_tokens, blocks)


def _plan(lo: Tensor, glo: Tensor, ghi: Tensor) -> AttentionPlan:
    """The own interval [lo, i] and the shared one [glo, ghi), [B, P, L] each."""
    row_tokens = lo.shape[-1]
    hi = torch.arange(row_tokens, dtype=torch.int32).expand_as(lo)
    return AttentionPlan(lo, hi, glo, ghi, row_tokens)


def _document_of(document_starts: DocumentStarts, row_tokens: int) -> Tensor:
    """int32 [B, 1, L]: where the document of each position starts."""
    if not document_starts:
        raise ValueError("document_starts must have one list of starts for each row, got none")
    rows = [_starts_by_position(row, starts, row_tokens) for row, starts in enumerate(document_starts)]
    return torch.stack(rows).unsqueeze(1)


def _number_of(starts: Sequence[int], row_tokens: int) -> Tensor:
    """int64 [row_tokens]: the number of the document of each position."""
    edges = torch.tensor([*starts, row_tokens])
    return torch.arange(len(starts)).repeat_interleave(edges.diff())


def _check_at_least(**limits: tuple[int, int]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _starts_by_position(row: int, starts: Sequence[int], row_tokens: int) -> Tensor:
    """int32 [row_tokens]: where the document of each position starts."""
    edges = torch.tensor([*starts, row_tokens], dtype=torch.int32)
    if len(starts) == 0 or starts[0] != 0 or bool((edges.diff() <= 0).any()):
        raise ValueError(
            f"row {row}: document starts must increase strictly from 0 and stay below row_tokens={row_tokens}, "
            f"got {list(starts[:8])}"
        )
    return edges[:-1].repeat_interleave(edges.diff())
