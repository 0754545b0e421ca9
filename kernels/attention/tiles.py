"""What a tiled kernel visits: for each tile of queries the tiles of keys, and the other way round for the backward.

A tile pair is full if every query sees every key of it, so that no mask is worked out, and partial otherwise.

Plans without block lists become runs, `(begin, full_begin, full_end, end)`: tiles [begin, end) are visited, of which
[full_begin, full_end) are full. A tile of queries has three of them, disjoint: the shared interval left of the own one,
the own one, and the shared one right of it. A tile of keys has one run of queries; it may cover query tiles that do not
see it, which kernels find out from the query's runs. So memory is linear, some 64 bytes a tile, whatever the density.

Plans with block lists become compressed rows of entries `2 * tile + listed` instead, the full ones first; an entry that
is not listed is there for the shared interval alone.

Work is launched longest first. A key tile that far more queries visit than others (an anchor, sinks) is split over
several programs, whose partial sums are added in order: one program must not set the time, and bits must not change.

Shape legend: B batch, P plan heads, Q query tiles, K key tiles, N entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .plan import AttentionPlan

FAR = 2**30
"""Beyond any position; keeps sums of two inside int32."""
MOST_CHUNKS = 64
BEGIN, FULL_BEGIN, FULL_END, END = range(4)
LEFT, OWN, RIGHT = range(3)


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Built by `AttentionPlan.tiles`; lies on the plan's device."""

    query_tile: int
    key_tile: int
    query_runs: Tensor
    """int32 [B, P, Q, 3, 4]: runs of key tiles: shared left, own, shared right. With lists: what they were cut from."""
    key_runs: Tensor
    """int32 [B, P, K, 4]: run of query tiles."""
    query_order: Tensor
    """int32 [B * Q]: tiles of queries, `b * Q + tile`, longest first."""
    key_items: Tensor
    """int32 [items, 4]: `b * K + tile`, chunk, number of chunks, slot of the partial sum (-1: none); longest first."""
    split_tiles: Tensor
    """int32 [splits, 3]: `b * K + tile`, first slot, number of chunks."""
    num_slots: int
    """Partial sums of split key tiles."""
    has_gaps: bool
    """Whether a key tile's run covers a query tile that does not visit it; without, kernels need not ask."""
    query_lists: TileLists | None
    key_lists: TileLists | None

    @property
    def num_query_tiles(self) -> int:
        """Q."""
        return self.query_runs.shape[2]

    @property
    def num_key_tiles(self) -> int:
        """K."""
        return self.key_runs.shape[2]

    def visited(self) -> Tensor:
        """int8 [B, P, Q, K]: 0 not visited, 1 partial, 2 full. Quadratic in tiles: for tests and pictures."""
        tile = torch.arange(self.num_key_tiles, device=self.query_runs.device)
        if self.query_lists is not None:
            return self.query_lists.to_map(self.num_key_tiles)
        begin, full_begin, full_end, end = (self.query_runs[..., n].unsqueeze(-1) for n in range(4))
        visited = ((begin <= tile) & (tile < end)).any(dim=3)
        full = ((full_begin <= tile) & (tile < full_end)).any(dim=3)
        return visited.to(torch.int8) + full.to(torch.int8)


