"""The blocks of packed rows, and what every estimator does on them: pooling, ranking, handing over lists.

A block is `block_tokens` positions of the row, counted from the row's start, so documents need not begin at an edge. A
method that is defined on one sequence is run on each document by itself; where two documents share a block of queries,
its list is the union of theirs. The plan's intervals keep the documents apart afterwards.

Shape legend: B batch, H query heads, G key/value heads, L tokens of a row, M tokens of a document, N blocks of a row,
D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import DocumentStarts, document
from ..plan import BlockLists


@dataclass(frozen=True)
class Document:
    """A document that reaches over more than one block; any other sees its own block and there is nothing to choose."""

    row: int
    start: int
    """First position in the row."""
    stop: int
    """End in the row, exclusive."""
    block_tokens: int

    @property
    def num_tokens(self) -> int:
        """M."""
        return self.stop - self.start

    @property
    def blocks(self) -> slice:
        """The blocks of the row that hold its tokens."""
        return slice(self.start // self.block_tokens, (self.stop - 1) // self.block_tokens + 1)

    @property
    def num_blocks(self) -> int:
        """How many blocks hold its tokens."""
        return self.blocks.stop - self.blocks.start

    def of(self, x: Tensor) -> Tensor:
        """[heads, M, D]: its part of [B, heads, L, D]."""
        return x[self.row, :, self.start : self.stop]

    def area(self, block_map: Tensor) -> Tensor:
        """A view of [B, H, N, N] that holds its own pairs of blocks."""
        return block_map[self.row, :, self.blocks, self.blocks]


@dataclass(frozen=True, eq=False)
class BlockGrid:
    """The pairs of blocks of a batch of packed rows."""

    document_starts: DocumentStarts
    row_tokens: int
    block_tokens: int
    reachable: Tensor
    """bool [B, 1, N, N]: some query of the block sees some key of the other: causal, and inside a document."""
    first: Tensor
    """bool [B, 1, N, N]: where the document of the block's first query begins."""

    @classmethod
    def of(cls, document_starts: DocumentStarts, row_tokens: int, block_tokens: int, device: torch.device) -> BlockGrid:
        """Raises ValueError for starts that are no packing, and for blocks that are no power of two of at least 16."""
        if block_tokens < 16 or block_tokens & (block_tokens - 1):
            raise ValueError(f"block_tokens must be a power of two, 16 or more, got {block_tokens}")
        starts = document(document_starts, row_tokens).lo[..., ::block_tokens].to(device)
        block = torch.arange(starts.shape[-1], device=device)
        first_block = (starts // block_tokens).unsqueeze(-1)
        reachable = (first_block <= block) & (block <= block[:, None])
        return cls(document_starts, row_tokens, block_tokens, reachable, first_block == block)

    @property
    def num_blocks(self) -> int:
        """N."""
        return self.reachable.shape[-1]

    @property
    def own(self) -> Tensor:
        """bool [N, N]: the diagonal."""
        return torch.eye(self.num_blocks, dtype=torch.bool, device=self.reachable.device)

    def zeros(self, num_heads: int, dtype: torch.dtype) -> Tensor:
        """[B, H, N, N] to collect a map in."""
        shape = (len(self.document_starts), num_heads, self.num_blocks, self.num_blocks)
        return torch.zeros(shape, dtype=dtype, device=self.reachable.device)

    def documents(self) -> Iterator[Document]:
        """The documents of all rows that reach over more than one block."""
        for row, starts in enumerate(self.document_starts):
            for start, stop in zip(starts, [*starts[1:], self.row_tokens], strict=True):
                found = Document(row, start, stop, self.block_tokens)
                if found.num_blocks > 1:
                    yield found

    def lists(self, block_map: Tensor) -> BlockLists:
        """Lists of a bool map [B, H, N, N]: what is reachable of it, and each block itself."""
        return BlockLists.from_map((block_map | self.own) & self.reachable, self.block_tokens)


def grid_of(q: Tensor, k: Tensor, document_starts: DocumentStarts, block_tokens: int) -> BlockGrid:
    """The grid of q [B, H, L, D] and k [B, G, L, D]. Raises ValueError where they do not fit, naming the shapes."""
    shapes = f"q {list(q.shape)} and k {list(k.shape)}"
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q must be [batch, heads, tokens, head_dim] and k the same but for heads, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got {shapes}")
    if len(document_starts) != q.shape[0]:
        raise ValueError(f"document_starts must have one list for each row, got {len(document_starts)} for {shapes}")
    return BlockGrid.of(document_starts, q.shape[2], block_tokens, q.device)


def share_in_groups(lists: BlockLists, plan_heads: int, num_key_blocks: int) -> BlockLists:
    """Fewer plan heads: what any head of a group listed is listed for the group, heads in order.

    With as many plan heads as key/value heads, attention need not repeat these for their query heads.

    Raises ValueError if `plan_heads` does not divide those of the lists.
    """
    block_map = lists.to_map(num_key_blocks)
    if plan_heads < 1 or block_map.shape[1] % plan_heads:
        raise ValueError(f"plan_heads must divide the {block_map.shape[1]} of the lists, got {plan_heads}")
    return BlockLists.from_map(block_map.unflatten(1, (plan_heads, -1)).any(dim=2), lists.block_tokens)


def check_fraction(**fractions: float) -> None:
    """Raises ValueError for a value that is not in [0, 1], naming it."""
    for name, value in fractions.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_at_least(**limits: tuple[float, float]) -> None:
    """Raises ValueError for a (value, least) whose value is smaller, naming it."""
    for name, (value, least) in limits.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def scale_of(q: Tensor, scale: float | None) -> float:
    """1 / sqrt(D) unless it is given."""
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q [H, I, D] by k [G, J, D]: [H, I, J] in fp32 or better, consecutive query heads sharing a key head."""
    working = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(working).unflatten(0, (k.shape[0], -1))
    return (grouped @ k.to(working).transpose(-1, -2).unsqueeze(1)).flatten(0, 1)


def block_sum(x: Tensor, start: int, block_tokens: int) -> Tensor:
    """[..., blocks]: sums of x [..., M], whose first element lies at `start` of the row, over blocks of the row."""
    before = start % block_tokens
    padded = torch.nn.functional.pad(x, (before, -(before + x.shape[-1]) % block_tokens))
    return padded.unflatten(-1, (-1, block_tokens)).sum(dim=-1)


def block_mean(x: Tensor, start: int, block_tokens: int) -> Tensor:
    """[heads, blocks, D]: means of x [heads, M, D] over the tokens that a block has of it; fp32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    counts = block_sum(torch.ones_like(x[0, :, 0]), start, block_tokens)
    return block_sum(x.transpose(-1, -2), start, block_tokens).transpose(-1, -2) / counts[:, None]


def largest(values: Tensor, counts: Tensor | int) -> Tensor:
    """bool like `values` [..., J]: the `counts` [...] largest of each row, the first of equal ones."""
    order = values.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(values.shape[-1], device=values.device)
    kept = place < (counts.unsqueeze(-1) if isinstance(counts, Tensor) else counts)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, kept.expand_as(order))


