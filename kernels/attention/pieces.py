"""Cuts the visible area of a plan into rectangles and causal triangles that dense attention kernels can run.

Packed documents make one triangle each; an anchor adds one rectangle, one key wide; queries that continue a KV cache
make a rectangle and a triangle. A plan whose intervals start anew at every query (a sliding window) is still cut
exactly, but into as many pieces as queries.

Shape legend: B batch, L query tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FLAT, STEP, BREAK = 0, 1, 2


@dataclass(frozen=True)
class Piece:
    """Queries [q_start, q_stop) against keys [k_start, k_stop), in the rows [row_start, row_stop) of B x P."""

    row_start: int
    row_stop: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    """True: a triangle, as many keys as queries, query n sees keys up to the n-th. False: all see all."""


def decompose(intervals: Sequence[tuple[Tensor, Tensor]]) -> tuple[Piece, ...]:
    """Pieces that cover disjoint intervals (start, stop), int64 [B, L] each, every visible pair exactly once.

    Consecutive equal rows of the batch share their pieces.
    """
    edges = torch.stack([edge for interval in intervals for edge in interval]).cpu()  # [2 * intervals, B, L]
    differs = (edges[:, 1:] != edges[:, :-1]).any(dim=2).any(dim=0)
    borders = [0, *(differs.nonzero().flatten() + 1).tolist(), edges.shape[1]]
    return tuple(
        Piece(row_start, row_stop, *place)
        for row_start, row_stop in pairwise(borders)
        for start, stop in _intervals(edges[:, row_start])
        for place in _cut(start, stop)
    )


def _intervals(edges: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The intervals (start, stop), [L] each, of one row of the batch; empty ones become [-1, -1)."""
    for index in range(0, edges.shape[0], 2):
        start, stop = edges[index], edges[index + 1]
        is_empty = start >= stop
        yield start.masked_fill(is_empty, -1), stop.masked_fill(is_empty, -1)


def _cut(start: Tensor, stop: Tensor) -> Iterator[tuple[int, int, int, int, bool]]:
    """(q_start, q_stop, k_start, k_stop, causal) of the pieces of one interval."""
    starts, stops = start.tolist(), stop.tolist()
    for begin, end, kind in _runs(start, stop):
        low, high = starts[begin], stops[begin]
        if low == high:
            continue
        if kind == FLAT or end - begin == 1:
            yield begin, end, low, high, False
            continue
        yield begin, end, high - 1, high - 1 + end - begin, True
        if low < high - 1:
            yield begin, end, low, high - 1, False


def _runs(start: Tensor, stop: Tensor) -> Iterator[tuple[int, int, int]]:
    """Runs [begin, end) of queries that see the same keys (FLAT) or one key more from each to the next (STEP)."""
    num_queries = start.shape[0]
    same_start, growth = start.diff() == 0, stop.diff()
    kinds = torch.full_like(growth, BREAK)
    kinds[same_start & (growth == 0)] = FLAT
    kinds[same_start & (growth == 1)] = STEP
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    next_query = step = 0
    for kind, count in zip(values.tolist(), counts.tolist(), strict=True):
        step += count  # transitions up to query `step` have this kind
        if kind == BREAK:
            # Query `step` itself may begin the next run.
            yield from ((query, query + 1, FLAT) for query in range(next_query, step))
            next_query = step
        else:
            yield next_query, step + 1, kind
            next_query = step + 1
    if next_query < num_queries:
        yield next_query, num_queries, FLAT
