"""Writes a shard as JSON Lines, Parquet, Arrow (an IPC file), or a file of a data set saved by Hugging Face.

A saved data set is what `datasets.load_from_disk` reads: IPC streams `data-00000-of-00002.arrow`, `state.json` and
`dataset_info.json`. Its fingerprint is a hash of the files, so that equal exports are equal in every byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.data.exporters.source_shards import OBJECT_BYTES, SourceShard

if TYPE_CHECKING:
    import pyarrow as pa

Compression = Literal["none", "gzip", "zstd"]
SUFFIXES: dict[Compression, str] = {"none": "", "gzip": ".gz", "zstd": ".zst"}
WriteBatch = Callable[["pa.RecordBatch"], None]


def write_parquet(shard: SourceShard, names: Mapping[str, str], path: Path) -> int:
    """Returns the number of records; `names` gives columns other names."""
    import pyarrow.parquet as pq

    schema = _renamed(shard.schema, names)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        return _write_batches(shard, schema, writer.write_batch)


def write_arrow(shard: SourceShard, names: Mapping[str, str], path: Path) -> int:
    """Returns the number of records. Nothing is compressed, so that the file can be mapped."""
    schema = _renamed(shard.schema, names)
    with _ipc_writer(path, schema, "file") as write:
        return _write_batches(shard, schema, write)


def write_jsonl(shard: SourceShard, names: Mapping[str, str], compression: Compression, path: Path) -> int:
    """Returns the number of records. `metadata` of Documents becomes an object."""
    import pyarrow as pa

    num_records = 0
    codec = None if compression == "none" else compression
    with pa.output_stream(str(path), compression=codec) as file:
        for batch in shard.batches(OBJECT_BYTES):
            lines = [_json_line(record, names, shard.path) for record in batch.to_pylist()]
            file.write("".join(lines).encode())
            num_records += len(lines)
    return num_records


def _json_line(record: dict[str, Any], names: Mapping[str, str], path: Path) -> str:
    try:
        if "metadata" in record:
            record["metadata"] = json.loads(record["metadata"])
        named = {names.get(name, name): value for name, value in record.items()}
        return json.dumps(named, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: metadata of {record['doc_id']!r} is not JSON: {error}") from None


def write_dataset_file(shard: SourceShard, names: Mapping[str, str], features: Mapping[str, Any], path: Path) -> int:
    """Returns the number of records. `features`: of `dataset_features`."""
    schema = _renamed(shard.schema, names)
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with _ipc_writer(path, schema, "stream") as write:
        return _write_batches(shard, schema, write)


def dataset_features(shard: SourceShard, names: Mapping[str, str]) -> dict[str, Any]:
    """The columns in the words of `datasets`."""
    import datasets

    features: Any = datasets.Features.from_arrow_schema(_renamed(shard.schema, names))
    return features.to_dict()


def dataset_file_name(number: int, num_files: int) -> str:
    """As `save_to_disk` names it."""
    return f"data-{number:05d}-of-{num_files:05d}.arrow"


def finish_dataset(folder: Path, features: Mapping[str, Any], file_digests: Sequence[str]) -> None:
    """Write what `load_from_disk` needs beside the files."""
    from dataclasses import asdict

    import datasets

    files = [{"filename": dataset_file_name(number, len(file_digests))} for number in range(len(file_digests))]
    state = {
        "_data_files": files,
        "_fingerprint": hashlib.sha256("".join(file_digests).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = asdict(datasets.DatasetInfo(features=datasets.Features.from_dict(dict(features))))
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    # The order of the features is that of the columns.
    ordered = {name: info[name] for name in sorted(info)}
    (folder / "dataset_info.json").write_text(json.dumps(ordered, indent=2), encoding="utf-8")


def _write_batches(shard: SourceShard, schema: pa.Schema, write: WriteBatch) -> int:
    import pyarrow as pa

    num_records = 0
    for batch in shard.batches():
        write(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        num_records += batch.num_rows
    return num_records


def _renamed(schema: pa.Schema, names: Mapping[str, str]) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([field.with_name(names.get(field.name, field.name)) for field in schema])


@contextmanager
def _ipc_writer(path: Path, schema: pa.Schema, kind: Literal["file", "stream"]) -> Iterator[WriteBatch]:
    import pyarrow as pa

    opened: Callable[..., AbstractContextManager[Any]] = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, opened(file, schema) as writer:
        yield writer.write_batch
