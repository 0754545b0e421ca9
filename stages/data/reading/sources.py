"""Where documents come from, and what a reader makes of them: see `ropewalk.stages.data.reading.readers`."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ropewalk.stages.schema import Record

Format = Literal["text", "code", "jsonl", "parquet", "arrow", "huggingface"]
_TEXTS: tuple[Format, ...] = ("text", "code")
_RECORDS: tuple[Format, ...] = ("jsonl", "parquet", "arrow", "huggingface")
_FILES: tuple[Format, ...] = ("text", "code", "jsonl", "parquet", "arrow")
_APPLIES: dict[str, tuple[str, ...]] = {
    "include": _FILES,
    "exclude": _FILES,
    "encoding": _TEXTS,
    "text_field": _RECORDS,
    "id_field": _RECORDS,
    "metadata_fields": _RECORDS,
    "dataset": ("huggingface",),
    "revision": ("huggingface",),
    "split": ("huggingface",),
    "subset": ("huggingface",),
}
MAX_DOCUMENT_BYTES = 2**30
"""Of UTF-8. A column of a shard addresses 2 GiB, and a shard is closed behind the document that fills it."""


class SourceConfig(Record):
    """Where one part of the corpus comes from."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """The input slot that holds the files, the `source` of the documents and the beginning of their ids."""
    format: Format
    """text: one document a file. code: the same, with `path`, `repository` (the first folder of the path, null for a
    file beside them) and `language` (by the file's name, null if unknown) as metadata; folders .git, .hg and .svn are
    left out. jsonl (also .gz, .zst, .bz2, .lz4, .xz), parquet, arrow (IPC files, which Feather files are, or streams):
    one a record. huggingface: a data set, from the slot (a folder written by `save_to_disk`, or one that `load_dataset`
    reads), or by `dataset` where there is no such slot."""
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
    max_bytes: int | None = Field(default=None, gt=0, le=MAX_DOCUMENT_BYTES)
    """Longer texts, in bytes of UTF-8, are dropped as too_long. None: 1 GiB, the most that a document can have."""
    dataset: str | None = None
    """The data set's name on the hub."""
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """Its commit, in full: a branch moves, and the output must not."""
    split: str = "train"
    """Split of the data set."""
    subset: str | None = None
    """Configuration of the data set, where it has several."""

    @property
    def most_bytes(self) -> int:
        """The size of the largest text that is kept."""
        return self.max_bytes or MAX_DOCUMENT_BYTES

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
    """None if the reader dropped it."""
    metadata: str
    """A JSON object."""
    dropped: Literal["undecodable", "too_long"] | None = None
    """Why there is no text."""


@dataclass(frozen=True)
class Part:
    """A file, or a piece of one. Calling it reads it."""

    name: str
    """Unlike that of any other part of the source."""
    num_bytes: int
    """What there is to read, about: a way to cut work into pieces of like size."""
    read: Callable[[], Iterator[RawDocument]]

    def __call__(self) -> Iterator[RawDocument]:
        """Its documents, in order."""
        return self.read()
