"""The store: where artifacts are kept, and how one is committed exactly once.

    objects/<key>/attempts/<uuid>/data/       the artifact; its digest is the output digest
    objects/<key>/attempts/<uuid>/observed/   measurements, in the manifest but not in the digest
    objects/<key>/attempts/<uuid>/manifest.json
    objects/<key>/commits/<000000>.json       created exclusively; the highest valid one wins
    runs/<run id>/                            the append-only record of a run
    work/<key>/                               scratch of a resumable stage, removed after the commit
    cache/                                    digests of external files; may be deleted at any time

A commit is a hard link of a complete, synced file: it exists wholly or not at all, and the second of two committers
is refused by the file system. Until then nothing of an attempt is visible to a reader.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ropewalk.infra.external import file_sha256
from ropewalk.infra.key import FORMAT_VERSION, canonical_json, sha256_hex
from ropewalk.infra.step import UserError


class StoreError(Exception):
    """An artifact cannot be read or committed; the message names the file."""


@dataclass(frozen=True)
class Attempt:
    """One try at a step: a folder of its own that nobody else writes."""

    key: str
    name: str
    folder: Path

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

    @property
    def uri(self) -> str:
        """Where the artifact's data lies."""
        return str(self.attempt.data)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return sum(entry["size"] for entry in self.record["files"] if entry["path"].startswith("data/"))

    @property
    def num_files(self) -> int:
        """Number of files of the data."""
        return sum(entry["path"].startswith("data/") for entry in self.record["files"])

    @property
    def output(self) -> dict[str, Any]:
        """The output as reports and records show it."""
        return {"uri": self.uri, "digest": self.digest}


class Store:
    """A store under one root folder."""

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if "://" in text and not text.startswith("file://"):
            raise UserError(f"--store {text}: this version keeps its store in a local folder")
        self.root = Path(text.removeprefix("file://")).expanduser().absolute()

    @property
    def uri(self) -> str:
        """The root as a text."""
        return str(self.root)

    @property
    def external_cache(self) -> Path:
        """Where digests of external files are remembered."""
        return self.root / "cache" / "externals.json"

    def work(self, key: str) -> Path:
        """The scratch folder of a key, made if need be."""
        folder = self.root / "work" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def drop_work(self, key: str) -> None:
        """Remove the scratch folder of a key, after its commit."""
        shutil.rmtree(self.root / "work" / key, ignore_errors=True)

    def begin(self, key: str, name: str) -> Attempt:
        """Make the folders of a new attempt; its name comes from `new_attempt_name`."""
        attempt = Attempt(key, name, self.root / "objects" / key / "attempts" / name)
        attempt.data.mkdir(parents=True)
        attempt.observed.mkdir()
        return attempt

    def commit(self, attempt: Attempt, record: Mapping[str, Any], *, force: bool = False) -> Commit:
        """Write the manifest and create the commit; the first committer of a key wins.

        Returns the winning commit: ours, or the one that somebody else made meanwhile (our attempt is then removed).
        With `force`, a commit with the next free number is added. Raises StoreError for an output that cannot be
        committed (a symbolic link, nothing written).
        """
        files = _describe(attempt.folder)
        if not any(entry["path"].startswith("data/") for entry in files):
            raise StoreError(f"attempt {attempt.name}: the stage wrote nothing to its output folder")
        manifest = canonical_json({"format": FORMAT_VERSION, "key": attempt.key, "files": files})
        _write_synced(attempt.folder / "manifest.json", manifest + "\n")
        document = {
            "format": FORMAT_VERSION,
            "key": attempt.key,
            "attempt": attempt.name,
            "manifest_sha256": sha256_hex(manifest + "\n"),
            "output_digest": output_digest(files),
            "committed_at": time.time(),
            **record,
        }
        return self._create_commit(attempt, document, files, force)

    def latest(self, key: str) -> tuple[Commit | None, list[str]]:
        """The highest valid commit of a key, and what is wrong with the ones above it.

        Valid means: the record and the manifest can be read and belong together, and every file is there with its
        size. `verify` also compares contents.
        """
        problems: list[str] = []
        for path in sorted((self.root / "objects" / key / "commits").glob("*.json"), reverse=True):
            try:
                commit = self._read_commit(key, path)
            except StoreError as error:
                problems.append(str(error))
                continue
            missing = quick_problems(commit)
            if not missing:
                return commit, problems
            problems += missing
        return None, problems

    def commits(self) -> list[Commit]:
        """The valid commit of every key."""
        found = [self.latest(path.name)[0] for path in sorted((self.root / "objects").glob("*"))]
        return [commit for commit in found if commit is not None]

    def _create_commit(self, attempt: Attempt, document: dict[str, Any], files: list, force: bool) -> Commit:
        folder = self.root / "objects" / attempt.key / "commits"
        folder.mkdir(exist_ok=True)
        number = 0
        while True:
            temporary = attempt.folder / f"commit.{number}"
            _write_synced(temporary, canonical_json(document) + "\n")
            try:
                os.link(temporary, folder / f"{number:06d}.json")
            except FileExistsError:
                winner, _ = self.latest(attempt.key)
                if winner is not None and not force:
                    shutil.rmtree(attempt.folder, ignore_errors=True)
                    return winner
                number = max(number, *(int(path.stem) for path in folder.glob("*.json"))) + 1
                continue
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(folder)
            return Commit(attempt.key, number, attempt, document["output_digest"], {**document, "files": files})

    def _read_commit(self, key: str, path: Path) -> Commit:
        document = _read_json(path)
        if document.get("format") != FORMAT_VERSION or document.get("key") != key:
            raise StoreError(f"{path}: not a commit of format {FORMAT_VERSION} for this key")
        name = str(document.get("attempt"))
        if not name.isalnum():
            raise StoreError(f"{path}: attempt name {name!r} is not allowed")
        attempt = Attempt(key, name, self.root / "objects" / key / "attempts" / name)
        manifest_path = attempt.folder / "manifest.json"
        try:
            text = manifest_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{manifest_path}: {error}") from None
        if sha256_hex(text) != document.get("manifest_sha256"):
            raise StoreError(f"{manifest_path}: changed since it was committed")
        files = json.loads(text)["files"]
        for entry in files:
            _confined(entry["path"], manifest_path)
        return Commit(key, int(path.stem), attempt, document["output_digest"], {**document, "files": files})


