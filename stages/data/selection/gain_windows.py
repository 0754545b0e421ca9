"""Windows that stand for documents where information gain is measured and predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.stages.checkpoint import extends_vocabulary, tokenizer_digest
from ropewalk.stages.context import Context
from ropewalk.stages.data.selection.document_reading import DocumentKind, DocumentReader
from ropewalk.stages.schema import read_artifact, seeded_rng, shard_paths, write_shard
from ropewalk.stages.shards import Shard, map_shards

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Windows:
    """One window a document, at a place drawn by its id."""

    num_tokens: int
    seed: int

    def of(self, doc_id: str, ids: Sequence[int]) -> list[int]:
        """The window of a document, which is long enough."""
        rng = seeded_rng("information_gain", "window", self.seed, doc_id)
        start = int(rng.integers(0, len(ids) - self.num_tokens + 1))
        return list(ids[start : start + self.num_tokens])


class WindowReader:
    """Reads one shard of Documents or Tokens after another."""

    def __init__(self, windows: Windows, kind: DocumentKind, model: Path) -> None:
        self._windows = windows
        self._reader = _reader(windows, kind, model)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write the windows of a shard, given with its number; returns the counts."""
        import pyarrow as pa

        number, path = shard
        counts: Counter[str] = Counter(num_in=0, num_dropped_too_short=0)
        rows = [
            {
                "sample_id": document.doc_id,
                "source": document.source,
                "num_tokens": len(document.ids),
                "window": self._windows.of(document.doc_id, document.ids),
            }
            for document in self._reader.read(path, counts)
        ]
        write_shard(folder, "windows", number, pa.Table.from_pylist(rows, schema=_windows_schema()))
        return {name: counts[name] for name in ("num_in", "num_dropped_too_short")}


def _reader(windows: Windows, kind: DocumentKind, model: Path) -> DocumentReader:
    return DocumentReader(kind, model, min_tokens=windows.num_tokens, max_tokens=None, enable_begin=False)


def _windows_schema() -> pa.Schema:
    import pyarrow as pa

    fields = (
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("num_tokens", pa.int64()),
        ("window", pa.list_(pa.int32())),
    )
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


def read_windows(windows: Windows, folder: Path, model: Path, context: Context) -> dict[str, Shard]:
    """The windows of slot `candidates`, by shard."""
    kind = _kind_of(folder, "candidates", model)
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(folder, kind))}
    read = partial(WindowReader, windows, kind, model)
    return {shard.name: shard for shard in map_shards(context, read, paths, label="windows")}


def objective_windows(windows: Windows, folder: Path, model: Path, most: int) -> list[list[int]]:
    """The first windows of slot `objective`, `most` at most. Raises ValueError if no document is long enough."""
    kind = _kind_of(folder, "objective", model)
    reader, found = _reader(windows, kind, model), []
    for path in shard_paths(folder, kind):
        for document in reader.read(path, Counter()):
            found.append(windows.of(document.doc_id, document.ids))
            if len(found) == most:
                return found
    if not found:
        raise ValueError(f"no document of slot objective has context_tokens {windows.num_tokens} tokens: lower it")
    return found


def _kind_of(folder: Path, slot: str, model: Path) -> DocumentKind:
    """Raises ValueError for neither Documents nor Tokens, or tokens of another tokenizer than the model's."""
    artifact = read_artifact(folder)
    if artifact.kind == "documents":
        return "documents"
    if artifact.kind != "tokens":
        raise ValueError(f"slot {slot} takes documents or tokens, but {folder} holds {artifact.kind}")
    if artifact.tokenizer is None or artifact.tokenizer.digest != tokenizer_digest(model):
        own = folder / "tokenizer"
        if not (own / "tokenizer.json").is_file() or not extends_vocabulary(model, own):
            raise ValueError(f"slot {slot} was encoded by another tokenizer than slot model's: encode it with that one")
    return "tokens"
