"""Exact attention in torch that visits the tiles of a plan only: for any plan, on any device; what laptops and CI use.

A tile of queries is attended at once to all key tiles that it visits, sliced or gathered; a mask is worked out only if
one of them is partial. Bits do not depend on what else is in the batch. Memory: `MOST_SCORES` scores at a time, more
only if one head's tile of queries sees more keys.

Shape legend: B batch, P plan heads, H query heads, G key/value heads, L query tokens, S key tokens, D head dim; of a
visit: h query heads, g key/value heads, m queries, n keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .folding import fold, unfold
from .gradient import differentiable
from .plan import AttentionPlan
from .tiles import BEGIN, END, FULL_BEGIN, FULL_END, TilePlan

TILE = 64
MOST_SCORES = 2**25


class Visit(NamedTuple):
    """What one tile of queries visits."""

    head: int
    """b * P + p."""
    queries: slice
    keys: Tensor | slice
    """Positions of the keys."""
    hidden: Tensor | None
    """bool [m, n]: True where the query does not see the key. None: it sees all."""


def attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, H, L, D], lse [B, H, L] in natural log), differentiable once in both.

    A query that sees nothing gives out 0 and lse -inf, and all its gradients are 0.
    """
    q_, k_, v_ = (fold(x, plan.plan_heads, q.shape[1]) for x in (q, k, v))
    out, lse = differentiable(_forward, _backward, q_, k_, v_, plan, scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each summed over the tiles in fp32 or better; `out` and `lse` may be merged ones."""
    dout_, q_, k_, v_, out_, lse_ = (fold(x, plan.plan_heads, q.shape[1]) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = _backward(dout_, q_, k_, v_, out_, lse_, None, plan, scale)
    return dq.reshape(q.shape), unfold(dk, k.shape), unfold(dv, v.shape)


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    working = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=working, device=q.device)
    for visit in visits(plan):
        for heads, kv_heads in _head_parts(q, k, visit):
            scores = _scores(q, k, visit, heads, kv_heads, working, scale)
            sums = scores.logsumexp(dim=-1)
            weights = (scores - _finite(sums).unsqueeze(-1)).exp()
            v_ = v[visit.head][kv_heads][:, visit.keys].to(working)
            out[visit.head, heads, visit.queries] = _times(weights, v_).to(q.dtype)
            lse[visit.head, heads, visit.queries] = sums
    return out, lse


def _backward(
    dout: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for gradients of out and of lse, where given."""
    dout = torch.zeros_like(out) if dout is None else dout
    working = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=working, device=x.device) for x in (q, k, v))
    for visit in visits(plan):
        n, queries = visit.head, visit.queries
        for heads, kv_heads in _head_parts(q, k, visit):
            dout_, out_, q_ = (x[n, heads, queries].to(working) for x in (dout, out, q))
            k_, v_ = (x[n][kv_heads][:, visit.keys].to(working) for x in (k, v))
            scores = _scores(q, k, visit, heads, kv_heads, working, scale)
            weights = (scores - _finite(lse[n, heads, queries]).unsqueeze(-1)).exp()
            minus = (dout_ * out_).sum(dim=-1)
            if dlse is not None:
                minus = minus - dlse[n, heads, queries]
            dscores = weights * (_times(dout_, v_.mT) - minus.unsqueeze(-1)) * scale
            dq[n, heads, queries] = _times(dscores, k_)
            dk[n][kv_heads][:, visit.keys] += _transposed_times(dscores, q_, len(k_))
            dv[n][kv_heads][:, visit.keys] += _transposed_times(weights, dout_, len(v_))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def visits(plan: AttentionPlan) -> Iterator[Visit]:
    """All tiles of queries that see anything, in order."""
    size = TILE if plan.blocks is None else min(TILE, plan.blocks.block_tokens)
    tiles = plan.tiles(size, size)
    for head in range(plan.batch * plan.plan_heads):
        b, p = divmod(head, plan.plan_heads)
        for tile in range(tiles.num_query_tiles):
            queries = slice(tile * size, min((tile + 1) * size, plan.q_tokens))
            keys, is_full = _keys(tiles, b, p, tile, plan.k_tokens)
            if keys is not None:
                yield Visit(head, queries, keys, None if is_full else _hidden(plan, b, p, queries, keys))


