"""The finished rows of one unit of work in scratch, laid out so that any of them can be read alone.

    rows.arrow         `row_id`, `segments`, `attention` and `num_padding` of each row
    input_ids.int32    the rows' ids end to end
    loss_mask.bool     one byte a token
    left.parquet       what the unit leaves to the last one: `doc_id`, `start`, `input_ids`, maybe `loss_mask`

Ids and masks are plain arrays, mapped when they are read: the shuffle of all rows copies whole rows of these, where
Arrow's `take` took about as long as writing the Parquet does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ropewalk.stages.data.packing.row_batches import RowBatch
from ropewalk.stages.schema import AttentionPolicy, rows_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ropewalk.stages.data.packing.bins import RowPlan
    from ropewalk.stages.data.packing.rows import Corpus

ROWS, IDS, MASKS, LEFT = "rows.arrow", "input_ids.int32", "loss_mask.bool", "left.parquet"


class UnitWriter:
    """Writes the rows of one unit, and what it leaves, into its folder. A context manager."""

    def __init__(self, folder: Path, row_tokens: int, attention: AttentionPolicy) -> None:
        self.folder, self.row_tokens = folder, row_tokens
        self.attention: AttentionPolicy = attention
        self.counts: dict[str, int] = dict.fromkeys(
            ("num_rows", "num_tokens_kept", "num_tokens_padding", "num_tokens_left"), 0
        )

    def __enter__(self) -> UnitWriter:
        import pyarrow as pa

        self._writer = pa.ipc.new_file(str(self.folder / ROWS), _scratch_schema())
        self._ids: IO[bytes] = (self.folder / IDS).open("wb")
        self._masks: IO[bytes] = (self.folder / MASKS).open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._writer, self._ids, self._masks):
            file.close()

    def write(self, batch: RowBatch, corpus: Corpus, row_ids: Sequence[str]) -> None:
        """Append rows."""
        self._writer.write_batch(_scratch_rows(batch, corpus, row_ids, self.attention))
        batch.input_ids.tofile(self._ids)
        batch.loss_mask.tofile(self._masks)
        self.counts["num_rows"] += batch.num_rows
        self.counts["num_tokens_kept"] += int(batch.segment_tokens.sum())
        self.counts["num_tokens_padding"] += int(batch.num_padding.sum())

    def leave(self, plan: RowPlan, corpus: Corpus) -> None:
        """Leave the pieces of these rows to the last unit. To be called at most once."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pieces = [
            corpus.piece(document, start, length)
            for document, start, length in zip(
                plan.documents.tolist(), plan.starts.tolist(), plan.num_tokens.tolist(), strict=True
            )
        ]
        columns: dict[str, Any] = {
            "doc_id": pa.array([corpus.doc_ids[document] for document in plan.documents.tolist()], pa.string()),
            "start": pa.array(plan.starts + corpus.starts[plan.documents], pa.int64()),
            "input_ids": pa.array(pieces, pa.list_(pa.int32())),
        }
        if corpus.targets is not None:
            masks = [
                corpus.targets[begin : begin + length]
                for begin, length in zip(
                    (corpus.offsets[plan.documents] + plan.starts).tolist(), plan.num_tokens.tolist(), strict=True
                )
            ]
            columns["loss_mask"] = pa.array(masks, pa.list_(pa.bool_()))
        pq.write_table(pa.table(columns), self.folder / LEFT)
        self.counts["num_tokens_left"] += int(plan.num_tokens.sum())


def _scratch_schema() -> pa.Schema:
    import pyarrow as pa

    light = [field for field in rows_schema() if field.name != "input_ids"]
    return pa.schema([*light, pa.field("num_padding", pa.int64(), nullable=False)])


def _scratch_rows(
    batch: RowBatch, corpus: Corpus, row_ids: Sequence[str], attention: AttentionPolicy
) -> pa.RecordBatch:
    import numpy as np
    import pyarrow as pa

    schema = _scratch_schema()
    starts = (batch.segment_starts + corpus.starts[batch.segment_documents]).astype(np.int64)
    pieces = [
        pa.array([corpus.doc_ids[document] for document in batch.segment_documents.tolist()], pa.string()),
        pa.array(starts),
        pa.array(batch.segment_tokens.astype(np.int32)),
        pa.array(batch.segment_row_starts.astype(np.int32)),
    ]
    segments = pa.StructArray.from_arrays(pieces, fields=list(schema.field("segments").type.value_type))
    columns = {
        "row_id": pa.array(row_ids, pa.string()),
        "segments": pa.ListArray.from_arrays(pa.array(batch.segment_offsets.astype(np.int32)), segments),
        "attention": pa.array([attention] * batch.num_rows, pa.string()),
        "num_padding": pa.array(batch.num_padding, pa.int64()),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def pick_rows(folders: Sequence[Path], ends: np.ndarray, wanted: np.ndarray, row_tokens: int) -> tuple[pa.Table, int]:
    """Rows of several units by their number over all of them, and how much of them is padding.

    Args:
        folders: Of the units.
        ends: int64 `[units + 1]`: where the rows of each unit begin.
        wanted: int64: the rows, in the order to give them in.
        row_tokens: Length of a row.
    """
    import numpy as np
    import pyarrow as pa

    input_ids = np.empty((len(wanted), row_tokens), np.int32)
    loss_mask = np.empty((len(wanted), row_tokens), np.bool_)
    parts: list[pa.RecordBatch] = []
    places: list[np.ndarray] = []
    units = np.searchsorted(ends, wanted, side="right") - 1
    for unit in np.unique(units).tolist():
        mine = np.flatnonzero(units == unit)
        mine = mine[np.argsort(wanted[mine])]  # Files are read from front to back.
        rows = wanted[mine] - ends[unit]
        shape = (int(ends[unit + 1] - ends[unit]), row_tokens)
        input_ids[mine] = np.memmap(folders[unit] / IDS, np.int32, "r", shape=shape)[rows]
        loss_mask[mine] = np.memmap(folders[unit] / MASKS, np.bool_, "r", shape=shape)[rows]
        parts += _take(folders[unit] / ROWS, rows)
        places.append(mine)
    order = np.argsort(np.concatenate(places))
    rest = pa.Table.from_batches(parts).combine_chunks().take(pa.array(order))
    return _with_tokens(rest, input_ids, loss_mask), int(rest.column("num_padding").to_numpy().sum())


def _take(path: Path, rows: np.ndarray) -> list[pa.RecordBatch]:
    """Rows of an Arrow file by ascending numbers."""
    import pyarrow as pa

    parts, first = [], 0
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            inside = (rows >= first) & (rows < first + batch.num_rows)
            if inside.any():
                parts.append(batch.take(pa.array(rows[inside] - first)))
            first += batch.num_rows
    return parts


def _with_tokens(rest: pa.Table, input_ids: np.ndarray, loss_mask: np.ndarray) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    schema = rows_schema(loss_mask=True)
    ends = pa.array((np.arange(len(input_ids) + 1) * input_ids.shape[1]).astype(np.int32))
    tokens: dict[str, Any] = {
        "input_ids": pa.ListArray.from_arrays(ends, pa.array(input_ids.reshape(-1))),
        "loss_mask": pa.ListArray.from_arrays(ends, pa.array(loss_mask.reshape(-1))),
    }
    columns = [tokens[name] if name in tokens else rest.column(name) for name in schema.names]
    return pa.Table.from_arrays(columns, schema=schema)
