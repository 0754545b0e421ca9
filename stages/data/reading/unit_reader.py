"""Reads consecutive parts of a source into batches of Documents, and notes what shows which of them are duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ropewalk.stages.data.reading.sources import Part, RawDocument, SourceConfig
from ropewalk.stages.schema import documents_schema

SHARD_DOCUMENTS = 65_536
UNIT_PARTS = 4096
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Unit:
    """Parts of one source that are read together."""

    source: SourceConfig
    parts: tuple[Part, ...]

    def documents(self) -> Iterator[RawDocument]:
        """What the parts hold, in order."""
        for part in self.parts:
            yield from part()


def group_parts(source: SourceConfig, parts: Iterable[Part], unit_bytes: int) -> Iterator[Unit]:
    """Consecutive parts, closed at `unit_bytes` or 4096 parts."""
    group: list[Part] = []
    filled = 0
    for part in parts:
        group.append(part)
        filled += part.num_bytes
        if filled >= unit_bytes or len(group) == UNIT_PARTS:
            yield Unit(source, tuple(group))
            group, filled = [], 0
    if group:
        yield Unit(source, tuple(group))


@dataclass
class UnitReader:
    """Decides what of a unit may be kept, and notes what the pass over all units needs."""

    source: SourceConfig
    texts: BinaryIO
    """128 bits of the hash of each text that may be kept."""
    sizes: BinaryIO
    """uint32: its bytes."""
    ids: BinaryIO
    """128 bits of the hash of every id, if a field names the documents."""
    counts: Counter[str] = field(default_factory=Counter)
    """`num_in` and `num_dropped_<reason>`."""

    def keep(self, documents: Iterable[RawDocument]) -> Iterator[dict[str, Any]]:
        """The records of Documents, but for duplicates. Raises ValueError if an id is not Unicode text."""
        for document in documents:
            self._note_id(document.doc_id)
            self.counts["num_in"] += 1
            encoded = _utf8(document.text)
            reason = (document.dropped or "undecodable") if encoded is None else self._drop_reason(encoded)
            if encoded is None or reason:
                self.counts[f"num_dropped_{reason}"] += 1
                continue
            self.texts.write(_digest(encoded))
            self.sizes.write(len(encoded).to_bytes(4, "little"))
            yield {
                "doc_id": document.doc_id,
                "text": document.text,
                "source": self.source.name,
                "num_bytes": len(encoded),
                "metadata": document.metadata,
            }

    def _note_id(self, doc_id: str) -> None:
        encoded = _utf8(doc_id)
        if encoded is None:
            raise ValueError(f"document id {doc_id!r} is not Unicode text: rename the file or exclude it")
        if self.source.id_field is not None:  # Paths and line numbers are unique as they are.
            self.ids.write(_digest(encoded))

    def _drop_reason(self, text: bytes) -> str | None:
        if b"\0" in text:
            return "nul_bytes"
        if not text or text.isspace():
            return "empty"
        if len(text) < self.source.min_bytes:
            return "too_short"
        return "too_long" if len(text) > self.source.most_bytes else None


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:_DIGEST_BYTES]


def _utf8(text: str | None) -> bytes | None:
    # JSON can spell half a surrogate pair, which no encoding can write.
    try:
        return None if text is None else text.encode()
    except UnicodeEncodeError:
        return None


def cut_shards(records: Iterable[dict[str, Any]], shard_bytes: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive records, closed at `shard_bytes` of text or at 65,536 records."""
    shard: list[dict[str, Any]] = []
    filled = 0
    for record in records:
        shard.append(record)
        filled += record["num_bytes"]
        if filled >= shard_bytes or len(shard) == SHARD_DOCUMENTS:
            yield shard
            shard, filled = [], 0
    if shard:
        yield shard


def read_unit(shard_bytes: int, unit: Unit, folder: Path) -> dict[str, Any]:
    """Write `documents.arrow`, `texts`, `sizes` and `ids` of a unit.

    Returns `counts`, and how many records each batch of the documents has.
    """
    import pyarrow as pa

    schema = documents_schema()
    batch_records = []
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        (folder / "texts").open("wb") as texts,
        (folder / "sizes").open("wb") as sizes,
        (folder / "ids").open("wb") as ids,
        pa.OSFile(str(folder / "documents.arrow"), "wb") as file,
        pa.ipc.new_file(file, schema, options=options) as writer,
    ):
        reader = UnitReader(unit.source, texts, sizes, ids)
        for records in cut_shards(reader.keep(unit.documents()), shard_bytes):
            writer.write_batch(pa.RecordBatch.from_pylist(records, schema=schema))
            batch_records.append(len(records))
    return {"counts": dict(reader.counts), "batch_records": batch_records}
