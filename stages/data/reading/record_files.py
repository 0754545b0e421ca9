"""Reads records: what a record must hold to be a document, and the records of Parquet and Arrow files.

See `ropewalk.stages.data.reading.readers` for what is dropped and what is an error.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.reading.sources import Part, RawDocument, SourceConfig

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_RECORDS, _BATCH_BYTES = 1024, 2**24
"""Records are turned into Python objects so many at a time, fewer if the mean record is large."""
_BUFFER_BYTES = 2**20
_UNDECODABLE = object()
"""Stands for a string that is not UTF-8."""


def document(source: SourceConfig, record: Mapping[str, Any], place: str) -> RawDocument:
    """The document of a record. Raises ValueError naming `place` if a field is missing or of another type."""
    text = _field(source, record, source.text_field, place)
    if not isinstance(text, str) and text is not _UNDECODABLE:
        raise ValueError(f"{source.name}/{place}: field {source.text_field!r} holds {type(text).__name__}, not text")
    doc_id = place
    if source.id_field is not None:
        doc_id = _field(source, record, source.id_field, place)
        if isinstance(doc_id, bool) or not isinstance(doc_id, str | int):
            raise ValueError(f"{source.name}/{place}: field {source.id_field!r} is neither a string nor an integer")
    doc_id, metadata = f"{source.name}/{doc_id}", _metadata(source, record, place)
    if text is _UNDECODABLE:
        return RawDocument(doc_id, None, metadata, "undecodable")
    return RawDocument(doc_id, text, metadata)


def _metadata(source: SourceConfig, record: Mapping[str, Any], place: str) -> str:
    if not source.metadata_fields:
        return "{}"
    metadata = {name: _field(source, record, name, place) for name in source.metadata_fields}
    try:
        return json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source.name}/{place}: metadata_fields cannot be written as JSON: {error}") from None


def _field(source: SourceConfig, record: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in record:
        raise ValueError(f"{source.name}/{place} has no field {name!r}")
    return record[name]


@contextmanager
def reading(source: SourceConfig, name: str) -> Iterator[None]:
    """Turn what libraries raise for damaged data into one sentence; errors of the machine pass."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{source.name}/{name} is damaged, or not {source.format}: {error}") from None
    except OSError as error:
        if error.errno is not None:  # Arrow gives those of the data none.
            raise
        raise ValueError(f"{source.name}/{name} is damaged, or not {source.format}: {error}") from None


def record_columns(source: SourceConfig, name: str, columns: Sequence[str]) -> list[str]:
    """The columns to read. Raises ValueError if one is missing."""
    wanted = [source.text_field, *filter(None, [source.id_field]), *source.metadata_fields]
    if missing := [field for field in wanted if field not in columns]:
        raise ValueError(f"{source.name}/{name} has no column {missing[0]!r}")
    return list(dict.fromkeys(wanted))


def batch_records(num_records: int, num_bytes: int) -> int:
    """How many records to turn into Python objects at a time, of a table of so many records and bytes."""
    return max(1, min(_BATCH_RECORDS, _BATCH_BYTES * max(1, num_records) // max(1, num_bytes)))


def batch_documents(source: SourceConfig, batch: Any, name: str, first: int) -> Iterator[RawDocument]:
    """Documents of a record batch or table, whose records are numbered from `first`."""
    names = batch.schema.names
    columns = [_values(source, batch.column(field), field, f"{name}:{first}") for field in names]
    for number, values in enumerate(zip(*columns, strict=True), first):
        yield document(source, dict(zip(names, values, strict=True)), f"{name}:{number}")


def _values(source: SourceConfig, column: Any, field: str, place: str) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        if field != source.text_field:
            raise ValueError(f"{source.name}/{place} and later: field {field!r} is not UTF-8: {error}") from None
    return _decoded(column)


def _decoded(column: Any) -> list[Any]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.type == pa.string_view():
        column = column.cast(pa.large_string())
    values = column.cast(_binary(column.type)).to_pylist()
    return [None if value is None else _decode(value) for value in values]


def _binary(string: pa.DataType) -> pa.DataType:
    """What a string column is without the promise that it is UTF-8."""
    import pyarrow as pa

    return {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(string, string)


def _decode(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _UNDECODABLE


def row_group_parts(source: SourceConfig, path: Path, name: str, part_bytes: int) -> list[Part]:
    """Consecutive row groups of a Parquet file, as many as make `part_bytes` without compression."""
    import pyarrow.parquet as pq

    with reading(source, name):
        footer = pq.read_metadata(path)
    parts, begin, row = [], 0, 0
    num_bytes = num_rows = 0
    for number in range(footer.num_row_groups):
        num_bytes += footer.row_group(number).total_byte_size
        num_rows += footer.row_group(number).num_rows
        if num_bytes < part_bytes and number + 1 < footer.num_row_groups:
            continue
        read = partial(read_parquet, source, path, name, range(begin, number + 1), row)
        parts.append(Part(f"{name}:{row + 1}", num_bytes, read))
        begin, row, num_bytes, num_rows = number + 1, row + num_rows, 0, 0
    return parts


def read_parquet(
    source: SourceConfig, path: Path, name: str, groups: range | None = None, first: int = 0
) -> Iterator[RawDocument]:
    """Documents of a Parquet file, or of some of its row groups, before which `first` records lie."""
    import pyarrow.parquet as pq

    # Without the buffer, whole column chunks are loaded, which may be a file.
    with reading(source, name), pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        columns = record_columns(source, name, file.schema_arrow.names)
        groups = range(file.metadata.num_row_groups) if groups is None else groups
        for group in groups:
            about = file.metadata.row_group(group)
            size = batch_records(about.num_rows, about.total_byte_size)
            for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns):
                yield from batch_documents(source, batch, name, first + 1)
                first += batch.num_rows


def read_arrow(source: SourceConfig, path: Path, name: str) -> Iterator[RawDocument]:
    """Documents of an Arrow IPC file (Feather, too) or stream."""
    first = 1
    for table in _arrow_batches(source, path, name):
        size = batch_records(table.num_rows, table.nbytes)
        for begin in range(0, table.num_rows, size):
            batch = table.slice(begin, size)
            yield from batch_documents(source, batch, name, first)
            first += batch.num_rows


def _arrow_batches(source: SourceConfig, path: Path, name: str) -> Iterator[pa.RecordBatch]:
    """The record batches of an IPC file or stream. They are mapped: no more is loaded than is looked at."""
    import pyarrow as pa

    with reading(source, name), pa.memory_map(str(path)) as file:
        magic = file.read(6)
        if magic.startswith(b"FEA1"):
            raise ValueError(f"{source.name}/{name} is Feather of version 1: write it anew as version 2")
        opened = pa.ipc.open_file if magic == b"ARROW1" else pa.ipc.open_stream
        file.seek(0)
        names = opened(file).schema.names
        fields = [names.index(field) for field in record_columns(source, name, names)]
        file.seek(0)
        reader: Any = opened(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
        whole = map(reader.get_batch, range(reader.num_record_batches)) if magic == b"ARROW1" else reader
        for batch in whole:
            for column in batch.columns:
                # Offsets that lead out of a damaged file would end the process.
                column.view(_binary(column.type)).validate(full=True)
            yield batch
