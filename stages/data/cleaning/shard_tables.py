"""One shard of Documents or Tokens in memory, checked, and what a cleaning stage writes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.schema import read_artifact, shard_paths

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Table = Literal["documents", "tokens"]


def numbered_shards(folder: Path, table: Table) -> dict[str, tuple[int, Path]]:
    """The shards of an artifact by file name, each with its number. Raises ValueError if it holds another kind."""
    read_artifact(folder, table)
    return {path.name: (number, path) for number, path in enumerate(shard_paths(folder, table))}


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole shard. Raises ValueError for a missing column, or text that is not UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if missing := [name for name in columns or () if name not in file.schema_arrow.names]:
            raise ValueError(f"{path} has no column {missing[0]!r}")
        table = file.read(columns=list(columns) if columns else None)
    for name in table.column_names:
        if not pa.types.is_string(table.schema.field(name).type):
            continue
        try:
            table.column(name).validate(full=True)
        except pa.ArrowInvalid:
            raise ValueError(f"{path}: column {name} holds bytes that are not UTF-8: ingest the source again") from None
    return table


def list_values(column: Any) -> list[np.ndarray]:
    """The lists of a column such as `input_ids`, without copies."""
    return [row for chunk in column.chunks for row in _split(chunk)]


def _split(chunk: Any) -> list[np.ndarray]:
    offsets = chunk.offsets.to_numpy()
    values = chunk.values.to_numpy()
    return [values[begin:end] for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


def add_counts(shards: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of counts by name, in the order in which names are met."""
    totals: Counter[str] = Counter()
    for counts in shards:
        totals.update(counts)
        totals.update(dict.fromkeys(counts, 0))
    return dict(totals)


def check_sum(stage: str, counts: Mapping[str, int]) -> None:
    """Raise RuntimeError unless `num_in` documents were kept or dropped for a named reason."""
    dropped = sum(number for name, number in counts.items() if name.startswith("num_dropped_"))
    if counts["num_in"] != counts["num_kept"] + dropped:
        raise RuntimeError(f"{stage} lost count of documents: {dict(counts)}")
