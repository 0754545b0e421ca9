"""Writes Rows that teach retrieval: running text, repeated segments, and facts planted in text and asked for.

Reads `tokens`, and `tokenizer` (the folder that `encode` wrote) where there are episodes. Every row is `bos` and then:

text      a window of the documents, laid end to end in a seeded order, each followed by `eos`;
repeat    a window of 8 to `row_tokens`/2 tokens, tiled to the row, the last copy cut: with such rows induction, and so
          retrieval, forms early in small models (Olsson et al. 2022, "In-context learning and induction heads"). The
          copies count as planted, like answers: training can give both the same extra weight;
episode   a window with facts at random places, then all their questions, in random order, each with its answer. Keys
          are of the training pool of `ropewalk.stages.episodes`.

Each window goes on where the one of the row before ended; finished rows are shuffled. `loss_mask` is True but for
position 0 and, in episodes, the facts: their keys and values are random, nothing predicts them. Questions are targets
unless the config says no: in short rows they let retrieval form, and once it has, keys that were never trained on are
found more often without them (pipelines/README.md).
Attention is causal across documents. Lost: what lies behind the last window; documents that no row has a piece of are
counted. If the corpus is too small it is read again in another order: see the count `num_epochs`.

Memory: one output shard, and some hundred bytes for each document and row; the tokens are mapped from a scratch file.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.rows import load_corpus
from ropewalk.stages.data.quotas import largest_remainder
from ropewalk.stages.data.running_text import PlacedPiece, RunningText, lay_out
from ropewalk.stages.data.vocabulary import load_tokenizer, tokenizer_digest
from ropewalk.stages.episodes import EpisodeFormat, EpisodeWriter, episode_writer
from ropewalk.stages.schema import (
    Artifact,
    Record,
    TokenizerInfo,
    rows_schema,
    seeded_rng,
    stable_id,
    write_artifact,
    write_shard,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "plant"
VERSION = 2
check = check_rows

RowKind = Literal["episode", "repeat", "text"]
MIN_REPEAT_TOKENS = 8
_SHARD_TOKENS = 2**24


class PlantConfig(Record):
    """How many rows of which kinds."""

    row_tokens: int = Field(ge=16)
    """Length of each row."""
    num_rows: int = Field(ge=1)
    episode_fraction: float = Field(default=0.3, ge=0, le=1)
    """Share of rows with planted facts."""
    repeat_fraction: float = Field(default=0.3, ge=0, le=1)
    """Share of rows that repeat one segment. The rest is plain text."""
    num_facts_min: int = Field(default=2, ge=1)
    num_facts_max: int = Field(default=8, ge=1)
    """An episode has this many facts at most. Facts, questions and answers may fill half of the row."""
    enable_fewer_facts: bool = False
    """Where `num_facts_max`, or even `num_facts_min`, facts do not fit, plant as many as do. Otherwise an error."""
    episode: EpisodeFormat = EpisodeFormat()
    """How facts and questions are written."""
    enable_question_targets: bool = True
    """Questions are targets, not only their answers."""
    seed: int = 0

    @model_validator(mode="after")
    def _shares(self) -> PlantConfig:
        if self.episode_fraction + self.repeat_fraction > 1 + 1e-9:
            raise ValueError("episode_fraction and repeat_fraction must not sum to more than 1")
        if self.num_facts_min > self.num_facts_max:
            raise ValueError(f"num_facts_min {self.num_facts_min} is above num_facts_max {self.num_facts_max}")
        return self


@dataclass(frozen=True)
class RowPlan:
    """What one row will be."""

    kind: RowKind
    num_facts: int
    """0 but for episodes."""
    text_tokens: int
    """Length of its window of running text."""


@dataclass(frozen=True)
class PlantedRow:
    """A finished row."""

    input_ids: np.ndarray
    """[row_tokens], int32."""
    loss_mask: np.ndarray
    """[row_tokens], bool."""
    pieces: list[PlacedPiece]
    """The segments; offsets count from the row's beginning."""


def facts_range(config: PlantConfig, writer: EpisodeWriter) -> tuple[int, int]:
    """The least and greatest number of facts of an episode. Raises ValueError if they do not fit the row."""
    each = writer.fact_tokens + writer.question_tokens + writer.value_tokens
    fitting = config.row_tokens // 2 // each
    if config.num_facts_max <= fitting:
        return config.num_facts_min, config.num_facts_max
    if not config.enable_fewer_facts or not fitting:
        raise ValueError(
            f"num_facts_max {config.num_facts_max} facts of {each} tokens, questions included, exceed half of "
            f"row_tokens {config.row_tokens}, which holds {fitting}: plant fewer or set enable_fewer_facts"
        )
    return min(config.num_facts_min, fitting), fitting


