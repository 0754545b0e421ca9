"""Reads files and data sets into Documents, each text once.

Reads one input slot a source (see `ropewalk.stages.data.readers`). Writes Documents in the order of the sources, then
of the files, then of the records.

Lost: documents that cannot be decoded (`undecodable`), hold white space only (`empty`), are outside the size limits
(`too_short`, `too_long`), or have the same text, by SHA-256, as an earlier one of any source (`duplicate`). A record
that is malformed or lacks a field is an error: it shows that the config describes other data.

Memory: one shard, and about 200 bytes for each kept document (128 bits of its hash, and its id where a field names it),
so 20 GiB for 1e8 documents.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from ropewalk.stages.checks import check_documents
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.readers import RawDocument, SourceConfig, open_source
from ropewalk.stages.schema import Artifact, Record, documents_schema, write_artifact, write_shard

NAME = "ingest"
VERSION = 1
check = check_documents

REASONS = ("undecodable", "empty", "too_short", "too_long", "duplicate")
SHARD_DOCUMENTS = 65_536


class IngestConfig(Record):
    """What to read."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """In order: of equal texts, the first is kept."""
    shard_bytes: int = Field(default=16 * 2**20, gt=0)
    """A shard is closed at this many bytes of text, or at 65,536 documents. Later stages work shard by shard."""

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = Counter(source.name for source in sources)
        if twice := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}")
        return sources


@dataclass
class Selection:
    """Decides which documents are kept, and counts."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """By source: `num_in`, `num_kept`, `num_kept_bytes` and `num_dropped_<reason>`."""
    texts: set[bytes] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)

    def keep(self, source: SourceConfig, documents: Iterable[RawDocument]) -> Iterator[dict[str, Any]]:
        """The records of Documents to keep. Raises ValueError if an id occurs twice or is not Unicode text."""
        counts = self.counts.setdefault(source.name, Counter())
        for document in documents:
            self._check_id(source, document.doc_id)
            counts["num_in"] += 1
            encoded = _utf8(document.text)
            if reason := self._drop_reason(source, encoded):
                counts[f"num_dropped_{reason}"] += 1
                continue
            counts["num_kept"] += 1
            counts["num_kept_bytes"] += len(encoded or b"")
            yield {
                "doc_id": document.doc_id,
                "text": document.text,
                "source": source.name,
                "num_bytes": len(encoded or b""),
                "metadata": document.metadata,
            }

    def _check_id(self, source: SourceConfig, doc_id: str) -> None:
        if _utf8(doc_id) is None:
            raise ValueError(f"document id {doc_id!r} is not Unicode text: rename the file or exclude it")
        if source.id_field is None:  # Paths and line numbers are unique as they are.
            return
        if doc_id in self.ids:
            raise ValueError(
                f"document id {doc_id!r} occurs twice: id_field {source.id_field!r} does not name documents"
            )
        self.ids.add(doc_id)

    def _drop_reason(self, source: SourceConfig, text: bytes | None) -> str | None:
        if text is None:
            return "undecodable"
        if not text.strip():
            return "empty"
        if len(text) < source.min_bytes:
            return "too_short"
        if source.max_bytes is not None and len(text) > source.max_bytes:
            return "too_long"
        digest = hashlib.sha256(text).digest()[:16]
        if digest in self.texts:
            return "duplicate"
        self.texts.add(digest)
        return None

    def totals(self) -> dict[str, int]:
        """The counts over all sources; every reason is named. Raises RuntimeError if they do not add up."""
        names = ("num_in", "num_kept", "num_kept_bytes", *(f"num_dropped_{reason}" for reason in REASONS))
        totals = {name: sum(counts[name] for counts in self.counts.values()) for name in names}
        dropped = sum(totals[f"num_dropped_{reason}"] for reason in REASONS)
        if totals["num_in"] != totals["num_kept"] + dropped:
            raise RuntimeError(f"ingest lost count of documents: {totals}")
        return totals


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


def _read_all(
    config: IngestConfig, inputs: Mapping[str, Path], selection: Selection, context: Context
) -> Iterator[dict[str, Any]]:
    parts = [
        (source, part)
        for source in config.sources
        for part in open_source(source, inputs.get(source.name), context.work)
    ]
    for done, (source, part) in enumerate(parts, 1):
        yield from selection.keep(source, part())
        context.progress(done, len(parts), "files")


def run(config: IngestConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Read every source into Documents. Raises ValueError on bad input, or if nothing is left."""
    import pyarrow as pa

    if unknown := sorted(set(inputs) - {source.name for source in config.sources}):
        raise ValueError(f"input slot {unknown[0]!r} belongs to no source of ingest.sources")
    started = time.perf_counter()
    selection = Selection()
    shards = cut_shards(_read_all(config, inputs, selection, context), config.shard_bytes)
    num_shards = 0
    for records in shards:
        table = pa.Table.from_pylist(records, schema=documents_schema())
        write_shard(output.data, "documents", num_shards, table)
        num_shards += 1
    totals = selection.totals()
    if not num_shards:
        raise ValueError(f"ingest kept no document: {totals}")
    by_source = {name: dict(sorted(counts.items())) for name, counts in selection.counts.items()}
    write_artifact(output.data, Artifact(kind="documents", counts=totals, details={"sources": by_source}))
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "bytes_per_second": totals["num_kept_bytes"] / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(totals)
