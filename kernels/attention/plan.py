"""Which keys each query sees: the one description of a mask that every attention implementation reads.

Query i sees key j iff

    lo[i] <= j <= hi[i], and the block of j is listed for the block of i, where there are lists      own interval
    or  glo[i] <= j < ghi[i]                                                                       shared interval

The own interval is a query's neighbourhood (its document, a window); the shared one is what many queries see (an
anchor, attention sinks, a prompt that several answers continue). Either may be empty; where they overlap a key still
counts once. Memory is linear in the sequence length, and in the listed blocks. Position ids play no part: they are
data, used by rotary embeddings outside.

Heads may differ: a plan has P plan heads, and query head h of H reads plan head `h * P // H`; P divides H.

Shape legend: B batch, P plan heads, L query tokens, S key tokens, N listed blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .pieces import Piece, decompose

if TYPE_CHECKING:
    from .tiles import TilePlan

FIELDS = ("lo", "hi", "glo", "ghi")
LARGEST_TILE = 128
"""Of queries. What belongs to queries is padded to a multiple of it, so that kernels read tiles without a mask."""


@dataclass(frozen=True, eq=False)
class BlockLists:
    """For each block of queries the blocks of keys that it may see, as compressed rows.

    Raises ValueError if the parts do not fit each other.
    """

    offsets: Tensor
    """int64 [B, P, ceil(L / block_tokens) + 1]: list n of (b, p) is `keys[offsets[b, p, n] : offsets[b, p, n + 1]]`."""
    keys: Tensor
    """int32 [N]: numbers of key blocks, ascending inside a list."""
    block_tokens: int
    """Edge of a block, for queries and keys alike."""

    def __post_init__(self) -> None:
        if self.offsets.dim() != 3 or self.offsets.dtype != torch.int64 or self.keys.dtype != torch.int32:
            raise ValueError("block lists need offsets int64 [batch, plan_heads, blocks + 1] and keys int32 [blocks]")
        if self.block_tokens < 16 or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"block_tokens must be a power of two, 16 or more, got {self.block_tokens}")
        edges = self.offsets.flatten()
        if int(edges[0]) != 0 or int(edges[-1]) != len(self.keys) or bool((edges.diff() < 0).any()):
            raise ValueError(f"offsets must ascend from 0 to the {len(self.keys)} listed blocks")
        ascends = self.keys.diff() > 0
        starts = self.offsets[..., :-1].flatten()
        ascends[starts[(starts > 0) & (starts < len(self.keys))] - 1] = True
        if not bool(ascends.all()):
            raise ValueError("the key blocks of a list must ascend, each once")

    @classmethod
    def from_map(cls, block_map: Tensor, block_tokens: int) -> BlockLists:
        """Lists of a bool map [B, P, query blocks, key blocks]: True where a block is listed."""
        counts = block_map.sum(dim=-1)
        edges = torch.cat([counts.new_zeros(1), counts.flatten().cumsum(0)])
        num_blocks = block_map.shape[2]
        first = torch.arange(counts.shape[0] * counts.shape[1], device=counts.device) * num_blocks
        places = first[:, None] + torch.arange(num_blocks + 1, device=counts.device)
        offsets = edges[places].view(*counts.shape[:2], num_blocks + 1)
        return cls(offsets, block_map.nonzero()[:, 3].int(), block_tokens)

    def to_map(self, num_key_blocks: int) -> Tensor:
        """The bool map [B, P, query blocks, key blocks]."""
        counts = self.offsets.diff(dim=-1)
        rows = torch.arange(counts.numel(), device=self.keys.device).repeat_interleave(counts.flatten())
        block_map = torch.zeros(counts.numel(), num_key_blocks, dtype=torch.bool, device=self.keys.device)
        block_map[rows, self.keys.long()] = True
        return block_map.view(*counts.shape, num_key_blocks)

    def to(self, device: torch.device | str) -> BlockLists:
        """The same lists on another device."""
        moved = copy.copy(self)
        for name in ("offsets", "keys"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Row intervals of a batch. Build it with a pattern (`patterns.py`); compare plans by `visible()`.

    Raises ValueError if a tensor has another shape, dtype or device than the rest, or reaches outside the keys.
    """

    lo: Tensor
    """int32 [B, P, L]: first key of the own interval; `lo > hi` makes it empty."""
    hi: Tensor
    """int32 [B, P, L]: last key of the own interval, inclusive."""
    glo: Tensor
    """int32 [B, P, L]: first key of the shared interval; `glo >= ghi` makes it empty."""
    ghi: Tensor
    """int32 [B, P, L]: end of the shared interval, exclusive."""
    k_tokens: int
    """S, the number of keys."""
    blocks: BlockLists | None = None
    """Of the own interval, only what lies in these blocks. None: all of it."""

    def __post_init__(self) -> None:
        if self.lo.dim() != 3 or self.lo.numel() == 0:
            raise ValueError(
                f"lo must be [batch, plan_heads, q_tokens] with no empty dimension, got {list(self.lo.shape)}"
            )
        for name in FIELDS:
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {tensor.dtype}")
            if tensor.shape != self.lo.shape or tensor.device != self.lo.device:
                raise ValueError(
                    f"{name} must match lo in shape and device, got {list(tensor.shape)} on {tensor.device} "
                    f"and {list(self.lo.shape)} on {self.lo.device}"
                )
        # One read of the device for all of them.
        extremes = torch.stack([edge for name in FIELDS for edge in getattr(self, name).aminmax()]).view(-1, 2)
        limits = ((0, self.k_tokens), (-1, self.k_tokens - 1), (0, self.k_tokens), (0, self.k_tokens))
        for name, (smallest, largest), (least, most) in zip(FIELDS, extremes.tolist(), limits, strict=True):
            if smallest < least or largest > most:
                raise ValueError(
                    f"{name} must lie in [{least}, {most}] for k_tokens={self.k_tokens}, "
                    f"got values from {smallest} to {largest}"
                )
        self._check_blocks()

    def _check_blocks(self) -> None:
        if self.blocks is None:
            return
        edge = self.blocks.block_tokens
        expected = [self.batch, self.plan_heads, -(-self.q_tokens // edge) + 1]
        if list(self.blocks.offsets.shape) != expected:
            raise ValueError(f"block offsets must be {expected}, got {list(self.blocks.offsets.shape)}")
        if self.blocks.keys.device != self.device:
            raise ValueError(f"the block lists are on {self.blocks.keys.device}, the intervals on {self.device}")
        if len(self.blocks.keys):
            smallest, largest = (int(edge) for edge in self.blocks.keys.aminmax())
            if smallest < 0 or largest >= -(-self.k_tokens // edge):
                raise ValueError(f"listed key blocks must lie inside {self.k_tokens} keys, got {smallest} to {largest}")

    @property
    def batch(self) -> int:
        """B."""
        return self.lo.shape[0]

    @property
    def plan_heads(self) -> int:
        """P: 1 if all heads see the same."""
        return self.lo.shape[1]

    @property
    def q_tokens(self) -> int:
        """L."""
        return self.lo.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the intervals lie; q, k and v must lie there too."""
        return self.lo.device

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan on another device."""
        moved = copy.copy(self)
        for name in FIELDS:
            object.__setattr__(moved, name, getattr(self, name).to(device))
        object.__setattr__(moved, "blocks", None if self.blocks is None else self.blocks.to(device))
        object.__setattr__(moved, "_tiles", {})
        object.__setattr__(moved, "_windows", {})
        moved.__dict__.pop("padded_intervals", None)
        return moved

    def visible(self) -> Tensor:
        """The dense mask, bool [B, P, L, S]: True where the query sees the key. Quadratic in memory."""
        key = torch.arange(self.k_tokens, device=self.device)
        lo, hi, glo, ghi = (getattr(self, name).unsqueeze(-1) for name in FIELDS)
        own = (lo <= key) & (key <= hi)
        if self.blocks is not None:
            edge = self.blocks.block_tokens
            listed = self.blocks.to_map(-(-self.k_tokens // edge))
            query = torch.arange(self.q_tokens, device=self.device)
            own &= listed[:, :, query // edge][..., key // edge]
        return own | ((glo <= key) & (key < ghi))

    def intervals(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The keys of a plan without blocks as three disjoint half-open intervals: own, shared left and right of it.

        Each is a pair (start, stop) of int64 [B, P, L]; `start >= stop` is empty.
        """
        lo, hi, glo, ghi = (getattr(self, name).long() for name in FIELDS)
        # An empty own interval cuts nothing off: all of the shared one then counts as left of it.
        is_empty = lo > hi
        left_stop = torch.where(is_empty, ghi, torch.minimum(ghi, lo))
        right_start = torch.where(is_empty, ghi, torch.maximum(glo, hi + 1))
        return (lo, hi + 1), (glo, left_stop), (right_start, ghi)

    def num_visible(self) -> Tensor:
        """Visible query-key pairs of each plan head, int64 [B, P]."""
        counts = [(stop - start).clamp(min=0).sum(dim=-1) for start, stop in self.intervals()]
        if self.blocks is None:
            return torch.stack(counts).sum(dim=0)
        return self._num_listed() + counts[1] + counts[2] + self._num_shared_unlisted()

    def density(self) -> float:
        """Visible pairs as a share of what plain causal attention over as many tokens sees."""
        first = self.k_tokens - self.q_tokens + 1
        num_causal = torch.arange(first, self.k_tokens + 1).clamp(min=0).sum().item() * self.batch * self.plan_heads
        return self.num_visible().sum().item() / num_causal

    def _num_listed(self) -> Tensor:
        """int64 [B, P]: pairs of the own intervals that lie in listed blocks."""
        return self._sum_over_lists(self.lo, self.hi + 1)

    def _num_shared_unlisted(self) -> Tensor:
        """int64 [B, P]: pairs of the shared intervals that lie in the own one, but in no listed block."""
        start, stop = torch.maximum(self.lo, self.glo), torch.minimum(self.hi + 1, self.ghi)
        inside = (stop - start).clamp(min=0).sum(dim=-1)
        return inside - self._sum_over_lists(start, stop)

    def _sum_over_lists(self, start: Tensor, stop: Tensor) -> Tensor:
        """int64 [B, P]: keys of [start, stop) in listed blocks, over all queries."""
        assert self.blocks is not None
        edge = self.blocks.block_tokens
        counts = self.blocks.offsets.diff(dim=-1)
        padding = counts.shape[-1] * edge - self.q_tokens
        # [B * P * query blocks, edge]; queries beyond the last see nothing.
        starts, stops = (torch.nn.functional.pad(x, (0, padding)).view(-1, edge) for x in (start, stop))
        rows = torch.arange(counts.numel(), device=self.device).repeat_interleave(counts.flatten())
        totals = torch.zeros(counts.numel(), dtype=torch.int64, device=self.device)
        for part in torch.arange(len(rows), device=self.device).split(2**14):
            first = self.blocks.keys[part, None] * edge
            low, high = torch.maximum(starts[rows[part]], first), torch.minimum(stops[rows[part]], first + edge)
            totals.index_add_(0, rows[part], (high - low).clamp(min=0).sum(dim=-1))
        return totals.view(counts.shape).sum(dim=-1)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The visible area of a plan without blocks, cut into rectangles and causal triangles, each pair in one.

        The rows of a piece count `b * P + p`. Worked out once. Raises ValueError for a plan with blocks.
        """
        if self.blocks is not None:
            raise ValueError("a plan with block lists has no pieces: use its tiles")
        return decompose([(start.flatten(0, 1), stop.flatten(0, 1)) for start, stop in self.intervals()])

    @cached_property
    def num_breaks(self) -> int:
        """Queries that see neither the keys of the one before nor those and the next one, the first of a row excepted.

        So many pieces there are, or about, beyond one a row; without cutting them. Worked out once.
        """
        changes = self.lo.diff(dim=-1) != 0
        changes |= ~torch.isin(self.hi.diff(dim=-1), torch.tensor([0, 1], device=self.device))
        changes |= (self.glo.diff(dim=-1) != 0) | (self.ghi.diff(dim=-1) != 0)
        return int(changes.sum())

    @cached_property
    def padded_intervals(self) -> Tensor:
        """int32 [B, P, 4, L up to a multiple of 128], contiguous: lo, hi, glo, ghi as kernels read them, 0 behind L.

        Worked out once, so that layers share it.
        """
        intervals = torch.stack([getattr(self, name) for name in FIELDS], dim=2)
        return torch.nn.functional.pad(intervals, (0, -self.q_tokens % LARGEST_TILE))

    def tiles(self, query_tile: int, key_tile: int) -> TilePlan:
        """What kernels with these tile sizes visit. Worked out once for each pair of sizes."""
        from .tiles import build_tiles

        if (query_tile, key_tile) not in self._tiles:
            self._tiles[query_tile, key_tile] = build_tiles(self, query_tile, key_tile)
        return self._tiles[query_tile, key_tile]

    @cached_property
    def _tiles(self) -> dict[tuple[int, int], TilePlan]:
        return {}

    def within_window(self, window_tokens: int) -> AttentionPlan:
        """The same plan less the keys `window_tokens` or more places before the query: what sliding-window layers see.

        Query i stands at key i + S - L: with more keys than queries (a KV cache) the queries are the last. Worked out
        once for each window, so that layers share it. Raises ValueError for a window below 1.
        """
        if window_tokens < 1:
            raise ValueError(f"window_tokens must be at least 1, got {window_tokens}")
        if window_tokens not in self._windows:
            place = torch.arange(self.k_tokens - self.q_tokens, self.k_tokens, dtype=torch.int32, device=self.device)
            first = (place - (window_tokens - 1)).clamp(min=0)
            narrowed = {"lo": torch.maximum(self.lo, first), "glo": torch.maximum(self.glo, first)}
            self._windows[window_tokens] = replace(self, **narrowed)
        return self._windows[window_tokens]

    @cached_property
    def _windows(self) -> dict[int, AttentionPlan]:
        return {}

    @classmethod
    def stack(cls, plans: Sequence[AttentionPlan]) -> AttentionPlan:
        """One batch out of several plans, whose patterns may differ.

        Raises ValueError if there is none, one has block lists, or they differ in `plan_heads`, `q_tokens`, `k_tokens`
        or device.
        """
        if not plans:
            raise ValueError("stack needs at least one plan")
        shapes = {(plan.plan_heads, plan.q_tokens, plan.k_tokens, plan.device) for plan in plans}
        if len(shapes) > 1:
            raise ValueError(f"plans to stack must agree in (plan_heads, q_tokens, k_tokens, device), got {shapes}")
        if any(plan.blocks is not None for plan in plans):
            raise ValueError("plans with block lists are not stacked: estimate the lists for the whole batch")
        tensors = [torch.cat([getattr(plan, name) for plan in plans]) for name in FIELDS]
        return cls(*tensors, k_tokens=plans[0].k_tokens)
