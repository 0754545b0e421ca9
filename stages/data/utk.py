"""Untie the Knots: cut the documents of a row into chunks, shuffle them, and have the model tie them up again.

Tian et al., ACL 2025, after the published code (rgtjf/Untie-the-Knots, gpt_dataset_utk.py).

Reads   slot `tokens` (Tokens). Backtracing and hops write ordinary text too, with the tokenizer of slot `tokenizer` or,
        without one, that beside the tokens. `added_tokens(config)` must be in the vocabulary (encode.added_tokens).
Writes  Rows (policy `causal`: a document mask would cancel the method), shuffled by `seed`.
Loses   what markers and ids push over a row's end (`num_tokens_trimmed`; it can be the end of the last chunk, as in
        the published code), the last row if `partial_row="drop"`, rows beyond `num_rows`; all counted.

Documents in a seeded order are laid end to end and cut into rows, so a row's first and last may be partial. For each
row a generator keyed by (seed, row index) draws, in this order: the row's kind; for each document the number of chunks
(unless hops) and its cuts; the order of all chunks; with backtracing the ids, one for each slot. The separator belongs
to its document. A chunk that is not the first of its document has a head marker, one that is not the last a tail
marker, all of them different tokens. All chunks of the row are shuffled; the last chunk of the last document stays
last. A row in which nothing is cut stays as it is (the published code shuffles its whole documents).

With backtracing each chunk of a cut document becomes `<D> id </D> chunk`, and after the one placed last follows
`<S> id <s> id </S>` in the original order. No targets are markers, `<D> id </D>`, `<S>`, and the token after a marker,
a `</D>` or a `</S>`. The listing is learnt, as are `<s>` and `</S>` in it, like in the published code.

Defects of that code avoided: the last document's listing and its place were wrong (the slot of its last chunk was its
ordinal); four chunks could not be had, as 4 meant chunks of 1024 tokens (here `hop_tokens`, with every token of a
marker masked, not only its ends); seed * 100000 + index repeats generators between seeds.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.bins import Piece, Plan, concatenate, room_left
from ropewalk.stages.data.rows import Corpus, Row, RowBuilder, load_corpus, make_row_id, write_rows
from ropewalk.stages.data.vocabulary import tokenizer_digest, tokenizer_folder
from ropewalk.stages.schema import Record, TokenizerInfo, seeded_rng

if TYPE_CHECKING:
    import numpy as np

NAME = "utk"
VERSION = 1
check = check_rows

HOP_TOKENS = ("<|hop_head|>", "<|/hop_head|>", "<|hop_tail|>", "<|/hop_tail|>")
BACKTRACING_TOKENS = ("<D>", "</D>", "<S>", "<s>", "</S>")
ID_ALPHABET = string.ascii_letters + string.digits
ID_CHARACTERS = 6


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

    @model_validator(mode="after")
    def _one_way(self) -> RowKind:
        if (self.chunk_probabilities is None) == (self.hop_tokens is None):
            raise ValueError("a row kind needs either chunk_probabilities or hop_tokens")
        if self.chunk_probabilities is not None:
            _check_distribution("chunk_probabilities", self.chunk_probabilities)
        return self


class UtkConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=64)
    """Length of each row, in tokens, the begin token included. Shorter rows would be mostly markers and ids."""
    seed: int = 0
    """Orders the documents and the finished rows, and draws all cuts and shuffles."""
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
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> UtkConfig:
        _check_distribution("rows_fraction of row_kinds", [kind.rows_fraction for kind in self.row_kinds])
        return self


def marker_tokens(max_chunks: int) -> tuple[str, ...]:
    """The 2 (max_chunks - 1) markers: number 2c is the tail of chunk c, number 2c - 1 the head of chunk c."""
    pairs = [(f"<|tail{chunk}|>", f"<|head{chunk + 1}|>") for chunk in range(max_chunks - 1)]
    return tuple(token for pair in pairs for token in pair)


def added_tokens(config: UtkConfig) -> tuple[str, ...]:
    """The tokens that this config inserts, for encode.added_tokens."""
    longest = max((len(kind.chunk_probabilities or ()) for kind in config.row_kinds), default=0)
    tokens = marker_tokens(longest)
    if any(kind.hop_tokens for kind in config.row_kinds):
        tokens += HOP_TOKENS
    return tokens + (BACKTRACING_TOKENS if config.enable_backtracing else ())


class Chunk(NamedTuple):
    """A piece of a row's document: body positions `start` to `end`; the body is its tokens and its separator."""

    document: int
    """Which of the row's documents."""
    number: int
    """Which of the document's chunks, from 0."""
    start: int
    end: int
    is_last: bool


