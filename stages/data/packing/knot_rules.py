"""What `utk` can be told: which rows are cut how, and which tokens that inserts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from ropewalk.stages.schema import Record

HOP_TOKENS = ("<|hop_head|>", "<|/hop_head|>", "<|hop_tail|>", "<|/hop_tail|>")
BACKTRACING_TOKENS = ("<D>", "</D>", "<S>", "<s>", "</S>")


def _check_distribution(name: str, probabilities: Sequence[float]) -> None:
    if not probabilities or min(probabilities) < 0 or abs(sum(probabilities) - 1) > 1e-9:
        raise ValueError(f"{name} must be non-negative and add up to 1, not {list(probabilities)}")


class RowKind(Record):
    """How the documents of some rows are cut: into a drawn number of chunks, or into chunks of one length."""

    rows_fraction: float = Field(ge=0, le=1)
    """Share of the rows, a probability."""
    chunk_probabilities: tuple[float, ...] | None = None
    """Probability of 1, 2, ... chunks for each document. `(1.0,)` leaves the rows as they are."""
    hop_tokens: int | None = Field(default=None, ge=1)
    """Instead: cut every document each so many tokens. 1024 in the published code."""
    arrangement: Literal["knots", "turns"] = "knots"
    """`knots`: shuffle the chunks. `turns`: the documents take turns, chunk by chunk, without markers, ids or shuffle
    (chunk-interleaved pretraining, CIP: the paper's baseline, `skywork_interleave` in the published code)."""

    @model_validator(mode="after")
    def _one_way(self) -> RowKind:
        if (self.chunk_probabilities is None) == (self.hop_tokens is None):
            raise ValueError("a row kind needs either chunk_probabilities or hop_tokens")
        if self.chunk_probabilities is not None:
            _check_distribution("chunk_probabilities", self.chunk_probabilities)
        return self


class KnotRules(Record):
    """How rows are cut and tied."""

    row_kinds: tuple[RowKind, ...] = (
        RowKind(rows_fraction=0.7, chunk_probabilities=(1.0,)),
        RowKind(rows_fraction=0.3, chunk_probabilities=(0.0, 0.0, 1.0)),
    )
    """Kinds of rows; their shares add up to 1. Published: 0.3 or 0.8 of the rows cut, best with 2 or 3 chunks."""
    cuts: Literal["uniform", "equal"] = "uniform"
    """Cut at distinct places drawn uniformly, or into chunks of equal length (the last takes the rest)."""
    preserve_partial_order: bool = True
    """Keep the chunks of a document in their order. The better published setting."""
    enable_backtracing: bool = False
    """Give chunks ids, and list those of a document in order after its last. Better in the paper; costs more tokens."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> KnotRules:
        _check_distribution("rows_fraction of row_kinds", [kind.rows_fraction for kind in self.row_kinds])
        return self

    @property
    def knotted(self) -> list[RowKind]:
        """The kinds whose chunks have markers."""
        return [kind for kind in self.row_kinds if kind.arrangement == "knots"]

    @property
    def writes_text(self) -> bool:
        """Numbers of hops or ids are written, which are ordinary text."""
        return self.enable_backtracing or any(kind.hop_tokens for kind in self.knotted)

    @property
    def max_chunks(self) -> int:
        """Most chunks of a document whose number is drawn."""
        return max((len(kind.chunk_probabilities or ()) for kind in self.knotted), default=0)


def marker_tokens(max_chunks: int) -> tuple[str, ...]:
    """The 2 (max_chunks - 1) markers: number 2c is the tail of chunk c, number 2c - 1 the head of chunk c."""
    pairs = [(f"<|tail{chunk}|>", f"<|head{chunk + 1}|>") for chunk in range(max_chunks - 1)]
    return tuple(token for pair in pairs for token in pair)


def added_tokens(rules: KnotRules) -> tuple[str, ...]:
    """The tokens that these rules insert, for encode.added_tokens."""
    tokens = marker_tokens(rules.max_chunks)
    if any(kind.hop_tokens for kind in rules.knotted):
        tokens += HOP_TOKENS
    return tokens + (BACKTRACING_TOKENS if rules.enable_backtracing else ())
