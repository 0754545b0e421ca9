"""Reads the files and data sets that documents come from, one document at a time.

A source is a folder (or one file) of text files, JSON Lines or Parquet, or a Hugging Face data set. `open_source` cuts
it into parts, one a file, in the order of their relative paths; calling a part reads it. Memory holds the paths and
one text file, one line or one Parquet batch.

Globs are matched against relative POSIX paths, part by part and case-sensitively: `**` stands for any number of
folders, `*`, `?` and `[...]` for text inside one name.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ropewalk.stages.schema import Record

Format = Literal["text", "jsonl", "parquet", "huggingface"]
_FILES, _RECORDS = ("text", "jsonl", "parquet"), ("jsonl", "parquet", "huggingface")
_APPLIES: dict[str, tuple[str, ...]] = {
    "include": _FILES,
    "exclude": _FILES,
    "encoding": ("text",),
    "text_field": _RECORDS,
    "id_field": _RECORDS,
    "metadata_fields": _RECORDS,
    "dataset": ("huggingface",),
    "revision": ("huggingface",),
    "split": ("huggingface",),
    "subset": ("huggingface",),
}


class SourceConfig(Record):
    """Where one part of the corpus comes from."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """The input slot that holds the files, the `source` of the documents and the beginning of their ids."""
    format: Format
    """text: one document a file. jsonl (also .gz), parquet: one a record. huggingface: a data set, from the slot (a
    folder written by `save_to_disk`, or one that `load_dataset` reads), or by `dataset` where there is no such slot."""
    include: tuple[str, ...] = ("**/*",)
    """Globs of the files to read. Files."""
    exclude: tuple[str, ...] = ()
    """Globs of the files to leave out, by the same rules. Files."""
    encoding: str = "utf-8"
    """Of text files; JSON is always UTF-8."""
    text_field: str = "text"
    """The field that holds the text. Records."""
    id_field: str | None = None
    """The field, a string or an integer, that names the document; without it the file and line do. Records."""
    metadata_fields: tuple[str, ...] = ()
    """Fields kept in `metadata`; each record must have them. Records."""
    min_bytes: int = Field(default=0, ge=0)
    """Shorter texts, in bytes of UTF-8, are dropped as too_short."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Longer texts, in bytes of UTF-8, are dropped as too_long."""
    dataset: str | None = None
    """The data set's name on the hub."""
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """Its commit, in full: a branch moves, and the output must not."""
    split: str = "train"
    """Split of the data set."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, encoding: str) -> str:
        try:
            return codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"unknown encoding {encoding!r}") from None

    @model_validator(mode="after")
    def _fields_apply(self) -> SourceConfig:
        for name, formats in _APPLIES.items():
            if self.format not in formats and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"source {self.name}: {name} does not apply to format {self.format}")
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ValueError(f"source {self.name}: max_bytes {self.max_bytes} is below min_bytes {self.min_bytes}")
        if (self.dataset is None) != (self.revision is None):
            raise ValueError(f"source {self.name}: dataset and revision go together")
        return self


@dataclass(frozen=True)
class RawDocument:
    """A document as it was read."""

    doc_id: str
    text: str | None
    """None if the bytes are not text in the encoding."""
    metadata: str
    """A JSON object."""


Part = Callable[[], Iterator[RawDocument]]


def open_source(source: SourceConfig, root: Path | None, work: Path) -> list[Part]:
    """The parts of a source. `root` is its input slot, `work` a folder for downloads.

    Raises ValueError if the source has no slot, or its globs match no file.
    """
    if source.format == "huggingface":
        return [partial(_read_huggingface, source, root, work)]
    if root is None:
        raise ValueError(f"source {source.name} has no input: connect a folder or file to the slot {source.name!r}")
    if root.is_file():
        return [partial(_READERS[source.format], source, root, root.name)]
    files = list_files(root, source.include, source.exclude)
    if not files:
        raise ValueError(f"source {source.name}: no file matches include {source.include} and exclude {source.exclude}")
    return [partial(_READERS[source.format], source, root / name, name) for name in files]


def list_files(root: Path, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Sorted relative POSIX paths of the files below `root` that match a glob of `include` and none of `exclude`.

    Folders that `exclude` covers whole are not entered; links to folders are not followed.
    """
    wanted, unwanted = _split_globs(include), _split_globs(exclude)
    covered = [glob for glob in unwanted if glob[-1] == "**"]
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root).parts
        folders[:] = [name for name in folders if not _matches_any((*here, name), covered)]
        for name in files:
            path = (*here, name)
            if _matches_any(path, wanted) and not _matches_any(path, unwanted):
                found.append("/".join(path))
    return sorted(found)


