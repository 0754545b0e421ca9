"""FlexPrefill's lists: each head is vertical-slash or query-aware, with as many blocks as its attention needs.

Lai et al., "FlexPrefill" (arXiv:2502.20766, algorithms 1 to 4); bytedance/FlexPrefill:
flex_prefill/ops/flex_prefill_attention.py (`get_active_blocks`).

Shape legend: B batch, H query heads, G key/value heads, L tokens of a row, M tokens of a document, N blocks of a row
or a document, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import DocumentStarts
from ..plan import BlockLists
from .grid import (
    Document,
    block_mean,
    block_sum,
    check_at_least,
    check_fraction,
    covering,
    distance_sums,
    grid_of,
    largest,
    last_probabilities,
    scale_of,
    scores,
)


@torch.no_grad()
def flexprefill(
    q: Tensor,
    k: Tensor,
    document_starts: DocumentStarts,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget_tokens: int = 512,
    max_budget_tokens: int | None = None,
    block_tokens: int = 128,
    scale: float | None = None,
) -> BlockLists:
    """Lists by the smallest sets that hold a share `gamma` of the attention, a list for each query head.

    The representative queries are the last block's worth of each document. Their mean query against the mean key of
    each block gives an estimate of how attention is spread over blocks; if the root of the Jensen-Shannon divergence
    between that and the true spread is below `tau`, means can be trusted and the head is query-aware.

    Vertical-slash head: so many keys (distances) as hold `gamma` of the representatives' attention, divided by the
    block and rounded up past it, is the number of block columns (block diagonals), within the budgets; the ones with
    the most attention are kept, the first column and the main diagonal always. Query-aware head: the fewest pairs of
    blocks that hold `gamma` of the softmax of mean queries by mean keys, taken over the whole map, and the columns and
    diagonals of the least budget. Documents of at most two blocks, or the least budget, see all of theirs; so does
    everything with `gamma` 1.

    q is [B, H, L, D] and k [B, G, L, D]; the lists have H plan heads.

    Deviations: block diagonal n is the distances from n blocks to below n + 1 (the published code counts them from
    the far end, which is the same for whole blocks). The published code stops the query-aware set one short of
    `gamma`; the paper, and this, reach it. Columns are divided by the block, where the code writes 128. Zeros in the
    divergence count as zero, not NaN. Packed rows are estimated document by document, their blocks counted from the
    row's start.

    Raises ValueError for shapes or documents that do not fit, fractions outside [0, 1] and budgets that make no sense.
    """
    check_fraction(gamma=gamma)
    check_at_least(tau=(tau, 0), min_budget_tokens=(min_budget_tokens, 0))
    if max_budget_tokens is not None:
        check_at_least(max_budget_tokens=(max_budget_tokens, max(min_budget_tokens, 1)))
    grid = grid_of(q, k, document_starts, block_tokens)
    block_map = grid.zeros(q.shape[1], torch.bool)
    group = q.shape[1] // k.shape[1]
    least = max(1, -(-min_budget_tokens // block_tokens))
    most = None if max_budget_tokens is None else -(-max_budget_tokens // block_tokens)
    for document in grid.documents():
        area = document.area(block_map)
        if gamma == 1 or document.num_tokens <= max(2, least) * block_tokens:
            area[:] = True
            continue
        budgets = (least, document.num_blocks if most is None else most)
        document_q, document_k = document.of(q), document.of(k)
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            area[heads] |= _choose(
                document_q[heads], document_k[head : head + 1], document, gamma, tau, budgets, scale_of(q, scale)
            )
    return grid.lists(block_map)


def _choose(
    q: Tensor, k: Tensor, document: Document, gamma: float, tau: float, budgets: tuple[int, int], scale: float
) -> Tensor:
    """bool [H, N, N] of a document's q [H, M, D] and k [1, M, D]; causal where it matters, the rest is cut later."""
    edge = document.block_tokens
    seen = last_probabilities(q, k, edge, scale)
    by_key, by_distance = seen.mean(dim=1), distance_sums(seen) / seen.shape[1]
    columns = block_sum(by_key, document.start, edge)
    diagonals = block_sum(by_distance, 0, edge)
    # A document that begins inside a block reaches over one more than its length alone has.
    diagonals = torch.nn.functional.pad(diagonals, (0, document.num_blocks - diagonals.shape[-1]))
    mean_q, mean_k = (block_mean(x, document.start, edge) for x in (q, k))
    last_q = q[:, -edge:].to(mean_q.dtype).mean(dim=1, keepdim=True)
    estimate = (scores(last_q, mean_k) * scale).softmax(dim=-1).squeeze(1)
    is_query_aware = _divergence(estimate, columns).sqrt() < tau
    kept_columns = _kept(columns, _budget(by_key, gamma, edge, budgets, is_query_aware))
    kept_diagonals = _kept(diagonals, _budget(by_distance, gamma, edge, budgets, is_query_aware))
    block = torch.arange(document.num_blocks, device=q.device)
    difference = block[:, None] - block
    found = kept_columns.unsqueeze(1) | (kept_diagonals[:, difference.clamp(min=0)] & (difference >= 0))
    for head in is_query_aware.nonzero().flatten().tolist():
        found[head] |= _query_aware(mean_q[head : head + 1], mean_k, gamma, scale)
    return found


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions [H, N], natural log; [H]."""
    middle = (p + q) / 2
    parts = [torch.xlogy(x, x / middle.clamp(min=torch.finfo(x.dtype).tiny)).sum(dim=-1) for x in (p, q)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0)


def _budget(masses: Tensor, gamma: float, edge: int, budgets: tuple[int, int], is_query_aware: Tensor) -> Tensor:
    """int64 [H]: how many blocks, from the masses [H, M] of single tokens."""
    ordered = masses.double().sort(dim=-1, descending=True).values
    needed = (ordered.cumsum(dim=-1) <= gamma).sum(dim=-1) + 1
    return (needed // edge + 1).clamp(*budgets).masked_fill(is_query_aware, budgets[0])


def _kept(masses: Tensor, counts: Tensor) -> Tensor:
    """bool [H, N]: the largest, the first always among them."""
    masses = masses.clone()
    masses[:, 0] = torch.inf
    return largest(masses, counts)


def _query_aware(mean_q: Tensor, mean_k: Tensor, gamma: float, scale: float) -> Tensor:
    """bool [N, N]: the fewest pairs of blocks that hold `gamma` of all rows' estimated attention."""
    estimate = (scores(mean_q, mean_k) * scale).squeeze(0)
    above = torch.ones_like(estimate, dtype=torch.bool).triu(1)
    masses = estimate.masked_fill(above, -torch.inf).softmax(dim=-1)
    return covering(masses.flatten(), gamma * len(masses)).view_as(masses)
