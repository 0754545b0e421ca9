"""Reads one shard of Documents, Tokens or Rows for an exporter: batch by batch, with its ids checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.schema import documents_schema, rows_schema, tokens_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

SourceKind = Literal["documents", "tokens", "rows"]
COLUMN_BYTES, OBJECT_BYTES = 2**24, 2**21
"""How much to read at a time to work on columns, and on Python objects, which take some ten times more."""


@dataclass(frozen=True)
class SourceShard:
    """An open Parquet file."""

    path: Path
    file: pq.ParquetFile
    vocab_size: int | None
    """Of the tokenizer; None for Documents."""

    @property
    def schema(self) -> pa.Schema:
        """Its columns."""
        return self.file.schema_arrow.remove_metadata()

    def batches(self, num_bytes: int = COLUMN_BYTES) -> Iterator[pa.RecordBatch]:
        """Its records, about `num_bytes` at a time. Raises ValueError for ids outside the vocabulary."""
        for number in range(self.file.metadata.num_row_groups):
            group = self.file.metadata.row_group(number)
            # Runs of one value take no room in the file, but four bytes each when they are read.
            num_values = sum(group.column(column).num_values for column in range(group.num_columns))
            size = max(1, num_bytes * group.num_rows // max(1, group.total_byte_size, 4 * num_values))
            for batch in self.file.iter_batches(batch_size=size, row_groups=[number]):
                if self.vocab_size is not None:
                    self._check_ids(batch.column("input_ids").flatten().to_numpy(), self.vocab_size)
                yield batch

    def _check_ids(self, ids: np.ndarray, vocab_size: int) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            wrong = int(ids.max() if ids.max() >= vocab_size else ids.min())
            raise ValueError(f"{self.path}: input_ids holds {wrong}, outside the tokenizer's vocab_size {vocab_size}")


@contextmanager
def open_shard(path: Path, kind: SourceKind, vocab_size: int | None) -> Iterator[SourceShard]:
    """Open a shard. Raises ValueError if a column is missing."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        columns = {"documents": documents_schema, "tokens": tokens_schema, "rows": rows_schema}[kind]().names
        if missing := [name for name in columns if name not in file.schema_arrow.names]:
            raise ValueError(f"{path}: column {missing[0]} is missing")
        yield SourceShard(path, file, vocab_size)


def with_tokens(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The records that have token ids."""
    import pyarrow as pa

    ids: Any = batch.column("input_ids")
    has_tokens = ids.value_lengths().to_numpy(zero_copy_only=False) > 0
    return batch if has_tokens.all() else batch.filter(pa.array(has_tokens))