def _keys(tiles: TilePlan, b: int, p: int, tile: int, k_tokens: int) -> tuple[Tensor | slice | None, bool]:
    """The keys that a tile of queries visits, None if none, and whether all its tiles are full."""
    if tiles.query_lists is not None:
        begin, split, end = tiles.query_lists.offsets[b, p, tile].tolist()
        entries = tiles.query_lists.entries[begin:end] // 2
        keys = _positions(entries.sort().values, tiles.key_tile, k_tokens)
        return (keys if len(keys) else None), split == end
    runs = [run for run in tiles.query_runs[b, p, tile].tolist() if run[BEGIN] < run[END]]
    is_full = all(run[BEGIN] == run[FULL_BEGIN] and run[FULL_END] == run[END] for run in runs)
    if len(runs) == 1:
        size = tiles.key_tile
        return slice(runs[0][BEGIN] * size, min(runs[0][END] * size, k_tokens)), is_full
    parts = [torch.arange(run[BEGIN], run[END], device=tiles.query_runs.device) for run in runs]
    return (_positions(torch.cat(parts), tiles.key_tile, k_tokens) if parts else None), is_full


def _positions(tiles: Tensor, size: int, k_tokens: int) -> Tensor:
    positions = (tiles.long()[:, None] * size + torch.arange(size, device=tiles.device)).flatten()
    return positions[positions < k_tokens]


def _hidden(plan: AttentionPlan, b: int, p: int, queries: slice, keys: Tensor | slice) -> Tensor:
    """bool [m, n]: which of these keys the queries do not see."""
    if isinstance(keys, slice):
        keys = torch.arange(keys.start, keys.stop, device=plan.device)
    lo, hi, glo, ghi = (getattr(plan, name)[b, p, queries].unsqueeze(1) for name in ("lo", "hi", "glo", "ghi"))
    own = (lo <= keys) & (keys <= hi)
    if plan.blocks is not None:
        # A tile of queries lies inside one block.
        edge = plan.blocks.block_tokens
        begin, end = plan.blocks.offsets[b, p, queries.start // edge :][:2].tolist()
        own &= torch.isin(keys // edge, plan.blocks.keys[begin:end].long())
    return ~(own | ((glo <= keys) & (keys < ghi)))


def _head_parts(q: Tensor, k: Tensor, visit: Visit) -> Iterator[tuple[slice, slice]]:
    """Query heads, and the key/value heads they use, so many at a time that memory is bounded."""
    group = q.shape[1] // k.shape[1]
    num_queries = visit.queries.stop - visit.queries.start
    num_keys = visit.keys.stop - visit.keys.start if isinstance(visit.keys, slice) else len(visit.keys)
    step = max(1, MOST_SCORES // (num_queries * num_keys * group))
    for first in range(0, k.shape[1], step):
        last = min(first + step, k.shape[1])
        yield slice(first * group, last * group), slice(first, last)


def _scores(
    q: Tensor, k: Tensor, visit: Visit, heads: slice, kv_heads: slice, working: torch.dtype, scale: float
) -> Tensor:
    """[h, m, n] in the working dtype; -inf where the key is hidden."""
    q_ = q[visit.head, heads, visit.queries].to(working)
    k_ = k[visit.head][kv_heads][:, visit.keys].to(working)
    scores = _times(q_, k_.mT) * scale
    return scores if visit.hidden is None else scores.masked_fill_(visit.hidden, -torch.inf)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """[h, m, i] @ [g, i, n], consecutive heads sharing one of g: [h, m, n]."""
    heads, rows = x.shape[:2]
    grouped = x.reshape(y.shape[0], -1, x.shape[2])
    return (grouped @ y).reshape(heads, rows, y.shape[2])


def _transposed_times(x: Tensor, y: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads of each of g key/value heads of x^T @ y: [h, m, n], [h, m, D] to [g, n, D]."""
    return x.reshape(kv_heads, -1, x.shape[2]).mT @ y.reshape(kv_heads, -1, y.shape[2])


def _finite(lse: Tensor) -> Tensor:
    """-inf minus -inf is NaN; with 0 in its place the weights of a query that sees nothing come out as 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
