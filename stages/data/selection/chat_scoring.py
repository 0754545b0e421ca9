"""Scores a Chats artifact shard by shard on workers, each of which loads its models once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.context import Context
from ropewalk.stages.data.selection.scores import records_table
from ropewalk.stages.schema import read_artifact, read_table, shard_paths, write_shard
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import pyarrow as pa

ChatScorer = Callable[[Sequence[Mapping[str, Any]], "Counter[str]"], list[dict[str, Any]]]
"""Takes rows of Chats and a counter of drops; gives records with `sample_id`, `source` and the columns of a score."""

_BATCH_CHATS = 64


@dataclass(frozen=True)
class SideTable:
    """A second table, of any number of rows a sample."""

    name: str
    """Of the table, and of the field of a record that holds its rows."""
    schema: Callable[[], pa.Schema]


@dataclass(frozen=True)
class ScoredChats:
    """What the shards gave, in order."""

    tables: list[pa.Table]
    counts: dict[str, int]
    side_tables: list[Path]
    """The files of the second table."""


class ShardScorer:
    """Scores one Chats shard after another."""

    def __init__(self, build: Callable[[], ChatScorer], columns: Sequence[str], side: SideTable | None) -> None:
        self._scorer, self._columns, self._side = build(), columns, side

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write the records of a shard, given with its number, as `parts`; returns the counts."""
        import pyarrow.parquet as pq

        number, path = shard
        counts: Counter[str] = Counter()
        records: list[dict[str, Any]] = []
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_CHATS, columns=["sample_id", "source", "messages"]):
                counts["num_in"] += batch.num_rows
                records += self._scorer(batch.to_pylist(), counts)
        write_shard(folder, "parts", number, records_table(records, self._columns))
        if self._side is not None:
            self._write_side(self._side, records, number, folder)
        return dict(counts)

    @staticmethod
    def _write_side(side: SideTable, records: Sequence[Mapping[str, Any]], number: int, folder: Path) -> None:
        import pyarrow as pa

        rows = [row for record in records for row in record[side.name]]
        write_shard(folder, side.name, number, pa.Table.from_pylist(rows, schema=side.schema()))


def score_chats(
    context: Context,
    folder: Path,
    build: Callable[[], ChatScorer],
    columns: Sequence[str],
    tallies: Sequence[str],
    side: SideTable | None = None,
) -> ScoredChats:
    """Score all chats of an artifact.

    Args:
        context: Runs the shards.
        folder: The Chats.
        build: Makes a scorer, once a worker; picklable.
        columns: Of its records, beside id and source.
        tallies: What it counts; named in the result also where there was none.
        side: A second table that its records hold rows of.

    The counts have `num_in`. Memory: a row a sample.
    """
    read_artifact(folder, "chats")
    counts = Counter(dict.fromkeys(("num_in", *tallies), 0))
    tables, files = [], []
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(folder, "chats"))}
    for shard in map_shards(context, partial(ShardScorer, build, columns, side), paths):
        tables.append(read_table(shard.folder, "parts"))
        files += shard_paths(shard.folder, side.name) if side is not None else []
        counts.update(shard.counts)
    return ScoredChats(tables, dict(counts), files)
