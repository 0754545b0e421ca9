"""Puts several Rows artifacts together in given shares, and shuffles the finished rows.

Reads any number of Rows, one a slot, of equal `row_tokens` and tokenizer. Writes Rows and `statistics.json`. The quota
of each slot is found by the largest remainder and drawn without replacement; a row keeps its segments and its attention
policy, and its id becomes `<slot>/<row_id>` (with `#1`, `#2` behind the copies that `allow_repeats` makes).
Whole rows are shuffled over the whole output, because stages that walk through similar documents write similar rows one
after the other. If only some slots have an optional column, the others get its default: a `loss_mask` that is True but
at position 0, `position_ids` that count from 0.

The draw and the order depend on the position of a row in its table, never on how the table is cut into shards.

Lost: the rows that were not drawn (`num_rows_unused`). Memory: one output shard; 16 bytes a row.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.distinct import DistinctNames
from ropewalk.stages.data.quotas import largest_remainder
from ropewalk.stages.schema import (
    Artifact,
    Record,
    iterate_table,
    read_artifact,
    rows_schema,
    seeded_rng,
    shard_paths,
    write_artifact,
    write_shard,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "mix"
VERSION = 1
check = check_rows

_SHARD_TOKENS = 2**24
_MAX_OPEN = 256  # Files that are written at once; inputs are read again for every so many output shards.


class MixConfig(Record):
    """What to put together."""

    fractions: dict[str, float] = Field(min_length=1)
    """Share of the rows by input slot; the sum is 1."""
    num_rows: int = Field(ge=1)
    seed: int = 0
    allow_repeats: bool = False
    """A slot with fewer rows than its quota gives rows more than once (as evenly as possible). Otherwise an error."""

    @field_validator("fractions")
    @classmethod
    def _sum_to_one(cls, fractions: dict[str, float]) -> dict[str, float]:
        # Not by a comparison that NaN would pass.
        if not (abs(sum(fractions.values()) - 1) <= 1e-6 and min(fractions.values()) >= 0):
            raise ValueError(
                f"fractions must be shares that sum to 1, but {fractions} sum to {sum(fractions.values())}"
            )
        return fractions


@dataclass(frozen=True)
class Draw:
    """Which rows of a slot are taken, and where they go."""

    times: np.ndarray
    """[num_available]: how often each row is taken."""
    positions: np.ndarray
    """[quota]: the rows' places in the output, copies of one row next to each other."""


