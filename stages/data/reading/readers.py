"""Reads the files and data sets that documents come from, one document at a time.

A source is a folder (or one file) of text files, source code, JSON Lines, Parquet or Arrow, or a Hugging Face data set.
`open_source` cuts it into parts, in the order of their relative paths; calling a part reads it. A part is a file, or a
piece of a large one where that can be cut without reading it through: row groups of Parquet, rows of a data set, lines
of JSON Lines that are not compressed (their line ends are counted first, so that each line knows its number). Memory
holds the parts (some hundred bytes each) and one text file, one line or one batch of records.

What is no text is a named drop, and `RawDocument.dropped` says which: bytes that are not of the encoding, a string of a
Parquet or Arrow file that is not UTF-8, or a text file that is too long, which is then not loaded. A record that is
malformed, lacks a field or whose JSON is not UTF-8, and a file that is damaged, are errors that name the place: they
show that the config describes other data, or that data is missing.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from ropewalk.stages.data.reading.globs import list_files
from ropewalk.stages.data.reading.languages import language_of
from ropewalk.stages.data.reading.record_files import (
    batch_documents,
    batch_records,
    document,
    read_arrow,
    read_parquet,
    reading,
    record_columns,
    row_group_parts,
)
from ropewalk.stages.data.reading.sources import Part, RawDocument, SourceConfig

MAX_LINE_BYTES = 2**30
"""Of a line of JSON Lines."""
PART_BYTES = 2**26
_BLOCK_BYTES = 2**20
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4", ".xz": "xz"}
_VERSION_CONTROL = (".git", ".hg", ".svn")


def open_source(source: SourceConfig, root: Path | None, work: Path, part_bytes: int = PART_BYTES) -> list[Part]:
    """The parts of a source, of about `part_bytes` or one file. `root` is its input slot, `work` a download folder.

    Raises ValueError if the source has no slot, its globs match no file, or a file cannot be read.
    """
    if source.format == "huggingface":
        return _huggingface_parts(source, _load_huggingface(source, root, work), part_bytes)
    if root is None:
        raise ValueError(f"source {source.name} has no input: connect a folder or file to the slot {source.name!r}")
    if root.is_file():
        return _file_parts(source, root, root.name, part_bytes)
    exclude = source.exclude
    if source.format == "code":
        exclude = (*exclude, *(f"**/{folder}/**" for folder in _VERSION_CONTROL))
    files = list_files(root, source.include, exclude)
    if not files:
        raise ValueError(f"source {source.name}: no file matches include {source.include} and exclude {source.exclude}")
    return [part for name in files for part in _file_parts(source, root / name, name, part_bytes)]


def _file_parts(source: SourceConfig, path: Path, name: str, part_bytes: int) -> list[Part]:
    if not path.is_file():
        raise ValueError(f"{source.name}/{name} is no regular file (a broken link, a pipe or a device): exclude it")
    num_bytes = path.stat().st_size
    if num_bytes > part_bytes and source.format == "parquet":
        return row_group_parts(source, path, name, part_bytes)
    if num_bytes > part_bytes and source.format == "jsonl" and path.suffix not in _CODECS:
        return _line_parts(source, path, name, part_bytes)
    return [Part(name, num_bytes, partial(_READERS[source.format], source, path, name))]


# Text and code


def _read_text(source: SourceConfig, path: Path, name: str) -> Iterator[RawDocument]:
    text, dropped = _decode_file(source, path)
    yield RawDocument(f"{source.name}/{name}", text, "{}", dropped)


def _read_code(source: SourceConfig, path: Path, name: str) -> Iterator[RawDocument]:
    text, dropped = _decode_file(source, path)
    repository = name.split("/")[0] if "/" in name else None
    about = {"language": language_of(name), "path": name, "repository": repository}
    # A path that is no Unicode text is told when the document's id is looked at.
    yield RawDocument(f"{source.name}/{name}", text, json.dumps(about), dropped)


def _decode_file(source: SourceConfig, path: Path) -> tuple[str | None, Literal["undecodable", "too_long"] | None]:
    # A file of another encoding may have many bytes for one of UTF-8: escapes, byte order marks.
    exact = source.encoding in ("utf-8", "ascii")
    if path.stat().st_size > (source.most_bytes if exact else 16 * source.most_bytes):
        return None, "too_long"
    try:
        return path.read_bytes().decode(source.encoding), None
    except UnicodeError:
        return None, "undecodable"


# JSON Lines


def _line_parts(source: SourceConfig, path: Path, name: str, part_bytes: int) -> list[Part]:
    parts, begin, first = [], 0, 1
    with path.open("rb") as file:
        while num_lines := _skip_lines(file, part_bytes):
            length = file.tell() - begin
            read = partial(_read_jsonl, source, path, name, (begin, length, first))
            parts.append(Part(f"{name}:{first}", length, read))
            begin, first = begin + length, first + num_lines
    return parts


def _skip_lines(file: BinaryIO, num_bytes: int) -> int:
    """Go on by `num_bytes` and to the end of the line there; returns how many lines were passed."""
    num_lines, last = 0, b""
    while num_bytes > 0 and (block := file.read(min(num_bytes, _BLOCK_BYTES))):
        num_lines, num_bytes, last = num_lines + block.count(b"\n"), num_bytes - len(block), block
    while last and not last.endswith(b"\n"):
        rest = file.readline(_BLOCK_BYTES)
        if not rest:
            return num_lines + 1  # The last line of the file has no end.
        num_lines, last = num_lines + rest.count(b"\n"), rest
    return num_lines


def _read_jsonl(
    source: SourceConfig, path: Path, name: str, span: tuple[int, int, int] | None = None
) -> Iterator[RawDocument]:
    """`span`: first byte, number of bytes and number of the first line of a piece of the file."""
    with reading(source, name):
        for number, line in _lines(path, span):
            place = f"{name}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{source.name}/{place} is longer than {MAX_LINE_BYTES} bytes: cut it or take it out")
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source.name}/{place} is not JSON in UTF-8: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"{source.name}/{place} is not a JSON object")
            yield document(source, record, place)


def _lines(path: Path, span: tuple[int, int, int] | None) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, of which no more than the limit and one byte is read."""
    begin, num_bytes, number = span or (0, None, 1)
    with _open_lines(path) as file:
        if begin:
            file.seek(begin)
        while num_bytes is None or num_bytes > 0:
            line = file.readline(MAX_LINE_BYTES + 1)
            if not line:
                return
            yield number, line
            number += 1
            num_bytes = None if num_bytes is None else num_bytes - len(line)


