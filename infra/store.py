"""The store: where artifacts are kept, and how one is committed exactly once.

    objects/<key>/attempts/<uuid>/data/       the artifact; its digest is the output digest
    objects/<key>/attempts/<uuid>/observed/   measurements, in the manifest but not in the digest
    objects/<key>/attempts/<uuid>/manifest.json
    objects/<key>/commits/<000000>.json       created exclusively; the highest valid one wins
    objects/<key>/withdrawn/<000000>.<by>.json  that commit counts no more: damaged, or removed as garbage
    objects/<key>/leases/                     who works on the key (lease.py)
    objects/<key>/tombstones/                 attempts that garbage collection means to remove (garbage.py)
    runs/<run id>/                            the append-only record of a run
    work/<key>/<000000>/                      scratch of a resumable stage, by lease; removed after the commit
    adopted/<name>/                           outside data by name (adopt.py)
    cache/                                    digests of external files; may be deleted at any time

A commit is created exclusively, after all that it names is durable: it exists wholly or not at all, and the second of
two committers is refused. Until then nothing of an attempt is visible to a reader.

In an object store the same names are objects. Stages read and write files: those lie in a scratch folder of this
machine with the same layout, from which commits are uploaded and into which outputs are fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.infra.artifact import (
    Attempt,
    Commit,
    StoreError,
    compare_contents,
    compare_sizes,
    data_files,
    describe,
    make_durable,
    manifest_text,
    output_digest,
    parse_manifest,
)
from ropewalk.infra.key import FORMAT_VERSION, canonical_json, sha256_hex
from ropewalk.infra.objects import LocalObjects, Objects, sync_folder
from ropewalk.infra.step import UserError

if TYPE_CHECKING:
    from ropewalk.infra.remote.object_store import ObjectStoreObjects

__all__ = ["Attempt", "Commit", "Store", "StoreError", "new_attempt_name"]
SCHEMES = ("s3", "gs", "az")


class Store:
    """A store: a local folder, or a prefix of an object store (`s3://bucket/prefix`, `gs://`, `az://`)."""

    def __init__(self, uri: str | Path) -> None:
        text = str(uri).removeprefix("file://")
        # With one slash forgotten it is no folder either.
        scheme = match[1] if (match := re.match(r"(\w{2,}):/", text)) else None
        self._remote: ObjectStoreObjects | None = None
        if scheme is None:
            self.root = Path(text).expanduser().absolute()
            if self.root.exists() and not (self.root.is_dir() and os.access(self.root, os.R_OK | os.X_OK)):
                raise UserError(f"--store {text}: it is no folder, or none that you may read; name another one")
            self.objects: Objects = LocalObjects(self.root)
        elif scheme in SCHEMES and "://" in text:
            from ropewalk.infra.remote.object_store import open_objects, scratch_folder

            remote = open_objects(text)
            self.objects = self._remote = remote
            self.root = scratch_folder(remote.uri)
        else:
            shown = re.sub(r"[^/]*@", "", text).partition("?")[0]  # Without what may be a password.
            raise UserError(f"--store {shown}: a store is a local folder, or begins with s3://, gs:// or az://")

    @property
    def uri(self) -> str:
        """The root as a text; it never holds a secret."""
        return self.objects.uri

    @property
    def is_local(self) -> bool:
        """Whether the files of the store are files of this machine."""
        return self._remote is None

    @property
    def external_cache(self) -> Path:
        """Where digests of external files are remembered."""
        return self.root / "cache" / "externals.json"

    def work(self, key: str, generation: int) -> Path:
        """The scratch folder of a key on this machine, for the holder of this generation of its lease.

        What an earlier holder left is in it. It was moved here: one that still runs, not knowing that it was given up,
        finds its own folder gone and cannot write into its successor's. Raises StoreError if a later holder has it.
        """
        parent, mine = self.root / "work" / key, f"{generation:06d}"
        while (newest := max((path.name for path in parent.glob("[0-9]*")), default="")) < mine:
            with contextlib.suppress(FileNotFoundError):  # Another holder has moved it meanwhile.
                (parent / newest).rename(parent / mine) if newest else (parent / mine).mkdir(parents=True)
        if newest > mine:
            raise StoreError(f"{parent}: a later attempt goes on with it")
        return parent / mine

    def drop_work(self, key: str) -> None:
        """Remove the scratch folders of a key, after its commit."""
        for kind in ("work", "mirrors"):
            shutil.rmtree(self.root / kind / key, ignore_errors=True)
        if not self.is_local:
            self.objects.remove(f"work/{key}")

    def begin(self, key: str, name: str) -> Attempt:
        """Make the folders of a new attempt; its name comes from `new_attempt_name`."""
        attempt = self._attempt(key, name)
        attempt.data.mkdir(parents=True)
        attempt.observed.mkdir()
        return attempt

    def drop_attempt(self, key: str, name: str) -> None:
        """Remove the files of an attempt that no commit names."""
        shutil.rmtree(self._attempt(key, name).folder, ignore_errors=True)
        if not self.is_local:
            self.objects.remove(f"objects/{key}/attempts/{name}")

    def next_number(self, key: str) -> int:
        """The number after the highest that a commit of the key has or had."""
        folders = (f"objects/{key}/commits", f"objects/{key}/withdrawn")
        return max((number for folder in folders for number in self._numbers(folder)), default=-1) + 1

    def commit(self, attempt: Attempt, record: Mapping[str, Any], *, number: int) -> Commit:
        """Write the manifest and create the commit of this number; the first committer of a number wins.

        Returns the winning commit: ours, or the latest one if somebody else was first (our attempt is then removed).
        Raises StoreError for an output that cannot be committed (a symbolic link, nothing written).
        """
        folder = f"objects/{attempt.key}/attempts/{attempt.name}"
        if not self.is_local:
            self._mark(folder).touch()
        files = describe(attempt.folder)
        if not data_files(files):
            raise StoreError(f"attempt {attempt.name}: the stage wrote nothing to its output folder")
        if self.is_local:
            make_durable(attempt.folder, files)
        else:
            self.objects.upload({f"{folder}/{entry['path']}": attempt.folder / entry["path"] for entry in files})
        manifest = manifest_text(attempt.key, files)
        self.objects.write(f"{folder}/manifest.json", manifest.encode())
        if self.is_local:
            for made in (attempt.folder, *attempt.folder.parents[:3]):
                sync_folder(made)
        document = {
            "format": FORMAT_VERSION,
            "key": attempt.key,
            "attempt": attempt.name,
            "manifest_sha256": sha256_hex(manifest),
            "output_digest": output_digest(files),
            "committed_at": time.time(),
            **record,
        }
        content = (canonical_json(document) + "\n").encode()
        if not self.objects.create(f"objects/{attempt.key}/commits/{number:06d}.json", content):
            return self._winner(attempt, number)
        return self._commit(number, attempt, document, files)

    def latest(self, key: str) -> tuple[Commit | None, list[str]]:
        """The highest valid commit of a key, and what is wrong with the ones above it.

        Valid means: not withdrawn, the record and the manifest can be read and belong together, and every file is
        there with its size. `problems` also compares contents.
        """
        found: list[str] = []
        numbers = self._numbers(f"objects/{key}/commits")
        withdrawn = self._numbers(f"objects/{key}/withdrawn") if numbers else []
        for number in reversed(numbers):
            if number in withdrawn:
                found.append(self._why_withdrawn(key, number))
                continue
            try:
                commit = self.read_commit(key, number)
            except StoreError as error:
                found.append(str(error))
                continue
            problems = self.problems(commit)
            if not problems:
                return commit, found
            found += problems
        return None, found

    def known_keys(self) -> list[str]:
        """All keys that have a commit, an attempt or a lease."""
        return self.objects.names("objects")

    def commits(self) -> list[Commit]:
        """The valid commit of every key."""
        found = [self.latest(key)[0] for key in self.known_keys()]
        return [commit for commit in found if commit is not None]

    def numbers(self, key: str) -> list[int]:
        """The numbers of all commits of a key, valid or not."""
        return self._numbers(f"objects/{key}/commits")

    def problems(
        self, commit: Commit, *, deep: bool = False, on_read: Callable[[int], None] = lambda num_bytes: None
    ) -> list[str]:
        """Files of a commit that are gone or have another size; with `deep`, also those whose content has changed.

        `on_read` is called with the size of each file whose content was compared.
        """
        folder = f"objects/{commit.key}/attempts/{commit.attempt.name}"
        problems, sound = compare_sizes(self.objects, folder, commit.record["files"])
        return problems + (compare_contents(self.objects, folder, sound, on_read) if deep else [])

    def withdraw(self, key: str, number: int, by: str, reason: str) -> None:
        """Make a commit count no more, so that the next run makes the output again; its number is not used again.

        It counts again once all who withdrew it have called `reinstate`.
        """
        content = json.dumps({"reason": reason, "at": time.time()}).encode()
        self.objects.write(f"objects/{key}/withdrawn/{number:06d}.{by}.json", content)

    def is_withdrawn(self, key: str, number: int) -> bool:
        """Whether somebody has made this commit count no more."""
        return number in self._numbers(f"objects/{key}/withdrawn")

    def reinstate(self, key: str, number: int, by: str) -> None:
        """Take back a withdrawal."""
        self.objects.remove(f"objects/{key}/withdrawn/{number:06d}.{by}.json")

    def keep(self, commit: Commit) -> bool:
        """Rely on a commit, after the use was recorded: lifts the tombstone. False if it is being removed already."""
        kinds = self.objects.names(f"objects/{commit.key}")
        if "tombstones" in kinds:
            self.objects.remove(f"objects/{commit.key}/tombstones/{commit.attempt.name}.json")
        elif "withdrawn" not in kinds:
            return True  # Nobody has begun to collect it, and who begins now sees the use.
        return not self.is_withdrawn(commit.key, commit.number)

    def pull_runs(self, *, at_once: bool = False, logs_of: str | None = None) -> None:
        """Bring the records of all runs to this machine if they are elsewhere, or were not brought just now.

        With `logs_of`, bring instead all of one run, its logs included. Raises OSError.
        """
        if not self.is_local:
            from ropewalk.infra.remote.run_mirror import pull_runs

            pull_runs(self, at_once=at_once, logs_of=logs_of)

    def fetch(self, uri: str) -> Path:
        """The local folder of a committed output's data, given its URI; it is downloaded if that is needed.

        What is there is right: a download is verified and put in place whole, and of a local store every file that
        was touched since its commit is compared with it. Raises StoreError.
        """
        match = re.fullmatch(r"(.+)/objects/([^/]+)/attempts/([^/]+)/data", uri)
        if not match or match[1] != self.uri:
            from ropewalk.infra.external import fetch_external

            return Path(uri) if "://" not in uri else fetch_external(self, uri)
        commit = self._commit_of(match[2], match[3], uri)
        folder = f"objects/{commit.key}/attempts/{commit.attempt.name}"
        entries = data_files(commit.record["files"])
        problems = self.problems(commit) if self.is_local else []
        problems = problems or self.bring(folder, entries, since=self._made_at(commit))
        if problems:
            raise StoreError(f"{problems[0]}; `ropewalk verify --repair` lets the next run make it again")
        return commit.attempt.data

    def _made_at(self, commit: Commit) -> float:
        """When a commit was made, by the clock that files are touched by: that of a writer may be ahead of it."""
        path = self.root / "objects" / commit.key / "commits" / f"{commit.number:06d}.json"
        return min(commit.record["committed_at"], path.stat().st_ctime if self.is_local else float("inf"))

    def bring(self, folder: str, entries: list[dict[str, Any]], *, since: float) -> list[str]:
        """Make sure that files of a folder, given by path, size and sha256, are on this machine, as they are given.

        In a local store, files that were touched `since` then are compared; what is wrong is returned. From an object
        store what is missing or wrong is brought anew.
        """
        if self._remote is None:
            # The time of the last change to an inode cannot be set back as its mtime can.
            touched = [e for e in entries if (self.root / folder / e["path"]).stat().st_ctime > since]
            return compare_contents(self.objects, folder, touched)
        mark = self._mark(folder)
        checked_at = mark.stat().st_ctime if mark.exists() else None
        files = [(f"{folder}/{e['path']}", self.root / folder / e["path"], e["size"], e["sha256"]) for e in entries]
        self._remote.download(files, checked_at)
        mark.touch()
        return []

    def _mark(self, folder: str) -> Path:
        """Tells by its time when the files of a folder on this machine were known to be right."""
        return (self.root / folder).with_name(f".{Path(folder).name}.checked")

    def read_commit(self, key: str, number: int) -> Commit:
        """A commit by its number, whether its files are sound or not. Raises StoreError if it cannot be read."""
        name = f"objects/{key}/commits/{number:06d}.json"
        document = self._read_json(name)
        if document.get("format") != FORMAT_VERSION or document.get("key") != key:
            raise StoreError(f"{self.uri}/{name}: not a commit of format {FORMAT_VERSION} for this key")
        attempt_name = str(document.get("attempt"))
        if not attempt_name.isalnum():
            raise StoreError(f"{self.uri}/{name}: attempt name {attempt_name!r} is not allowed")
        files = self._read_manifest(key, attempt_name, document.get("manifest_sha256"))
        return self._commit(number, self._attempt(key, attempt_name), document, files)

    def _attempt(self, key: str, name: str) -> Attempt:
        return Attempt(key, name, self.root / "objects" / key / "attempts" / name)

    def _commit(self, number: int, attempt: Attempt, document: dict[str, Any], files: list[dict[str, Any]]) -> Commit:
        uri = f"{self.uri}/objects/{attempt.key}/attempts/{attempt.name}/data"
        record = {**document, "files": files}
        return Commit(attempt.key, number, attempt, document["output_digest"], record, uri)

    def _winner(self, attempt: Attempt, number: int) -> Commit:
        """The commit to use instead of an attempt that came second; the attempt is removed."""
        winner, problems = self.latest(attempt.key)
        if winner is None or winner.number < number:
            why = problems[0] if problems else "it is gone"
            raise StoreError(f"commit {number} of this key was made by somebody else and is not valid: {why}")
        self.drop_attempt(attempt.key, attempt.name)
        return winner

    def _commit_of(self, key: str, attempt: str, uri: str) -> Commit:
        problem = f"{uri}: is not the data of a committed output"
        for number in reversed(self.numbers(key)):
            try:
                commit = self.read_commit(key, number)
            except StoreError as error:
                problem = str(error)
                continue
            if commit.attempt.name == attempt:
                return commit
        raise StoreError(problem)

    def _numbers(self, folder: str) -> list[int]:
        names = self.objects.names(folder)
        return [int(match[1]) for name in names if (match := re.fullmatch(r"(\d+)(\.\w+)?\.json", name))]

    def _why_withdrawn(self, key: str, number: int) -> str:
        names = self.objects.names(f"objects/{key}/withdrawn")
        try:
            name = next(name for name in names if name.startswith(f"{number:06d}."))
            return str(self._read_json(f"objects/{key}/withdrawn/{name}")["reason"])
        except (StopIteration, StoreError, KeyError):
            return f"commit {number} of {key} was withdrawn"

    def _read_manifest(self, key: str, attempt: str, digest: Any) -> list[dict[str, Any]]:
        name = f"objects/{key}/attempts/{attempt}/manifest.json"
        content = self._read_cached(name, digest)
        if hashlib.sha256(content).hexdigest() != digest:
            raise StoreError(f"{self.uri}/{name}: changed since it was committed")
        return parse_manifest(content, f"{self.uri}/{name}")

    def _read_cached(self, name: str, digest: Any) -> bytes:
        """An object that never changes; from an object store it is kept on this machine."""
        if self.is_local:
            return self._read(name)
        local = LocalObjects(self.root)
        try:
            content = local.read(name)
            if hashlib.sha256(content).hexdigest() == digest:
                return content
        except OSError:
            pass
        content = self._read(name)
        local.write(name, content)
        return content

    def _read(self, name: str) -> bytes:
        try:
            return self.objects.read(name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreError(f"{self.uri}/{name}: cannot be read: {error}") from None

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads(self._read(name))
        except ValueError as error:
            raise StoreError(f"{self.uri}/{name}: cannot be read: {error}") from None
        if not isinstance(document, dict):
            raise StoreError(f"{self.uri}/{name}: not a JSON object")
        return document


def new_attempt_name() -> str:
    """A name that no other attempt has."""
    return uuid.uuid4().hex
