"""The attention patterns that the kernels are timed on, as plans, and as what other libraries are told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ropewalk.kernels.attention import (
    AttentionPlan,
    BlockLists,
    anchor,
    block_lists,
    causal,
    document,
    shared_prefix,
    shifted_groups,
    sliding_window,
)


@dataclass(frozen=True)
class Shape:
    """Of one timed attention: batch 1."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Case:
    """One pattern at one length."""

    pattern: str
    setting: str
    """What the density comes from, for people."""
    tokens: int
    build: Callable[[], AttentionPlan]
    """Makes the plan, on the device."""
    details: dict[str, Any] = field(default_factory=dict)
    """starts: of documents; window_tokens, num_sinks."""


def cases(names: list[str], tokens: int, shape: Shape) -> list[Case]:
    """Those of these patterns, each at its densities, that make sense at this length."""
    return [case for name in names for case in PATTERNS[name](tokens, shape)]


def even_starts(tokens: int, documents: int, first: int = 0) -> list[int]:
    """Starts of equally long documents from `first` on, with a document of what lies before."""
    step = (tokens - first) // documents
    return ([0] if first else []) + [first + n * step for n in range(documents)]


def _causal(tokens: int, shape: Shape) -> list[Case]:
    return [Case("causal", "all", tokens, lambda: causal(1, tokens).to(shape.device))]


def _documents(tokens: int, shape: Shape) -> list[Case]:
    return [_document_case("document", tokens, count, 0, shape) for count in (4, 16, 64) if tokens // count >= 64]


def _anchors(tokens: int, shape: Shape) -> list[Case]:
    return [_document_case("anchor", tokens, count, 1, shape) for count in (4, 16, 64) if tokens // count >= 64]


def _document_case(pattern: str, tokens: int, count: int, first: int, shape: Shape) -> Case:
    starts = even_starts(tokens, count, first)
    make = anchor if pattern == "anchor" else document
    return Case(
        pattern, f"{count} documents", tokens, lambda: make([starts], tokens).to(shape.device), {"starts": starts}
    )


def _windows(tokens: int, shape: Shape) -> list[Case]:
    found = []
    for window in {min(4096, tokens // 4), tokens // 16}:
        details = {"window_tokens": window, "num_sinks": 4}
        found.append(
            Case(
                "sliding_window", f"window {window}, 4 sinks", tokens,
                lambda details=details: sliding_window([[0]], tokens, **details).to(shape.device), details,
            )
        )  # fmt: skip
    return found


def _shifted_groups(tokens: int, shape: Shape) -> list[Case]:
    size = tokens // 4
    return [
        Case(
            "shifted_groups", f"groups of {size}", tokens,
            lambda: shifted_groups([[0]], tokens, group_tokens=size).to(shape.device),
        )
    ]  # fmt: skip


def _shared_prefixes(tokens: int, shape: Shape) -> list[Case]:
    half = tokens // 2
    answers = [half + n * (half // 8) for n in range(8)]
    return [
        Case(
            "shared_prefix", "8 answers to half the row", tokens,
            lambda: shared_prefix([[[0, *answers]]], tokens).to(shape.device),
        )
    ]  # fmt: skip


def _block_lists(tokens: int, shape: Shape) -> list[Case]:
    return [
        Case(
            "block_lists", f"{density:.0%} listed", tokens,
            lambda density=density: block_lists(random_blocks(tokens, density, shape), [[0]], tokens),
        )
        for density in (0.75, 0.5, 0.25, 0.1, 0.05)
    ]  # fmt: skip


@lru_cache(maxsize=1)
def random_blocks(tokens: int, density: float, shape: Shape) -> BlockLists:
    """For each key/value head: the own block, the first, and so many others that the share of pairs is `density`."""
    edge = 128 if tokens >= 2048 else 32
    blocks = -(-tokens // edge)
    generator = torch.Generator(device=shape.device).manual_seed(0)
    chance = torch.rand(1, shape.num_kv_heads, blocks, blocks, generator=generator, device=shape.device)
    block = torch.arange(blocks, device=shape.device)
    forced = (block == 0) | (block == block[:, None])
    wanted = density * blocks * (blocks + 1) / 2
    free = max(1.0, blocks * (blocks + 1) / 2 - (2 * blocks - 1))
    listed = forced | ((chance < (wanted - (2 * blocks - 1)) / free) & (block <= block[:, None]))
    return BlockLists.from_map(listed, edge)


def inputs(tokens: int, shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, dout): normal, rounded to the dtype; zeros would run faster than real data. q, k, v want gradients."""
    generator = torch.Generator(device=shape.device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        size = (1, heads, tokens, shape.head_dim)
        return torch.randn(size, generator=generator, device=shape.device, dtype=torch.float32).to(shape.dtype)

    q, dout = draw(shape.num_heads), draw(shape.num_heads)
    k, v = draw(shape.num_kv_heads), draw(shape.num_kv_heads)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


PATTERNS: dict[str, Callable[[int, Shape], list[Case]]] = {
    "causal": _causal,
    "document": _documents,
    "anchor": _anchors,
    "sliding_window": _windows,
    "shifted_groups": _shifted_groups,
    "shared_prefix": _shared_prefixes,
    "block_lists": _block_lists,
}