def covering(values: Tensor, needed: Tensor | float) -> Tensor:
    """bool like `values` [..., J], which are not negative: the fewest, largest first, whose sum reaches `needed` [...].

    A sum that falls short of it keeps everything but zeros. Ties go to the first.
    """
    ordered, order = values.double().sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = (before < (needed.unsqueeze(-1) if isinstance(needed, Tensor) else needed)) & (ordered > 0)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, kept)


def last_probabilities(q: Tensor, k: Tensor, num_queries: int, scale: float) -> Tensor:
    """[H, I, M]: causal attention probabilities of the last I = min(num_queries, M) queries of a document.

    q is [H, M, D] and k [G, M, D].
    """
    num_tokens = k.shape[1]
    last = q[:, -num_queries:]
    position = torch.arange(num_tokens, device=q.device)
    found = scores(last, k) * scale
    return found.masked_fill(position > position[-last.shape[1] :, None], -torch.inf).softmax(dim=-1)


def distance_sums(probabilities: Tensor) -> Tensor:
    """[H, M]: the sums of [H, I, M], of the last I of M queries, by distance from query to key."""
    heads, num_queries, num_tokens = probabilities.shape
    padded = torch.nn.functional.pad(probabilities, (num_queries - 1, 0)).contiguous()
    width = padded.shape[-1]
    # Row r, column r + n: all of one distance. Sums over views need no atomics, so the bits do not change.
    diagonals = padded.as_strided((heads, num_tokens, num_queries), (num_queries * width, 1, width + 1))
    return diagonals.sum(dim=-1).flip(-1)