def plan_rows(config: PlantConfig, writer: EpisodeWriter | None) -> list[RowPlan]:
    """All rows, in the order in which they read the text. `writer` is needed where there are episodes."""
    plain_fraction = max(0.0, 1 - config.episode_fraction - config.repeat_fraction)
    shares = {"episode": config.episode_fraction, "repeat": config.repeat_fraction, "text": plain_fraction}
    quotas = largest_remainder(shares, config.num_rows)
    kinds = [kind for kind in ("episode", "repeat", "text") for _ in range(quotas[kind])]
    low, high = facts_range(config, writer) if writer is not None else (0, 0)
    facts = seeded_rng(NAME, "facts", config.seed).integers(low, high + 1, config.num_rows).tolist()
    repeats = seeded_rng(NAME, "repeats", config.seed)
    lengths = repeats.integers(MIN_REPEAT_TOKENS, config.row_tokens // 2 + 1, config.num_rows).tolist()
    plans = []
    for index in seeded_rng(NAME, "kinds", config.seed).permutation(config.num_rows).tolist():
        kind: RowKind = kinds[index]
        if kind == "episode":
            assert writer is not None
            each = writer.fact_tokens + writer.question_tokens + writer.value_tokens
            plans.append(RowPlan(kind, facts[index], config.row_tokens - 1 - facts[index] * each))
        else:
            plans.append(RowPlan(kind, 0, lengths[index] if kind == "repeat" else config.row_tokens - 1))
    return plans


def text_row(window: np.ndarray, pieces: list[PlacedPiece], row_tokens: int, bos: int) -> PlantedRow:
    """`bos` and the window, again and again until the row is full. Copies of the window are planted: in no segment."""
    import numpy as np

    input_ids = np.concatenate([np.array([bos], np.int32), np.resize(window, row_tokens - 1)])
    placed = [piece._replace(offset=1 + piece.offset) for piece in pieces]
    return PlantedRow(input_ids, np.arange(row_tokens) > 0, placed)


def episode_row(
    window: np.ndarray,
    pieces: list[PlacedPiece],
    writer: EpisodeWriter,
    num_facts: int,
    rng: np.random.Generator,
    bos: int,
    *,
    question_targets: bool,
) -> PlantedRow:
    """`bos`, the window with facts planted between its tokens, and every question with its answer."""
    import numpy as np

    facts = writer.draw(rng, num_facts, "train")
    places = np.sort(rng.choice(len(window) + 1, num_facts, replace=False)).tolist()
    parts: list[tuple[Sequence[int] | np.ndarray, bool]] = [([bos], False)]
    cuts = [0, *places, len(window)]
    for number, (begin, end) in enumerate(pairwise(cuts)):
        parts.append((window[begin:end], True))
        if number < num_facts:
            parts.append((writer.fact(*facts[number]), False))
    for number in rng.permutation(num_facts).tolist():
        key, value = facts[number]
        parts += [(writer.question(key), question_targets), (value, True)]
    input_ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids, _ in parts])
    loss_mask = np.repeat([target for _, target in parts], [len(ids) for ids, _ in parts])
    return PlantedRow(input_ids, loss_mask, _cut_pieces(pieces, cuts, writer.fact_tokens))


def _cut_pieces(pieces: list[PlacedPiece], cuts: list[int], fact_tokens: int) -> list[PlacedPiece]:
    placed = []
    for number, (begin, end) in enumerate(pairwise(cuts)):
        shift = 1 + number * fact_tokens
        for piece in pieces:
            first, last = max(begin, piece.offset), min(end, piece.offset + piece.num_tokens)
            if first < last:
                start = piece.start + first - piece.offset
                placed.append(PlacedPiece(piece.document, start, last - first, first + shift))
    return placed


@dataclass(frozen=True)
class RowMaker:
    """Makes any row of a plan, in any order."""

    config: PlantConfig
    plans: Sequence[RowPlan]
    starts: Sequence[int]
    """Where the window of each row begins in the text."""
    text: RunningText
    writer: EpisodeWriter | None
    bos_token_id: int

    def make(self, number: int) -> PlantedRow:
        """Row `number` of the plan."""
        plan = self.plans[number]
        window, pieces = self.text.window(self.starts[number], plan.text_tokens)
        if plan.kind != "episode":
            return text_row(window, pieces, self.config.row_tokens, self.bos_token_id)
        assert self.writer is not None
        rng = seeded_rng(NAME, "episode", self.config.seed, number)
        targets = self.config.enable_question_targets
        return episode_row(
            window, pieces, self.writer, plan.num_facts, rng, self.bos_token_id, question_targets=targets
        )