def new_attempt_name() -> str:
    """A name that no other attempt has."""
    return uuid.uuid4().hex


def output_digest(files: list[dict[str, Any]]) -> str:
    """sha256 of the canonical JSON of the sorted [path, size, sha256] of `data/`, paths relative to it."""
    data = [entry for entry in files if entry["path"].startswith("data/")]
    return sha256_hex(canonical_json(sorted([e["path"].removeprefix("data/"), e["size"], e["sha256"]] for e in data)))


def quick_problems(commit: Commit) -> list[str]:
    """Files of a committed attempt that are gone or have another size."""
    problems = []
    for entry in commit.record["files"]:
        path = commit.attempt.folder / entry["path"]
        try:
            size = path.stat().st_size
        except OSError:
            problems.append(f"{path}: gone")
            continue
        if size != entry["size"]:
            problems.append(f"{path}: has {size} bytes, was committed with {entry['size']}")
    return problems


def deep_problems(commit: Commit) -> list[str]:
    """As `quick_problems`, and files whose content has changed."""
    problems = quick_problems(commit)
    if not problems:
        for entry in commit.record["files"]:
            path = commit.attempt.folder / entry["path"]
            if file_sha256(path) != entry["sha256"]:
                problems.append(f"{path}: content changed since it was committed")
    return problems


def _describe(folder: Path) -> list[dict[str, Any]]:
    paths = []
    for part in ("data", "observed"):
        for path in sorted((folder / part).rglob("*")):
            if path.is_symlink():
                raise StoreError(f"{path}: symbolic links cannot be committed")
            if path.is_file():
                paths.append(path)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_digest_synced, paths))
    for parent in {path.parent for path in paths}:
        _sync_folder(parent)
    return [
        {"path": path.relative_to(folder).as_posix(), "size": size, "sha256": digest}
        for path, (size, digest) in zip(paths, digests, strict=True)
    ]


def _digest_synced(path: Path) -> tuple[int, str]:
    digest = file_sha256(path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, digest


def _confined(relative: str, manifest: Path) -> None:
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts or path.parts[:1] not in (("data",), ("observed",)):
        raise StoreError(f"{manifest}: path {relative!r} leaves the attempt's folder")


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise StoreError(f"{path}: not a JSON object")
    return document
