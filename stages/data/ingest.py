"""Reads files and data sets into Documents, each text once.

Reads one input slot a source (see `ropewalk.stages.data.reading.readers`). Writes Documents in the order of the
sources, then of the files, then of the records.

Lost: documents that cannot be decoded (`undecodable`), hold a NUL character, which no text does (`nul_bytes`), hold
white space only (`empty`), are outside the size limits (`too_short`, `too_long`), or have the same text, by SHA-256, as
an earlier one of any source (`duplicate`). A record that is malformed or lacks a field is an error: it shows that the
config describes other data.

Work: consecutive parts of a source (files, or pieces of large ones) make a unit of at least `shard_bytes`. Units are
read beside each other, each into a scratch file of record batches (LZ4) and one of digests; one pass over all digests
finds the first document of each text; then the shards are written beside each other, each from the batches that it
overlaps. So the shards are those that reading from the first document to the last would give, however the work was cut.

Memory: a worker holds one shard. The stage holds of each document 128 bits of its text's hash and its size, then its
place (about 25 bytes in all), and before that, a source at a time, 128 bits of each id that a field names; so 2.5 GiB
for 1e8 documents. Scratch: the corpus once, in LZ4.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from ropewalk.stages.checks import check_documents
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.reading.first_seen import first_seen
from ropewalk.stages.data.reading.readers import open_source
from ropewalk.stages.data.reading.shard_plan import copy_shard, plan_shards
from ropewalk.stages.data.reading.sources import MAX_DOCUMENT_BYTES, SourceConfig
from ropewalk.stages.data.reading.unit_reader import Unit, group_parts, read_unit
from ropewalk.stages.schema import Artifact, Record, write_artifact
from ropewalk.stages.shards import Shard, map_shards

if TYPE_CHECKING:
    import numpy as np

NAME = "ingest"
VERSION = 2
check = check_documents

REASONS = ("undecodable", "nul_bytes", "empty", "too_short", "too_long", "duplicate")


class IngestConfig(Record):
    """What to read."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """In order: of equal texts, the first is kept."""
    shard_bytes: int = Field(default=16 * 2**20, gt=0, le=MAX_DOCUMENT_BYTES)
    """A shard is closed at this many bytes of text, or at 65,536 documents. Later stages work shard by shard."""

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = Counter(source.name for source in sources)
        if twice := [name for name, times in names.items() if times > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}")
        return sources


def _gather(units: Sequence[Shard], name: str, dtype: str, width: int = 1) -> np.ndarray:
    """A file of every unit, end to end: `[num, width]`, or `[num]` for a width of 1."""
    import numpy as np

    paths = [unit.folder / name for unit in units]
    item = np.dtype(dtype).itemsize * width
    counts = [path.stat().st_size // item for path in paths]
    gathered = np.empty((sum(counts), width), dtype=dtype)
    begin = 0
    for path, count in zip(paths, counts, strict=True):
        gathered[begin : begin + count] = np.fromfile(path, dtype=dtype).reshape(count, width)
        begin += count
    return gathered if width > 1 else gathered[:, 0]


def _check_ids(source: SourceConfig, units: Sequence[Unit], read: Sequence[Shard]) -> None:
    """Raises ValueError if two documents of a source have one id."""
    import numpy as np

    if source.id_field is None:
        return
    digests = _gather(read, "ids", "<u8", 2)
    for later in np.flatnonzero(~first_seen(digests)):
        earlier = int((digests == digests[later]).all(axis=1).argmax())
        doc_id = _id_at(units, read, int(later))
        if doc_id == _id_at(units, read, earlier):
            raise ValueError(
                f"document id {doc_id!r} occurs twice: id_field {source.id_field!r} does not name documents"
            )


def _id_at(units: Sequence[Unit], read: Sequence[Shard], place: int) -> str:
    """The id of the `place`-th document that came in, which is read again."""
    for unit, done in zip(units, read, strict=True):
        num_in = done.counts["counts"].get("num_in", 0)
        if place < num_in:
            return next(document.doc_id for at, document in enumerate(unit.documents()) if at == place)
        place -= num_in
    raise IndexError(place)


@dataclass(frozen=True)
class Ledger:
    """What came of each source."""

    by_source: dict[str, Counter[str]]
    """By source: `num_in`, `num_kept`, `num_kept_bytes` and `num_dropped_<reason>`."""

    @classmethod
    def of(
        cls,
        sources: Sequence[SourceConfig],
        units: Sequence[Unit],
        read: Sequence[Shard],
        kept: np.ndarray,
        sizes: np.ndarray,
    ) -> Ledger:
        """Add up the units, of whose documents those of `kept` were kept."""
        by_source: dict[str, Counter[str]] = {source.name: Counter() for source in sources}
        begin = 0
        for unit, done in zip(units, read, strict=True):
            end = begin + sum(done.counts["batch_records"])
            mine = kept[begin:end]
            found = {**done.counts["counts"], "num_kept": int(mine.sum())}
            found["num_kept_bytes"] = int(sizes[begin:end][mine].sum(dtype="int64"))
            found["num_dropped_duplicate"] = end - begin - found["num_kept"]
            by_source[unit.source.name].update({name: number for name, number in found.items() if number})
            begin = end
        return cls(by_source)

    def totals(self) -> dict[str, int]:
        """The counts over all sources; every reason is named. Raises RuntimeError if they do not add up."""
        names = ("num_in", "num_kept", "num_kept_bytes", *(f"num_dropped_{reason}" for reason in REASONS))
        totals = {name: sum(counts[name] for counts in self.by_source.values()) for name in names}
        dropped = sum(totals[f"num_dropped_{reason}"] for reason in REASONS)
        if totals["num_in"] != totals["num_kept"] + dropped:
            raise RuntimeError(f"ingest lost count of documents: {totals}")
        return totals


def _open_units(config: IngestConfig, inputs: Mapping[str, Path], work: Path) -> list[Unit]:
    return [
        unit
        for source in config.sources
        for unit in group_parts(
            source, open_source(source, inputs.get(source.name), work, config.shard_bytes), config.shard_bytes
        )
    ]


def _write_documents(config: IngestConfig, units: list[Unit], folder: Path, context: Context) -> Ledger:
    items = {f"{number:06d} {unit.source.name}/{unit.parts[0].name}": unit for number, unit in enumerate(units)}
    read = list(map_shards(context, partial(read_unit, config.shard_bytes), items, label="units", unit="units"))
    for source in config.sources:
        mine = [number for number, unit in enumerate(units) if unit.source == source]
        _check_ids(source, [units[number] for number in mine], [read[number] for number in mine])
    kept = first_seen(_gather(read, "texts", "<u8", 2))
    sizes = _gather(read, "sizes", "<u4")
    ledger = Ledger.of(config.sources, units, read, kept, sizes)
    lying = [(unit.folder / "documents.arrow", unit.counts["batch_records"]) for unit in read]
    for shard in map_shards(context, copy_shard, plan_shards(lying, kept, sizes, config.shard_bytes)):
        shard.link_into(folder)
    return ledger


def run(config: IngestConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Read every source into Documents. Raises ValueError on bad input, or if nothing is left."""
    if unknown := sorted(set(inputs) - {source.name for source in config.sources}):
        raise ValueError(f"input slot {unknown[0]!r} belongs to no source of ingest.sources")
    started = time.perf_counter()
    units = _open_units(config, inputs, context.work)
    ledger = _write_documents(config, units, output.data, context)
    totals = ledger.totals()
    if not totals["num_kept"]:
        raise ValueError(f"ingest kept no document: {totals}")
    by_source = {name: dict(sorted(counts.items())) for name, counts in ledger.by_source.items()}
    write_artifact(output.data, Artifact(kind="documents", counts=totals, details={"sources": by_source}))
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "bytes_per_second": totals["num_kept_bytes"] / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(totals)