def draw_rows(config: MixConfig, available: Mapping[str, int]) -> dict[str, Draw]:
    """Choose rows of each slot and shuffle them together. `available` counts the rows of the slots.

    Raises ValueError if a slot has too few rows.
    """
    import numpy as np

    quotas = largest_remainder(config.fractions, config.num_rows)
    places = seeded_rng(NAME, "order", config.seed).permutation(config.num_rows)
    draws, taken = {}, 0
    for slot in sorted(quotas):
        quota, rows = quotas[slot], available[slot]
        if quota > rows and not (config.allow_repeats and rows):
            raise ValueError(
                f"mix wants {quota} rows of {slot!r}, which has {rows}: lower num_rows or the share, or allow_repeats"
            )
        times = np.full(rows, quota // rows if rows else 0)
        times[seeded_rng(NAME, "draw", config.seed, slot).choice(rows, quota - int(times.sum()), replace=False)] += 1
        draws[slot] = Draw(times, places[taken : taken + quota])
        taken += quota
    return draws


@dataclass
class MixStatistics:
    """Sums over the rows that were written."""

    documents: DistinctNames
    rows_by_policy: Counter[str] = field(default_factory=Counter)
    tokens_by_source: Counter[str] = field(default_factory=Counter)

    def add(self, rows: pa.Table) -> None:
        """Count rows and their segments; a document's source is what its id has before the first slash."""
        self.rows_by_policy.update(rows.column("attention").to_pylist())
        documents: set[str] = set()
        for batch in rows.column("segments").chunks:
            pieces = batch.flatten()
            names = pieces.field("doc_id").to_pylist()
            documents.update(names)
            for name, num_tokens in zip(names, pieces.field("num_tokens").to_pylist(), strict=True):
                self.tokens_by_source[name.split("/", 1)[0] if "/" in name else "unknown"] += num_tokens
        self.documents.add(documents)

    def report(self, rows_by_slot: Mapping[str, int], row_tokens: int) -> dict[str, Any]:
        """For `statistics.json`: each breakdown sums to the tokens of all rows."""
        num_tokens = row_tokens * sum(rows_by_slot.values())
        num_inserted = num_tokens - self.tokens_by_source.total()
        return {
            "inserted_fraction": num_inserted / num_tokens,
            "num_documents": self.documents.count(),
            "tokens_by_slot": {slot: rows * row_tokens for slot, rows in sorted(rows_by_slot.items())},
            "tokens_by_source": {**dict(sorted(self.tokens_by_source.items())), "(inserted)": num_inserted},
            "tokens_by_attention_policy": {
                name: rows * row_tokens for name, rows in sorted(self.rows_by_policy.items())
            },
        }


def check_inputs(config: MixConfig, inputs: Mapping[str, Path]) -> dict[str, Artifact]:
    """The artifacts by slot. Raises ValueError if slots and fractions differ, or the rows cannot be mixed."""
    if set(inputs) != set(config.fractions):
        raise ValueError(f"mix has the input slots {sorted(inputs)}, but fractions for {sorted(config.fractions)}")
    artifacts = {slot: read_artifact(inputs[slot], "rows") for slot in sorted(inputs)}
    first, *others = artifacts
    for slot in others:
        if artifacts[slot].row_tokens != artifacts[first].row_tokens:
            raise ValueError(
                f"mix needs rows of one length, but {first!r} has row_tokens {artifacts[first].row_tokens} and "
                f"{slot!r} {artifacts[slot].row_tokens}"
            )
        if _digest(artifacts[slot]) != _digest(artifacts[first]):
            raise ValueError(f"mix needs rows of one tokenizer, but {first!r} and {slot!r} were encoded by two")
    return artifacts


def _digest(rows: Artifact) -> str | None:
    return rows.tokenizer.digest if rows.tokenizer else None


def _tables(inputs: Mapping[str, Path]) -> tuple[dict[str, int], pa.Schema]:
    """How many rows each slot has, and a schema with every optional column of any."""
    import pyarrow.parquet as pq

    available, columns = {}, set()
    for slot, folder in inputs.items():
        footers = [pq.read_metadata(path) for path in shard_paths(folder, "rows")]
        available[slot] = sum(footer.num_rows for footer in footers)
        columns.update(name for footer in footers for name in footer.schema.to_arrow_schema().names)
    return available, rows_schema(loss_mask="loss_mask" in columns, position_ids="position_ids" in columns)


def _unify(rows: pa.RecordBatch, ids: list[str], schema: pa.Schema, row_tokens: int, where: Path) -> pa.Table:
    """The rows under other ids, with all columns of `schema`."""
    import numpy as np
    import pyarrow as pa

    lengths = rows.column("input_ids").value_lengths().to_numpy()
    if (lengths != row_tokens).any():
        raise ValueError(f"{where} has a row of {lengths[lengths != row_tokens][0]} tokens, not {row_tokens}")
    count = len(ids)
    defaults = {
        "loss_mask": lambda: np.tile(np.arange(row_tokens) > 0, count),
        "position_ids": lambda: np.tile(np.arange(row_tokens, dtype=np.int32), count),
    }
    columns: list[Any] = []
    for name in schema.names:
        if name == "row_id":
            columns.append(pa.array(ids, pa.string()))
        elif name in rows.schema.names:
            columns.append(rows.column(name))
        else:
            offsets = pa.array(np.arange(count + 1) * row_tokens, pa.int32())
            columns.append(pa.ListArray.from_arrays(offsets, pa.array(defaults[name]())))
    return pa.Table.from_arrays(columns, schema=schema)


def _drawn_rows(slot: str, folder: Path, draw: Draw, schema: pa.Schema, row_tokens: int) -> Iterator[tuple[Any, Any]]:
    """Tables of drawn rows, each with the rows' places in the output."""
    import numpy as np

    first = placed = 0
    batch_rows = max(1, _SHARD_TOKENS // row_tokens)
    for whole in iterate_table(folder, "rows"):
        for begin in range(0, whole.num_rows, batch_rows):
            batch = whole.slice(begin, batch_rows)
            times = draw.times[first : first + batch.num_rows]
            indices = np.repeat(np.arange(batch.num_rows), times)
            copies = np.arange(len(indices)) - np.repeat(np.cumsum(times) - times, times)
            names = batch.column("row_id").take(indices).to_pylist()
            ids = [f"{slot}/{name}" + (f"#{n}" if n else "") for name, n in zip(names, copies.tolist(), strict=True)]
            yield _unify(batch.take(indices), ids, schema, row_tokens, folder), draw.positions[placed:][: len(ids)]
            first, placed = first + batch.num_rows, placed + len(ids)


def shuffled_shards(
    inputs: Mapping[str, Path], draws: Mapping[str, Draw], schema: pa.Schema, row_tokens: int, work: Path
) -> Iterator[pa.Table]:
    """The drawn rows in their final order, one output shard after another.

    A two-phase shuffle: rows are appended to one file in `work` for each output shard, which is then sorted.
    """
    num_rows = sum(len(draw.positions) for draw in draws.values())
    shard_rows = min(65_536, max(1, _SHARD_TOKENS // row_tokens))
    num_shards = -(-num_rows // shard_rows)
    for begin in range(0, num_shards, _MAX_OPEN):
        shards = range(begin, min(begin + _MAX_OPEN, num_shards))
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _scatter(
            inputs, draws, schema, row_tokens, {shard: work / f"{shard:05d}.arrow" for shard in shards}, shard_rows
        )
        for shard in shards:
            yield _sorted_rows(work / f"{shard:05d}.arrow")
    shutil.rmtree(work, ignore_errors=True)


def _scatter(
    inputs: Mapping[str, Path],
    draws: Mapping[str, Draw],
    schema: pa.Schema,
    row_tokens: int,
    paths: Mapping[int, Path],
    shard_rows: int,
) -> None:
    import numpy as np
    import pyarrow as pa

    placed_schema = schema.append(pa.field("position", pa.int64(), nullable=False))
    with ExitStack() as stack:
        writers = {n: stack.enter_context(pa.ipc.new_stream(str(path), placed_schema)) for n, path in paths.items()}
        for slot, draw in draws.items():
            for table, positions in _drawn_rows(slot, inputs[slot], draw, schema, row_tokens):
                placed = table.append_column(placed_schema.field("position"), pa.array(positions))
                for shard in np.unique(positions // shard_rows).tolist():
                    if shard in writers:
                        writers[shard].write_table(placed.filter(positions // shard_rows == shard))


def _sorted_rows(path: Path) -> pa.Table:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all().sort_by("position").drop_columns("position")


def run(config: MixConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the mixture. Raises ValueError on bad input, or if a slot has too few rows."""
    started = time.perf_counter()
    first = next(iter(check_inputs(config, inputs).values()))
    row_tokens = first.row_tokens
    if row_tokens is None or first.tokenizer is None:
        raise ValueError("mix needs rows whose artifact.json has row_tokens and tokenizer: write them again")
    available, schema = _tables(inputs)
    draws = draw_rows(config, available)
    statistics, done = MixStatistics(DistinctNames(context.work / "mix-documents")), 0
    shards = shuffled_shards(inputs, draws, schema, row_tokens, context.work / "mix-shuffle")
    for number, rows in enumerate(shards):
        statistics.add(rows)
        write_shard(output.data, "rows", number, rows)
        done += rows.num_rows
        context.progress(done, config.num_rows, "rows")
    counts = _counts(available, draws, done)
    report = statistics.report({slot: len(draw.positions) for slot, draw in draws.items()}, row_tokens)
    statistics.documents.remove()
    (output.data / "statistics.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    write_artifact(
        output.data,
        Artifact(kind="rows", tokenizer=first.tokenizer, row_tokens=row_tokens, counts=counts, details=report),
    )
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "rows_per_second": done / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log({**counts, "inserted_fraction": report["inserted_fraction"], "num_documents": report["num_documents"]})


def _counts(available: Mapping[str, int], draws: Mapping[str, Draw], num_rows: int) -> dict[str, int]:
    num_in = sum(available.values())
    num_used = sum(int((draw.times > 0).sum()) for draw in draws.values())
    num_repeats = sum(int((draw.times - 1).clip(0).sum()) for draw in draws.values())
    if num_rows != num_used + num_repeats:
        raise RuntimeError(f"mix lost count of rows: {num_rows} written, {num_used} used, {num_repeats} repeated")
    return {
        "num_rows_in": num_in,
        "num_rows_used": num_used,
        "num_rows_unused": num_in - num_used,
        "num_rows_repeated": num_repeats,
        "num_rows": num_rows,
    }