def _open_lines(path: Path) -> BinaryIO:
    import pyarrow as pa

    codec = _CODECS.get(path.suffix)
    if codec is None:
        return path.open("rb")
    if codec == "xz":
        return cast(BinaryIO, lzma.open(path))
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), codec)
    return io.BufferedReader(stream, _BLOCK_BYTES)


# Hugging Face data sets


def _huggingface_parts(source: SourceConfig, dataset: Any, part_bytes: int) -> list[Part]:
    # A data set is a map of files, and travels to a worker as their paths.
    dataset = dataset.select_columns(record_columns(source, source.split, dataset.column_names)).with_format("arrow")
    num_rows, num_bytes = len(dataset), max(1, dataset.data.nbytes)
    size = max(1, part_bytes * num_rows // num_bytes)
    num_records = batch_records(num_rows, num_bytes)
    parts = []
    for begin in range(0, num_rows, size):
        rows = range(begin, min(begin + size, num_rows))
        read = partial(_read_huggingface, source, dataset, rows, num_records)
        parts.append(Part(f"{source.split}:{begin}", num_bytes * len(rows) // num_rows, read))
    return parts


def _read_huggingface(source: SourceConfig, dataset: Any, rows: range, num_records: int) -> Iterator[RawDocument]:
    for begin in range(rows.start, rows.stop, num_records):
        table = dataset[begin : min(begin + num_records, rows.stop)]
        yield from batch_documents(source, table, source.split, begin)


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


_READERS = {
    "text": _read_text,
    "code": _read_code,
    "jsonl": _read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
