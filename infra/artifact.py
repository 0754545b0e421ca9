"""An artifact: the attempt that made it, the manifest of its files, the digest they make together, its commit."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ropewalk.infra.key import FORMAT_VERSION, canonical_json, sha256_hex
from ropewalk.infra.objects import Objects, file_sha256, sync_file, sync_folder

PARTS = ("data", "observed")
INSIDE = tuple(f"{part}/" for part in PARTS)
UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and what Python makes of bytes that are no text."""
Entry = dict[str, Any]
"""A file: `path` relative to the attempt's folder, `size` in bytes, `sha256` in hex."""


class StoreError(Exception):
    """An artifact cannot be read or committed; the message names the file."""


@dataclass(frozen=True)
class Attempt:
    """One try at a step: a folder of its own that nobody else writes."""

    key: str
    name: str
    folder: Path
    """On this machine."""

    @property
    def data(self) -> Path:
        """The artifact's files."""
        return self.folder / "data"

    @property
    def observed(self) -> Path:
        """Measurements."""
        return self.folder / "observed"


@dataclass(frozen=True)
class Commit:
    """A committed output."""

    key: str
    number: int
    attempt: Attempt
    digest: str
    record: dict[str, Any]
    uri: str
    """Where the artifact's data lies in the store."""

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return sum(entry["size"] for entry in data_files(self.record["files"]))

    @property
    def num_files(self) -> int:
        """Number of files of the data."""
        return len(data_files(self.record["files"]))

    @property
    def output(self) -> dict[str, Any]:
        """The output as reports and records show it."""
        return {"uri": self.uri, "digest": self.digest}


def describe(folder: Path) -> list[Entry]:
    """The files of an attempt. Raises StoreError for what cannot be committed."""
    files = sorted(_files(folder))
    waiting = iter(files)

    def digest() -> dict[str, str]:
        # Several threads take from one iterator: a queue of tasks would cost more than the digest of a small file.
        return {path: file_sha256(f"{folder}/{path}") for path, _ in waiting}

    with ThreadPoolExecutor(max_workers=num_threads()) as pool:
        running = [pool.submit(digest) for _ in range(num_threads())]
        digests = {path: sha256 for part in running for path, sha256 in part.result().items()}
    return [{"path": path, "size": size, "sha256": digests[path]} for path, size in files]


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Path relative to the attempt's folder and size of each file."""
    for part in PARTS:
        top = folder / part
        if top.is_symlink() or not top.is_dir():
            raise StoreError(f"{top}: only files and folders can be committed, and this must be a folder")
        for path, folders, names, handle in os.fwalk(top, onerror=_raise):
            for name in (*folders, *names):
                if UNUSABLE.search(name):
                    # Not every place to store has them, and a name that is no text has no place in JSON.
                    where = repr(f"{path}/{name}")
                    raise StoreError(f"{where}: control characters and bytes that are no text cannot be in a name")
                status = os.stat(name, dir_fd=handle, follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    raise StoreError(f"{path}/{name}: symbolic links cannot be committed")
                if stat.S_ISREG(status.st_mode):
                    yield f"{path}/{name}"[len(str(folder)) + 1 :], status.st_size
                elif not stat.S_ISDIR(status.st_mode):
                    raise StoreError(f"{path}/{name}: only files and folders can be committed")


def _raise(error: OSError) -> None:
    raise error


def make_durable(folder: Path, files: Sequence[Entry]) -> None:
    """Sync the files of an attempt, and the folders that they lie in."""
    with ThreadPoolExecutor(max_workers=num_threads()) as pool:
        list(pool.map(sync_file, (folder / entry["path"] for entry in files)))
    inner = {PurePosixPath(entry["path"].rpartition("/")[0]) for entry in files}
    for path in {path for each in inner for path in (each, *each.parents)}:
        sync_folder(folder / path)


def manifest_text(key: str, files: Sequence[Entry]) -> str:
    """The manifest as it is stored."""
    return canonical_json({"format": FORMAT_VERSION, "key": key, "files": files}) + "\n"


def parse_manifest(content: bytes, name: str) -> list[Entry]:
    """The files of a manifest. Raises StoreError naming it, also for a path that leaves the attempt's folder."""
    try:
        files = json.loads(content)["files"]
        for entry in files:
            path = entry["path"]
            if not path.startswith(INSIDE) or "/../" in f"{path}/":
                raise StoreError(f"{name}: path {path!r} leaves the attempt's folder")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{name}: not a manifest: {error!r}") from None
    return files


def compare_sizes(objects: Objects, folder: str, files: Sequence[Entry]) -> tuple[list[str], list[Entry]]:
    """What is gone or has another size, in words; and the files that are there with theirs."""
    sizes = objects.sizes(folder)
    problems, sound = [], []
    for entry in files:
        path, size = entry["path"], sizes.get(entry["path"])
        if size is None:
            problems.append(f"{objects.uri}/{folder}/{path}: gone")
        elif size != entry["size"]:
            problems.append(f"{objects.uri}/{folder}/{path}: has {size} bytes, was committed with {entry['size']}")
        else:
            sound.append(entry)
    return problems, sound


def compare_contents(
    objects: Objects, folder: str, files: Sequence[Entry], on_read: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """The files whose content is not what was committed, in words; `on_read` is called with the size of each."""
    found = []
    with ThreadPoolExecutor(max_workers=num_threads()) as pool:
        digests = pool.map(lambda entry: objects.sha256(f"{folder}/{entry['path']}"), files)
        for entry, digest in zip(files, digests, strict=True):
            on_read(entry["size"])
            if digest != entry["sha256"]:
                found.append(f"{objects.uri}/{folder}/{entry['path']}: content changed since it was committed")
    return found


def data_files(files: Sequence[Entry]) -> list[Entry]:
    """The files of the artifact, measurements left out."""
    return [entry for entry in files if entry["path"].startswith("data/")]


def output_digest(files: Sequence[Entry]) -> str:
    """sha256 of the canonical JSON of the sorted [path, size, sha256] of `data/`, paths relative to it."""
    rows = [[e["path"].removeprefix("data/"), e["size"], e["sha256"]] for e in data_files(files)]
    return sha256_hex(canonical_json(sorted(rows)))


def num_threads() -> int:
    """How many files to read or sync at once."""
    return min(8, os.cpu_count() or 1)