def rows_table(row_ids: Sequence[str], rows: Sequence[PlantedRow], doc_ids: Sequence[str]) -> pa.Table:
    """Finished rows as a table of Rows with `loss_mask`."""
    import numpy as np
    import pyarrow as pa

    def lists(values: pa.Array, lengths: list[int]) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)

    schema = rows_schema(loss_mask=True)
    flat = [piece for row in rows for piece in row.pieces]
    names = pa.array([doc_ids[piece.document] for piece in flat], pa.string())
    columns = [names, *(pa.array([piece[field] for piece in flat]) for field in (1, 2, 3))]
    kind = schema.field("segments").type.value_type
    arrays = [column.cast(kind.field(index).type) for index, column in enumerate(columns)]
    segments = pa.StructArray.from_arrays(arrays, fields=[kind.field(index) for index in range(4)])
    lengths = [len(row.input_ids) for row in rows]
    return pa.Table.from_arrays(
        [
            pa.array(row_ids, pa.string()),
            lists(pa.array(np.concatenate([row.input_ids for row in rows])), lengths),
            lists(segments, [len(row.pieces) for row in rows]),
            pa.array(["causal"] * len(rows), pa.string()),
            lists(pa.array(np.concatenate([row.loss_mask for row in rows])), lengths),
        ],
        schema=schema,
    )


def _episode_writer(config: PlantConfig, inputs: Mapping[str, Path], info: TokenizerInfo) -> EpisodeWriter | None:
    if not config.episode_fraction:
        return None
    if "tokenizer" not in inputs:
        raise ValueError("plant needs the input slot `tokenizer` to write episodes, or episode_fraction 0")
    if tokenizer_digest(inputs["tokenizer"]) != info.digest:
        raise ValueError("plant's input `tokenizer` is not the one that encoded its input `tokens`")
    return episode_writer(config.episode, load_tokenizer(inputs["tokenizer"]), info)


def make_shards(maker: RowMaker) -> Iterator[tuple[list[str], list[PlantedRow]]]:
    """Ids and rows of one output shard after another, in their final, shuffled order."""
    config = maker.config
    order = seeded_rng(NAME, "order", config.seed).permutation(config.num_rows).tolist()
    shard_rows = min(65_536, max(1, _SHARD_TOKENS // config.row_tokens))
    for begin in range(0, config.num_rows, shard_rows):
        numbers = order[begin : begin + shard_rows]
        yield [stable_id(NAME, config.seed, n) for n in numbers], [maker.make(n) for n in numbers]


def run(config: PlantConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the rows. Raises ValueError on bad input, or where facts do not fit."""
    started = time.perf_counter()
    corpus, info = load_corpus(inputs["tokens"], context.work)
    writer = _episode_writer(config, inputs, info)
    plans = plan_rows(config, writer)
    sizes = [plan.text_tokens for plan in plans]
    # Each window may pass over one end token.
    text = lay_out(corpus, info.eos_token_id, sum(sizes) + len(sizes), config.seed)
    maker = RowMaker(config, plans, text.walk(sizes), text, writer, info.bos_token_id)
    used: set[int] = set()
    totals: Counter[str] = Counter(num_rows=0, num_tokens_kept=0, num_target_tokens=0)
    for shard, (row_ids, rows) in enumerate(make_shards(maker)):
        write_shard(output.data, "rows", shard, rows_table(row_ids, rows, corpus.doc_ids))
        used.update(piece.document for row in rows for piece in row.pieces)
        totals["num_rows"] += len(rows)
        totals["num_tokens_kept"] += sum(piece.num_tokens for row in rows for piece in row.pieces)
        totals["num_target_tokens"] += sum(int(row.loss_mask.sum()) for row in rows)
        context.progress(totals["num_rows"], config.num_rows, "rows")
    counts = _counts(maker, totals, len(used))
    write_artifact(output.data, Artifact(kind="rows", tokenizer=info, row_tokens=config.row_tokens, counts=counts))
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "rows_per_second": config.num_rows / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(counts)


def _counts(maker: RowMaker, totals: Counter[str], num_used: int) -> dict[str, int]:
    kinds = Counter(plan.kind for plan in maker.plans)
    num_documents, num_tokens = len(maker.text.corpus.doc_ids), totals["num_rows"] * maker.config.row_tokens
    return {
        **totals,
        **{f"num_{kind}_rows": kinds[kind] for kind in ("episode", "repeat", "text")},
        "num_facts": sum(plan.num_facts for plan in maker.plans),
        "num_tokens": num_tokens,
        "num_tokens_inserted": num_tokens - totals["num_tokens_kept"],
        "num_documents_in": num_documents,
        "num_documents_used": num_used,
        "num_documents_unused": num_documents - num_used,
        "num_epochs": maker.text.num_epochs,
    }
