"""Chats or Documents as samples to select from: their ids, and an artifact of those that were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.checks import check_documents
from ropewalk.stages.schema import (
    Artifact,
    chats_schema,
    read_artifact,
    read_table,
    shard_paths,
    write_artifact,
    write_shard,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True)
class Samples:
    """A Chats or Documents artifact."""

    folder: Path
    kind: Literal["chats", "documents"]
    ids: pa.ChunkedArray
    """`sample_id` or `doc_id` of all samples in the order of the table, distinct."""
    sources: pa.ChunkedArray

    def write(self, keep: np.ndarray, output: Path) -> dict[str, int]:
        """Write the samples that `keep` ([n], in the order of the table) marks, shard by shard; returns counts."""
        import pyarrow as pa
        import pyarrow.compute
        import pyarrow.parquet as pq

        pc: Any = pyarrow.compute
        first, num_bytes = 0, 0
        for number, path in enumerate(shard_paths(self.folder, self.kind)):
            table = pq.read_table(path)
            chosen = table.filter(pa.array(keep[first : first + table.num_rows]))
            first += table.num_rows
            write_shard(output, self.kind, number, chosen)
            if self.kind == "documents":
                num_bytes += pc.sum(chosen.column("num_bytes")).as_py() or 0
        counts = {"num_in": len(self.ids), "num_kept": int(keep.sum())}
        return counts | ({"num_kept_bytes": num_bytes} if self.kind == "documents" else {})


def open_samples(folder: Path, slot: str) -> Samples:
    """The samples of a slot. Raises ValueError if they are neither Chats nor Documents, none, or an id is not unique.

    Memory: the ids and sources of all samples.
    """
    artifact = read_artifact(folder)
    if artifact.kind not in ("chats", "documents"):
        raise ValueError(f"slot {slot} takes chats or documents, but {folder} holds {artifact.kind}")
    column = "sample_id" if artifact.kind == "chats" else "doc_id"
    table = read_table(folder, artifact.kind, [column, "source"])
    check_distinct(table.column(column), slot)
    return Samples(folder, artifact.kind, table.column(column), table.column("source"))


def check_distinct(ids: pa.ChunkedArray, slot: str) -> None:
    """Raises ValueError if there are no ids, or one occurs twice."""
    import pyarrow.compute

    pc: Any = pyarrow.compute
    if not len(ids):
        raise ValueError(f"slot {slot} is empty: it has no samples")
    if pc.count_distinct(ids).as_py() < len(ids):
        counted: Any = ids.value_counts()
        twice = counted.filter(pc.greater(counted.field("counts"), 1))[0].as_py()["values"]
        raise ValueError(f"slot {slot} has sample {twice!r} twice: deduplicate by id")


def write_samples_artifact(samples: Samples, output: Path, counts: Mapping[str, int], details: dict[str, Any]) -> None:
    """Write `artifact.json` of a selection. Raises RuntimeError if the counts do not add up."""
    dropped = sum(value for name, value in counts.items() if name.startswith("num_dropped_"))
    if counts["num_in"] != counts["num_kept"] + dropped:
        raise RuntimeError(f"the selection lost count of samples: {dict(counts)}")
    write_artifact(output, Artifact(kind=samples.kind, counts=dict(counts), details=details))


def check_samples(config: Any, output: Path) -> None:
    """`check` of stages that write Chats or Documents: schema, that there are samples, and their number."""
    if read_artifact(output).kind == "documents":
        check_documents(config, output)
    else:
        check_chats(config, output)


def check_chats(config: Any, output: Path) -> None:
    """Schema, that there are samples, their number, and that ids are unique. Raises ValueError naming file and field.

    Memory: the ids.
    """
    import pyarrow.parquet as pq

    artifact = read_artifact(output, "chats")
    for path in shard_paths(output, "chats"):
        if not pq.read_schema(path).equals(chats_schema()):
            raise ValueError(f"{path}: its columns are not those of Chats")
    ids = read_table(output, "chats", ["sample_id"]).column("sample_id")
    check_distinct(ids, str(output))
    if artifact.counts.get("num_kept") != len(ids):
        found = artifact.counts.get("num_kept")
        raise ValueError(f"{output / 'artifact.json'}: counts.num_kept is {found}, but there are {len(ids)}")
