"""Writes MDS, the shards that MosaicML's streaming data sets read (mosaicml-streaming 0.13, format version 2).

    shard    uint32 number of samples n; uint32 n+1 offsets of the samples from the file's begin; JSON of the columns;
             the samples
    sample   of each column without a fixed size uint32 its bytes; then the columns' bytes, in the order of their names
    index.json   {"version": 2, "shards": [...]}: of each shard its file, its size and what its JSON says

Encodings: `str` is UTF-8; `int` an int64; `json` JSON; `ndarray:T` one byte, 4 for the one dimension plus the power of
two of the bytes of the length, then the length, then the values. All numbers are little endian. Lists of booleans are
`ndarray:uint8`, since numpy's bool has no code; the segments of Rows are `json`.

Followed: `streaming/base/format/mds/{writer,encodings}.py`. It writes an empty shard before a sample that is larger
than a shard; we do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.exporters.source_shards import OBJECT_BYTES, SourceShard, with_tokens

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 2**26
"""A shard is closed before it is larger; the writer's own default."""
INDEX = "index.json"


@dataclass
class MdsWriter:
    """Writes samples to shards that are numbered from 0."""

    folder: Path
    encodings: Mapping[str, str]
    """By column."""
    shards: list[dict[str, int]] = field(default_factory=list)
    """Of each finished shard: `samples`, `bytes`."""
    _samples: list[bytes] = field(default_factory=list)
    _filled: int = 0

    def write(self, columns: Mapping[str, Sequence[bytes]]) -> None:
        """Add samples, given as encoded columns."""
        for values in zip(*(columns[name] for name in sorted(self.encodings)), strict=True):
            self._add(self._sample(values))

    def close(self) -> None:
        """Finish the last shard."""
        if not self._samples:
            return
        settings = json.dumps(shard_settings(self.encodings), sort_keys=True).encode()
        offsets = [4 + 4 * (len(self._samples) + 1) + len(settings)]
        for sample in self._samples:
            offsets.append(offsets[-1] + len(sample))
        head = b"".join(_uint32(number) for number in (len(self._samples), *offsets))
        with (self.folder / shard_name(len(self.shards))).open("wb") as file:
            file.writelines([head, settings, *self._samples])
        self.shards.append({"samples": len(self._samples), "bytes": offsets[-1]})
        self._samples, self._filled = [], 0

    def _sample(self, values: Sequence[bytes]) -> bytes:
        names = sorted(self.encodings)
        sizes = [
            _uint32(len(value))
            for name, value in zip(names, values, strict=True)
            if _fixed_bytes(self.encodings[name]) is None
        ]
        return b"".join([*sizes, *values])

    def _add(self, sample: bytes) -> None:
        settings = len(json.dumps(shard_settings(self.encodings), sort_keys=True))
        if self._samples and 8 + settings + self._filled + len(sample) + 4 > SHARD_BYTES:
            self.close()
        self._samples.append(sample)
        self._filled += len(sample) + 4


def shard_name(number: int) -> str:
    """Of a shard's file."""
    return f"shard.{number:05d}.mds"


def shard_settings(encodings: Mapping[str, str]) -> dict[str, Any]:
    """What the index and the shards themselves say of the columns."""
    names = sorted(encodings)
    return {
        "column_encodings": [encodings[name] for name in names],
        "column_names": names,
        "column_sizes": [_fixed_bytes(encodings[name]) for name in names],
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": SHARD_BYTES,
        "version": 2,
    }


def write_index(folder: Path, encodings: Mapping[str, str], shards: Sequence[Mapping[str, int]]) -> None:
    """Write `index.json` of shards 0, 1, ...: of each its `samples` and `bytes`."""
    entries = [
        {
            **shard_settings(encodings),
            "raw_data": {"basename": shard_name(number), "bytes": shard["bytes"], "hashes": {}},
            "samples": shard["samples"],
            "zip_data": None,
        }
        for number, shard in enumerate(shards)
    ]
    text = json.dumps({"shards": entries, "version": 2}, sort_keys=True)
    (folder / INDEX).write_text(text, encoding="utf-8")


def mds_encodings(schema: pa.Schema, names: Mapping[str, str]) -> dict[str, str]:
    """The encoding of each column, by the name that it gets. Raises ValueError for a type that has none."""
    import pyarrow as pa

    scalars, lists = {pa.string(): "str", pa.int64(): "int"}, {pa.int32(): "ndarray:int32", pa.bool_(): "ndarray:uint8"}
    encodings = {}
    for column in schema:
        encoding = scalars.get(column.type)
        if pa.types.is_list(column.type):
            values = column.type.value_type
            encoding = "json" if pa.types.is_struct(values) else lists.get(values)
        if encoding is None:
            raise ValueError(f"column {column.name} is {column.type}, for which MDS has no encoding")
        encodings[names.get(column.name, column.name)] = encoding
    return encodings


def write_mds(shard: SourceShard, names: Mapping[str, str], folder: Path) -> list[dict[str, int]]:
    """Write a shard of ours as shards of theirs; records without tokens are left out, as arrays may not be empty."""
    encodings = mds_encodings(shard.schema, names)
    writer = MdsWriter(folder, encodings)
    for batch in shard.batches(OBJECT_BYTES):
        kept = with_tokens(batch) if shard.vocab_size is not None else batch
        renamed = {names.get(name, name): kept.column(name) for name in kept.schema.names}
        writer.write({name: _encode(column, encodings[name]) for name, column in renamed.items()})
    writer.close()
    return writer.shards


def _encode(column: Any, encoding: str) -> list[bytes]:
    if encoding == "str":
        return [value.encode() for value in column.to_pylist()]
    if encoding == "int":
        return [value.to_bytes(8, "little", signed=True) for value in column.to_pylist()]
    if encoding == "json":
        return [json.dumps(value).encode() for value in column.to_pylist()]
    return _encode_arrays(column, encoding.removeprefix("ndarray:"))


def _encode_arrays(column: Any, dtype: str) -> list[bytes]:
    import numpy as np

    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.dtype(dtype).newbyteorder("<"))
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).tolist()
    encoded, begin = [], 0
    for length in lengths:
        power = 0 if length < 2**8 else 1 if length < 2**16 else 2
        head = bytes([1 << 2 | power]) + length.to_bytes(2**power, "little")
        encoded.append(head + flat[begin : begin + length].tobytes())
        begin += length
    return encoded


def _fixed_bytes(encoding: str) -> int | None:
    return 8 if encoding == "int" else None


def _uint32(number: int) -> bytes:
    return number.to_bytes(4, "little")