@dataclass(frozen=True)
class Knot:
    """How one row is laid: its chunks in the order of their slots."""

    chunks: list[Chunk]
    ids: list[str]
    """The id of each slot; empty without backtracing."""
    hops: bool
    """The row's documents are cut by length, so markers spell the chunk's number."""

    @property
    def is_cut(self) -> bool:
        """Any document has several chunks."""
        return any(chunk.number > 0 for chunk in self.chunks)


def draw_cuts(config: UtkConfig, kind: RowKind, length: int, rng: np.random.Generator) -> list[int]:
    """Where a document of `length` body tokens is cut: ascending, each in 1 to length - 1."""
    if kind.hop_tokens is not None:
        return list(range(kind.hop_tokens, length, kind.hop_tokens))
    probabilities = kind.chunk_probabilities or ()
    num_chunks = int(rng.choice(len(probabilities), p=probabilities)) + 1
    if length < num_chunks or num_chunks == 1:
        return []
    if config.cuts == "equal":
        return [length // num_chunks * chunk for chunk in range(1, num_chunks)]
    return sorted((rng.choice(length - 1, size=num_chunks - 1, replace=False) + 1).tolist())


def tie_knots(num_chunks: list[int], preserve_partial_order: bool, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Shuffle chunks. Returns (document, chunk) for each slot; the last chunk of the last document is last."""
    free = [*num_chunks[:-1], num_chunks[-1] - 1]
    shuffled = rng.permutation(sum(free)).tolist()
    slots: list[tuple[int, int]] = [(0, 0)] * len(shuffled)
    begin = 0
    for document, count in enumerate(free):
        own = shuffled[begin : begin + count]
        for chunk, slot in enumerate(sorted(own) if preserve_partial_order else own):
            slots[slot] = (document, chunk)
        begin += count
    return [*slots, (len(num_chunks) - 1, num_chunks[-1] - 1)]


def draw_knot(config: UtkConfig, index: int, lengths: list[int]) -> Knot:
    """Decide everything about row `index`, whose documents have these body lengths, in tokens."""
    rng = seeded_rng(config.seed, NAME, index)
    kind = config.row_kinds[int(rng.choice(len(config.row_kinds), p=[k.rows_fraction for k in config.row_kinds]))]
    bounds = [[0, *draw_cuts(config, kind, length, rng), length] for length in lengths]
    counts = [len(bound) - 1 for bound in bounds]
    if max(counts) == 1:
        order = [(document, 0) for document in range(len(lengths))]
    else:
        order = tie_knots(counts, config.preserve_partial_order, rng)
    chunks = [Chunk(d, c, bounds[d][c], bounds[d][c + 1], c == counts[d] - 1) for d, c in order]
    ids: list[str] = []
    if config.enable_backtracing:
        drawn = rng.integers(len(ID_ALPHABET), size=(len(chunks), ID_CHARACTERS)).tolist()
        ids = ["".join(ID_ALPHABET[place] for place in places) for places in drawn]
    return Knot(chunks, ids, kind.hop_tokens is not None)


@dataclass(frozen=True)
class Markers:
    """The ids of all that is inserted."""

    info: TokenizerInfo
    tokenizer: Any
    """A `tokenizers.Tokenizer`; None if neither ids nor hop numbers are written."""

    def id(self, token: str) -> int:
        """The id of an added token."""
        return self.info.marker(token, NAME)

    def text(self, text: str) -> list[int]:
        """The ids of ordinary text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def head(self, chunk: Chunk, hops: bool) -> list[int]:
        """What stands before a chunk."""
        if chunk.number == 0:
            return []
        if hops:
            return [self.id(HOP_TOKENS[0]), *self.text(str(chunk.number)), self.id(HOP_TOKENS[1])]
        return [self.id(f"<|head{chunk.number}|>")]

    def tail(self, chunk: Chunk, hops: bool) -> list[int]:
        """What stands behind a chunk."""
        if chunk.is_last:
            return []
        if hops:
            return [self.id(HOP_TOKENS[2]), *self.text(str(chunk.number)), self.id(HOP_TOKENS[3])]
        return [self.id(f"<|tail{chunk.number}|>")]


def lay_row(builder: RowBuilder, pieces: list[Piece], knot: Knot, markers: Markers) -> None:
    """Lay the chunks with their markers, ids and listings; what does not fit is cut off."""
    slots: dict[int, list[int]] = {}
    for slot, chunk in sorted(enumerate(knot.chunks), key=lambda item: item[1].number):
        slots.setdefault(chunk.document, []).append(slot)
    ids = [markers.text(text) for text in knot.ids]
    masked: list[int] = []

    def mark(inserted: list[int]) -> None:
        if inserted:
            builder.insert(inserted, target=False)
            masked.append(builder.num_placed)

    for slot, chunk in enumerate(knot.chunks):
        piece, own = pieces[chunk.document], slots[chunk.document]
        backtraced = bool(ids) and len(own) > 1
        if backtraced:
            mark([markers.id("<D>"), *ids[slot], markers.id("</D>")])
        mark(markers.head(chunk, knot.hops))
        builder.place(piece.document, piece.start + chunk.start, min(chunk.end, piece.num_tokens) - chunk.start)
        if chunk.end > piece.num_tokens:
            builder.separate()
        mark(markers.tail(chunk, knot.hops))
        if backtraced and slot == max(own):
            builder.insert([markers.id("<S>")], target=False)
            builder.insert(_listing([ids[other] for other in own], markers), target=True)
            masked.append(builder.num_placed)
    for position in masked:
        builder.forget_target(position)


def _listing(ids: list[list[int]], markers: Markers) -> list[int]:
    listing = list(ids[0])
    for more in ids[1:]:
        listing += [markers.id("<s>"), *more]
    return [*listing, markers.id("</S>")]


def build_row(
    config: UtkConfig, index: int, pieces: list[Piece], corpus: Corpus, markers: Markers
) -> tuple[Row, bool, int]:
    """Row `index`, whether it is cut, and how many of its documents' tokens its end cut off."""
    builder = RowBuilder(corpus, markers.info, config.row_tokens)
    overfull = sum(piece.num_tokens + piece.is_end for piece in pieces) >= config.row_tokens
    lengths = [piece.num_tokens + piece.is_end for piece in pieces]
    lengths[-1] -= overfull
    knot = draw_knot(config, index, lengths)
    lay_row(builder, pieces, knot, markers)
    row = builder.finish(make_row_id(NAME, config.seed, index, builder.segments), "causal")
    return row, knot.is_cut, sum(piece.num_tokens for piece in pieces) - row.num_tokens_kept


def load_tokenizer(folder: Path, info: TokenizerInfo) -> Any:
    """The `tokenizers.Tokenizer` in a folder. Raises ValueError if there is none or it is not the tokens' own."""
    from tokenizers import Tokenizer

    path = tokenizer_folder(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"utk writes ids or numbers, but {folder} holds no tokenizer.json: give slot tokenizer")
    if tokenizer_digest(folder) != info.digest:
        raise ValueError(f"slot tokenizer: {path} is not the tokenizer that slot tokens was encoded with")
    return Tokenizer.from_file(str(path))


def load_markers(config: UtkConfig, inputs: Mapping[str, Path], info: TokenizerInfo) -> Markers:
    """Look up all that will be inserted. Raises ValueError naming the token or slot that is missing.

    The tokenizer is that of slot `tokenizer`, or else the one beside the tokens.
    """
    for token in added_tokens(config):
        info.marker(token, NAME)
    if not (config.enable_backtracing or any(kind.hop_tokens for kind in config.row_kinds)):
        return Markers(info, None)
    return Markers(info, load_tokenizer(inputs.get("tokenizer", inputs["tokens"]), info))


def run(config: UtkConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Concatenate slot `tokens` into rows and tie knots into them."""
    corpus, info = load_corpus(inputs["tokens"], context.work)
    markers = load_markers(config, inputs, info)
    lengths = corpus.lengths.tolist()
    documents = seeded_rng(config.seed, NAME, "documents").permutation(len(lengths)).tolist()
    plan = concatenate(lengths, config.row_tokens - 1, documents).to_rows()
    dropped = 0
    if config.partial_row == "drop" and plan and room_left(plan[-1], config.row_tokens - 1):
        dropped = sum(piece.num_tokens for piece in plan.pop())
    order = seeded_rng(config.seed, NAME, "rows").permutation(len(plan)).tolist()
    kept, over = order[: config.num_rows], order[config.num_rows :] if config.num_rows else []
    counts = {
        "num_documents_in": len(lengths),
        "num_rows_cut": 0,
        "num_tokens_in": sum(lengths),
        "num_tokens_trimmed": 0,
        "num_tokens_dropped_partial_row": dropped,
        "num_tokens_dropped_over_limit": sum(piece.num_tokens for row in over for piece in plan[row]),
    }
    write_rows(
        output,
        context,
        _build_rows(config, plan, kept, corpus, markers, counts),
        info=info,
        row_tokens=config.row_tokens,
        num_rows=len(kept),
        counts=counts,
        details={},
    )


def _build_rows(
    config: UtkConfig, plan: Plan, order: list[int], corpus: Corpus, markers: Markers, counts: dict[str, int]
) -> Iterator[Row]:
    for index in order:
        row, is_cut, trimmed = build_row(config, index, plan[index], corpus, markers)
        counts["num_rows_cut"] += is_cut
        counts["num_tokens_trimmed"] += trimmed
        yield row