@dataclass(frozen=True, eq=False)
class TileLists:
    """Entries of each row as compressed rows."""

    offsets: Tensor
    """int64 [B, P, rows, 3]: begin, where the partial entries begin, end."""
    entries: Tensor
    """int32 [N]: `2 * tile + listed`."""

    def to_map(self, num_tiles: int) -> Tensor:
        """int8 [B, P, rows, tiles]: 0 no entry, 1 partial, 2 full."""
        begin, split, end = self.offsets.flatten(0, 2).unbind(-1)
        rows = torch.arange(len(begin), device=begin.device).repeat_interleave(end - begin)
        place = torch.arange(len(rows), device=begin.device)
        found = torch.zeros(len(begin), num_tiles, dtype=torch.int8, device=begin.device)
        found[rows, (self.entries // 2).long()] = 1 + (place < split[rows]).to(torch.int8)
        return found.view(*self.offsets.shape[:3], num_tiles)


def build_tiles(plan: AttentionPlan, query_tile: int, key_tile: int) -> TilePlan:
    """The tiles of a plan. Costs O(tokens + tiles log tiles), and O(entries) where there are block lists.

    Raises ValueError for tile sizes that are no powers of two, 16 or more, or larger than the plan's blocks.
    """
    for name, size in (("query_tile", query_tile), ("key_tile", key_tile)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two, 16 or more, got {size}")
        if plan.blocks is not None and size > plan.blocks.block_tokens:
            raise ValueError(f"{name} {size} is larger than the plan's blocks of {plan.blocks.block_tokens}")
    num_query_tiles, num_key_tiles = -(-plan.q_tokens // query_tile), -(-plan.k_tokens // key_tile)
    own = _runs(plan.lo, plan.hi, query_tile, key_tile)
    shared_end = plan.ghi if plan.blocks is not None else _end_of_shared(plan, own, query_tile, key_tile)
    shared = _runs(plan.glo, shared_end - 1, query_tile, key_tile)
    if plan.blocks is None:
        query_runs = torch.stack([_left_of(own, shared), own, _right_of(own, shared)], dim=3)
        key_runs, has_gaps = _transposed(query_runs, num_key_tiles)
        query_lists = key_lists = None
        query_work = (query_runs[..., END] - query_runs[..., BEGIN]).sum(dim=3)
        key_work = key_runs[..., END] - key_runs[..., BEGIN]
    else:
        query_runs = torch.stack([shared, own, torch.zeros_like(own)], dim=3)
        key_runs = torch.zeros(*own.shape[:2], num_key_tiles, 4, dtype=torch.int32, device=own.device)
        has_gaps = False
        query_lists, key_lists = _lists(plan, own, shared, query_tile, key_tile)
        query_work = query_lists.offsets[..., 2] - query_lists.offsets[..., 0]
        key_work = key_lists.offsets[..., 2] - key_lists.offsets[..., 0]
    assert query_runs.shape[2] == num_query_tiles
    order = query_work.sum(dim=1).flatten().argsort(descending=True, stable=True)
    return TilePlan(
        query_tile,
        key_tile,
        query_runs,
        key_runs,
        order.int(),
        *_items(key_work.sum(dim=1).flatten()),
        has_gaps,
        query_lists,
        key_lists,
    )


def _runs(first: Tensor, last: Tensor, query_tile: int, key_tile: int) -> Tensor:
    """int32 [B, P, Q, 4]: the run of key tiles of intervals [first, last], [B, P, L]; empty where first > last."""
    is_empty = first > last
    padding = -first.shape[-1] % query_tile

    def reduced(values: Tensor, neutral: int, largest: bool) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, padding), value=neutral)
        tiles = padded.view(*values.shape[:2], -1, query_tile)
        return tiles.amax(dim=-1) if largest else tiles.amin(dim=-1)

    begin = reduced(first.masked_fill(is_empty, FAR), FAR, largest=False) // key_tile
    end = reduced(last.masked_fill(is_empty, -1), -1, largest=True) // key_tile + 1
    # A query that sees nothing leaves no tile full.
    full_begin = -(-reduced(first.masked_fill(is_empty, FAR), -1, largest=True) // key_tile)
    full_end = (reduced(last.masked_fill(is_empty, -1), FAR, largest=False) + 1) // key_tile
    begin = torch.minimum(begin, end)
    full_begin = torch.minimum(torch.maximum(full_begin, begin), end)
    full_end = torch.minimum(torch.maximum(full_end, full_begin), end)
    return torch.stack([begin, full_begin, full_end, end], dim=-1).int()


def _end_of_shared(plan: AttentionPlan, own: Tensor, query_tile: int, key_tile: int) -> Tensor:
    """int32 [B, P, L]: ghi, or 0 where the own run of the tile of queries visits the whole shared interval.

    Where a tile holds the end of one document and the start of another, its shared run would else reach from the sinks
    of the one to those of the other.
    """
    edges = own.repeat_interleave(query_tile, dim=2)[:, :, : plan.q_tokens] * key_tile
    return plan.ghi.masked_fill((edges[..., BEGIN] <= plan.glo) & (plan.ghi <= edges[..., END]), 0)


def _left_of(own: Tensor, shared: Tensor) -> Tensor:
    """The part of the shared runs before the own ones; all of it where the own are empty."""
    limit = torch.where(own[..., BEGIN] < own[..., END], own[..., BEGIN], FAR)
    return torch.minimum(shared, limit.unsqueeze(-1).int())


def _right_of(own: Tensor, shared: Tensor) -> Tensor:
    """The part of the shared runs behind the own ones; nothing where the own are empty."""
    limit = torch.where(own[..., BEGIN] < own[..., END], own[..., END], FAR).unsqueeze(-1).int()
    return torch.minimum(torch.maximum(shared, limit), torch.maximum(shared[..., END:], limit))


def _transposed(query_runs: Tensor, num_key_tiles: int) -> tuple[Tensor, bool]:
    """int32 [B, P, K, 4]: for each key tile the run of query tiles that see it; and whether one covers others too.

    If the query tiles for which it is full are not all next to each other, none of them is called full.
    """
    first, last, num_seen = _extent(query_runs[..., BEGIN], query_runs[..., END], num_key_tiles)
    full_first, full_last, num_full = _extent(query_runs[..., FULL_BEGIN], query_runs[..., FULL_END], num_key_tiles)
    is_run = (num_full > 0) & (num_full == full_last + 1 - full_first)
    begin, end = torch.where(last < 0, 0, first), last + 1
    full_begin = torch.where(is_run, full_first, end)
    full_end = torch.where(is_run, full_last + 1, end)
    has_gaps = bool((num_seen < end - begin).any())
    return torch.stack([begin, full_begin, full_end, end], dim=-1).int(), has_gaps


def _extent(begins: Tensor, ends: Tensor, num_key_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last query tile, and how many, whose ranges [begin, end) hold each key tile; int64 [B, P, K].

    Ranges are [B, P, Q, 3]. Each is covered by two overlapping ranges whose length is a power of two; these are noted
    in a table with a level for each power, which is then handed down level by level: O((Q + K) log K).
    """
    batch, heads, num_query_tiles, runs = begins.shape
    device = begins.device
    begins, ends = begins.reshape(batch * heads, -1).long(), ends.reshape(batch * heads, -1).long()
    query = torch.arange(num_query_tiles, device=device).repeat_interleave(runs).expand_as(begins)
    lengths = (ends - begins).clamp(min=0)
    levels = max(1, num_key_tiles).bit_length()
    level = torch.where(lengths > 0, lengths.double().log2().floor().long(), 0)
    first = torch.full((batch * heads, levels, num_key_tiles), FAR, device=device)
    last = torch.full((batch * heads, levels, num_key_tiles), -1, device=device)
    for place in (begins, ends - (1 << level)):
        # Empty ranges are noted nowhere: they write neutral values to place 0.
        index = torch.where(lengths > 0, level * num_key_tiles + place, 0)
        first.view(batch * heads, -1).scatter_reduce_(1, index, torch.where(lengths > 0, query, FAR), "amin")
        last.view(batch * heads, -1).scatter_reduce_(1, index, torch.where(lengths > 0, query, -1), "amax")
    for high in range(levels - 1, 0, -1):
        half = 1 << (high - 1)
        for table, reduce in ((first, torch.minimum), (last, torch.maximum)):
            table[:, high - 1] = reduce(table[:, high - 1], table[:, high])
            if half < num_key_tiles:
                table[:, high - 1, half:] = reduce(table[:, high - 1, half:], table[:, high, :-half])
    changes = torch.zeros(batch * heads, num_key_tiles + 1, dtype=torch.int64, device=device)
    changes.scatter_add_(1, torch.where(lengths > 0, begins, 0), (lengths > 0).long())
    changes.scatter_add_(1, torch.where(lengths > 0, ends, 0), -(lengths > 0).long())
    counts = changes.cumsum(dim=1)[:, :-1]
    shape = (batch, heads, num_key_tiles)
    return first[:, 0].view(shape), last[:, 0].view(shape), counts.view(shape)


def _lists(
    plan: AttentionPlan, own: Tensor, shared: Tensor, query_tile: int, key_tile: int
) -> tuple[TileLists, TileLists]:
    """Entries by query tile, and by key tile."""
    assert plan.blocks is not None
    num_query_tiles, num_key_tiles = own.shape[2], -(-plan.k_tokens // key_tile)
    own, shared = own.flatten(0, 2), shared.flatten(0, 2)
    listed_rows, listed_tiles = _listed_tiles(plan, num_query_tiles, query_tile, key_tile)
    kept = (own[listed_rows, BEGIN] <= listed_tiles) & (listed_tiles < own[listed_rows, END])
    listed_rows, listed_tiles = listed_rows[kept], listed_tiles[kept]
    shared_rows, shared_tiles = _expand(shared[:, BEGIN], shared[:, END])
    is_new = ~torch.isin(shared_rows * num_key_tiles + shared_tiles, listed_rows * num_key_tiles + listed_tiles)
    rows = torch.cat([listed_rows, shared_rows[is_new]])
    tiles = torch.cat([listed_tiles, shared_tiles[is_new]])
    listed = torch.arange(len(rows), device=rows.device) < len(listed_rows)
    full = listed & (own[rows, FULL_BEGIN] <= tiles) & (tiles < own[rows, FULL_END])
    full |= (shared[rows, FULL_BEGIN] <= tiles) & (tiles < shared[rows, FULL_END])
    heads = (plan.batch, plan.plan_heads)
    by_query = _compress(rows, tiles, listed, full, (*heads, num_query_tiles), num_key_tiles)
    head, query = rows // num_query_tiles, rows % num_query_tiles
    by_key = _compress(head * num_key_tiles + tiles, query, listed, full, (*heads, num_key_tiles), num_query_tiles)
    return by_query, by_key


def _listed_tiles(plan: AttentionPlan, num_query_tiles: int, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor]:
    """(row, key tile) of every listed block, cut into tiles; rows count (b, p, query tile)."""
    assert plan.blocks is not None
    blocks = plan.blocks
    device, edge = plan.device, blocks.block_tokens
    list_of_tile = torch.arange(num_query_tiles, device=device) // (edge // query_tile)
    begins = blocks.offsets[..., :-1][..., list_of_tile].flatten()
    ends = blocks.offsets[..., 1:][..., list_of_tile].flatten()
    rows, places = _expand(begins, ends)
    per_block = edge // key_tile
    tiles = blocks.keys[places].long()[:, None] * per_block + torch.arange(per_block, device=device)
    rows, tiles = rows[:, None].expand_as(tiles).flatten(), tiles.flatten()
    inside = tiles < -(-plan.k_tokens // key_tile)
    return rows[inside], tiles[inside]


def _expand(begins: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """(row, value) for every value of the ranges [begin, end) of each row, int64."""
    begins, ends = begins.long(), ends.long()
    counts = (ends - begins).clamp(min=0)
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return rows, begins[rows] + torch.arange(len(rows), device=counts.device) - starts[rows]


def _compress(
    rows: Tensor, tiles: Tensor, listed: Tensor, full: Tensor, shape: tuple[int, int, int], num_tiles: int
) -> TileLists:
    order = ((rows * 2 + (~full).long()) * num_tiles + tiles).argsort()
    num_rows = shape[0] * shape[1] * shape[2]
    num_full = torch.zeros(num_rows, dtype=torch.int64, device=rows.device).index_add_(0, rows, full.long())
    counts = torch.bincount(rows, minlength=num_rows)
    ends = counts.cumsum(0)
    offsets = torch.stack([ends - counts, ends - counts + num_full, ends], dim=-1)
    return TileLists(offsets.view(*shape, 3), (tiles * 2 + listed.long())[order].int())


def _items(work: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of key tiles, whose work is int [B * K]: items of work, the tiles that are split, slots; see `TilePlan`."""
    device, work = work.device, work.long()
    # Twice the mean: nothing that is launched early enough then outlasts the rest.
    most = (2 * -(-work.sum() // len(work))).clamp(min=1)
    chunks = (-(-work // most)).clamp(1, MOST_CHUNKS)
    is_split = chunks > 1
    in_slots = torch.where(is_split, chunks, 0)
    first_slot = in_slots.cumsum(0) - in_slots
    # One read of the device for all sizes.
    num_items, num_splits, num_slots = torch.stack([chunks.sum(), is_split.sum(), in_slots.sum()]).tolist()
    tile = torch.arange(len(work), device=device).repeat_interleave(chunks, output_size=num_items)
    chunk = torch.arange(num_items, device=device) - (chunks.cumsum(0) - chunks)[tile]
    slot = torch.where(is_split[tile], first_slot[tile] + chunk, -1)
    order = (work[tile] // chunks[tile]).argsort(descending=True, stable=True)
    items = torch.stack([tile, chunk, chunks[tile], slot], dim=1)[order].int()
    places = is_split.byte().argsort(descending=True, stable=True)[:num_splits]
    return items, torch.stack([places, first_slot[places], chunks[places]], dim=1).int(), num_slots
