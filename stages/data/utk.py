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

Rows of kind `turns` are the paper's baseline CIP: chunk 0 of every document, then chunk 1, ..., without markers.

Defects of that code avoided: the last document's listing and its place were wrong (the slot of its last chunk was its
ordinal); four chunks could not be had, as 4 meant chunks of 1024 tokens (here `hop_tokens`, with every token of a
marker masked, not only its ends); seed * 100000 + index repeats generators between seeds; the fast form of its CIP
restored the original order instead of interleaving; its draws hang on the version of NumPy.

Rows are made by unit: some consecutive shards of tokens. Unit u numbers its rows from u * 2**32. The last, partial row
of each unit is left, and all that is left is one more unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.bins import RowPlan, concatenate
from ropewalk.stages.data.packing.knot_rules import KnotRules, RowKind, added_tokens
from ropewalk.stages.data.packing.knots import Markers, body_lengths, draw_knots, lay_knots, make_markers, stream_key
from ropewalk.stages.data.packing.row_batches import batches_of_rows
from ropewalk.stages.data.packing.row_files import UnitWriter
from ropewalk.stages.data.packing.units import (
    TokenUnit,
    finish_rows,
    load_left,
    load_tokenizer_info,
    load_tokens,
    map_units,
    token_units,
)
from ropewalk.stages.data.vocabulary import tokenizer_digest, tokenizer_folder
from ropewalk.stages.schema import TokenizerInfo, seeded_rng

if TYPE_CHECKING:
    from ropewalk.stages.data.packing.rows import Corpus

NAME = "utk"
VERSION = 1
__all__ = ["NAME", "VERSION", "RowKind", "UtkConfig", "added_tokens", "check", "run"]
check = check_rows

UNIT_ROWS = 2**32
"""More than the rows of any unit."""


class UtkConfig(KnotRules):
    """What the rows depend on."""

    row_tokens: int = Field(ge=64)
    """Length of each row, in tokens, the begin token included. Shorter rows would be mostly markers and ids."""
    seed: int = 0
    """Orders the documents and the finished rows, and draws all cuts and shuffles."""
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all. Other counts are of the rows before that."""
    group_tokens: int = Field(default=2**26, ge=1)
    """Consecutive shards are packed together up to so many tokens, which bounds memory. A larger shard is alone."""


def load_tokenizer(folder: Path, info: TokenizerInfo) -> Any:
    """The `tokenizers.Tokenizer` in a folder. Raises ValueError if there is none or it is not the tokens' own."""
    from tokenizers import Tokenizer

    path = tokenizer_folder(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"utk writes ids or numbers, but {folder} holds no tokenizer.json: give slot tokenizer")
    if tokenizer_digest(folder) != info.digest:
        raise ValueError(f"slot tokenizer: {path} is not the tokenizer that slot tokens was encoded with")
    return Tokenizer.from_file(str(path))


def run(config: UtkConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Concatenate slot `tokens` into rows and tie knots into them."""
    info = load_tokenizer_info(inputs["tokens"])
    for token in added_tokens(config):
        info.marker(token, NAME)
    folder = inputs.get("tokenizer", inputs["tokens"]) if config.writes_text else None
    tokenizer = load_tokenizer(folder, info) if folder else None
    markers = make_markers(config, config.row_tokens, info, tokenizer)
    units = token_units(inputs["tokens"], config.group_tokens)
    build = partial(build_unit, config, info, markers, folder)
    rest = partial(build_rest, config, info, markers, folder, len(units))
    shards = map_units(context, build, units, build_rest=rest)
    finish_rows(
        output,
        context,
        shards,
        name=NAME,
        seed=config.seed,
        info=info,
        row_tokens=config.row_tokens,
        num_rows=config.num_rows,
        details={"num_units": len(units)},
    )


def build_unit(
    config: UtkConfig, info: TokenizerInfo, markers: Markers, tokenizer: Path | None, unit: TokenUnit, folder: Path
) -> dict[str, Any]:
    """Make the rows of some shards."""
    corpus = load_tokens(unit.paths, info)
    counts = {"num_documents_in": len(corpus.lengths), "num_tokens_in": int(corpus.lengths.sum())}
    knotter = Knotter(config, info, markers, load_tokenizer(tokenizer, info) if tokenizer else None)
    return counts | knotter.write(corpus, unit.number, folder, is_last=unit.is_only)


def build_rest(
    config: UtkConfig,
    info: TokenizerInfo,
    markers: Markers,
    tokenizer: Path | None,
    number: int,
    paths: tuple[Path, ...],
    folder: Path,
) -> dict[str, Any]:
    """Make the rows of what units have left."""
    knotter = Knotter(config, info, markers, load_tokenizer(tokenizer, info) if tokenizer else None)
    return knotter.write(load_left(paths), number, folder, is_last=True)


class Knotter:
    """Makes the rows of a unit."""

    def __init__(self, config: UtkConfig, info: TokenizerInfo, markers: Markers, tokenizer: Any) -> None:
        self.config, self.info, self.markers, self.tokenizer = config, info, markers, tokenizer

    def write(self, corpus: Corpus, number: int, folder: Path, *, is_last: bool) -> dict[str, int]:
        """Write the rows of unit `number`; `is_last`: nobody packs what it would leave. Returns the counts."""
        capacity = self.config.row_tokens - 1
        key = (self.config.seed, NAME, "documents", *([number] if number else []))
        plan = concatenate(corpus.lengths, capacity, seeded_rng(*key).permutation(len(corpus.lengths)))
        num_full = plan.num_rows - bool(plan.num_rows and plan.room(capacity)[-1])
        partial_row = plan.rows(range(num_full, plan.num_rows))
        counts = {"num_rows_cut": 0, "num_tokens_trimmed": 0, "num_tokens_dropped_partial_row": 0}
        with UnitWriter(folder, self.config.row_tokens, "causal") as writer:
            if not is_last and partial_row.num_rows:
                writer.leave(partial_row, corpus)
            elif self.config.partial_row == "drop":
                counts["num_tokens_dropped_partial_row"] = int(partial_row.tokens().sum())
            else:
                num_full = plan.num_rows
            for rows in batches_of_rows(num_full, self.config.row_tokens):
                is_cut, trimmed = self._write_batch(
                    writer, plan.rows(rows), (number * UNIT_ROWS + rows).tolist(), corpus
                )
                counts["num_rows_cut"] += is_cut
                counts["num_tokens_trimmed"] += trimmed
            return counts | writer.counts

    def _write_batch(self, writer: UnitWriter, plan: RowPlan, indices: list[int], corpus: Corpus) -> tuple[int, int]:
        """Write rows of these indices. Returns how many are cut and how many tokens of documents their ends cut off."""
        config = self.config
        keys = [stream_key(config.seed, NAME, index) for index in indices]
        knots = draw_knots(config, keys, plan.row_offsets, body_lengths(plan, config.row_tokens))
        batch = lay_knots(config, knots, plan, corpus, self.info, self.markers, self.tokenizer, config.row_tokens)
        writer.write(batch, corpus, batch.row_ids(NAME, config.seed, indices, corpus))
        trimmed = int(plan.num_tokens.sum()) - int(batch.segment_tokens.sum())
        return int(knots.is_cut.sum()), trimmed