def _split_globs(globs: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(glob.split("/")) for glob in globs]


def _matches_any(path: tuple[str, ...], globs: Sequence[tuple[str, ...]]) -> bool:
    return any(_matches(path, glob) for glob in globs)


def _matches(path: tuple[str, ...], glob: tuple[str, ...]) -> bool:
    if not glob:
        return not path
    if glob[0] == "**":
        return any(_matches(path[skip:], glob[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], glob[0]) and _matches(path[1:], glob[1:])


def _read_text(source: SourceConfig, path: Path, name: str) -> Iterator[RawDocument]:
    try:
        text = path.read_bytes().decode(source.encoding)
    except UnicodeDecodeError:
        text = None
    yield RawDocument(f"{source.name}/{name}", text, "{}")


def _read_jsonl(source: SourceConfig, path: Path, name: str) -> Iterator[RawDocument]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{name}:{number}"
            try:
                record = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"{source.name}/{place} is not JSON in UTF-8: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{source.name}/{place} is not a JSON object")
            yield _document(source, record, place)


def _read_parquet(source: SourceConfig, path: Path, name: str) -> Iterator[RawDocument]:
    import pyarrow.parquet as pq

    wanted = [source.text_field, *filter(None, [source.id_field]), *source.metadata_fields]
    number = 0
    with pq.ParquetFile(path) as file:
        if missing := [field for field in wanted if field not in file.schema_arrow.names]:
            raise ValueError(f"{source.name}/{name} has no column {missing[0]!r}")
        for batch in file.iter_batches(batch_size=1024, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield _document(source, record, f"{name}:{number}")


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}


def _read_huggingface(source: SourceConfig, root: Path | None, work: Path) -> Iterator[RawDocument]:
    for number, record in enumerate(_load_huggingface(source, root, work)):
        yield _document(source, record, f"{source.split}:{number}")


def _load_huggingface(source: SourceConfig, root: Path | None, work: Path) -> Any:
    import datasets

    cache = str(work / "huggingface")
    if root is None:
        if source.dataset is None:
            raise ValueError(f"source {source.name} needs an input slot of that name, or dataset and revision")
        return datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, cache_dir=cache
        )
    if source.dataset is not None:
        raise ValueError(f"source {source.name} has both an input slot and dataset {source.dataset!r}: drop one")
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        loaded = datasets.load_from_disk(str(root))
        if isinstance(loaded, datasets.Dataset):
            return loaded
        if source.split not in loaded:
            raise ValueError(f"source {source.name} has no split {source.split!r}, only {sorted(map(str, loaded))}")
        return loaded[source.split]
    return datasets.load_dataset(str(root), source.subset, split=source.split, cache_dir=cache)


def _document(source: SourceConfig, record: Mapping[str, Any], place: str) -> RawDocument:
    text = _field(source, record, source.text_field, place)
    if not isinstance(text, str):
        raise ValueError(f"{source.name}/{place}: field {source.text_field!r} holds {type(text).__name__}, not text")
    doc_id = place
    if source.id_field is not None:
        doc_id = _field(source, record, source.id_field, place)
        if isinstance(doc_id, bool) or not isinstance(doc_id, str | int):
            raise ValueError(f"{source.name}/{place}: field {source.id_field!r} is neither a string nor an integer")
    metadata = {name: _field(source, record, name, place) for name in source.metadata_fields}
    try:
        return RawDocument(f"{source.name}/{doc_id}", text, json.dumps(metadata, sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source.name}/{place}: metadata_fields cannot be written as JSON: {error}") from None


def _field(source: SourceConfig, record: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in record:
        raise ValueError(f"{source.name}/{place} has no field {name!r}")
    return record[name]
