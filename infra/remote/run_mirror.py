"""Run records in an object store: the driver's machine sends its own there, other machines bring them to read.

A record is written as files of the machine that drives the run. What is written whole is an object of the same name.
What only grows (events, logs) becomes `<name>.d/<offset>` objects, of which the last is written again until it is
large enough, so that a long run never sends the same events many times and makes few objects.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from ropewalk.infra.remote.object_store import Entry, ObjectStoreObjects
from ropewalk.infra.store import Store

INTERVAL_SECONDS = 3.0
FILES_AT_ONCE = 16
PIECE_BYTES = 64 << 10
PULL_SECONDS = 2.0
"""Records are asked for at most so often by one process."""
GROWING = (".jsonl", ".log")
ORIGIN = ".origin"
"""Beside `run.json` on the machine that wrote the record."""

PIECE = re.compile(r"(.+)\.d/([0-9]{15})")
OWN = "written here"
"""Stands for the tag of what this machine has written itself."""

_pulled: dict[tuple[Path, str | None], float] = {}
"""When each store, by its folder on this machine, was last asked for what; on this process's monotonic clock."""


class RunMirror:
    """Sends the events and logs below a folder of this machine, from time to time and at the end of the block.

    `folder` is relative to the store, as in `runs/<run id>`. What is written whole, `RunRecord` sends itself.
    """

    def __init__(self, store: Store, folder: str, interval: float = INTERVAL_SECONDS) -> None:
        assert isinstance(store.objects, ObjectStoreObjects)
        self._objects = store.objects
        self._root = store.root
        self._folder = store.root / folder
        self._interval = interval
        self._sent: dict[str, tuple[int, int]] = {}
        """Of each file, where the last piece begins and how far the file was sent."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="run-mirror", daemon=True)

    @staticmethod
    def of_own_run(store: Store, run_id: str) -> RunMirror:
        """For the record of a run that this machine drives."""
        (store.root / "runs" / run_id / ORIGIN).touch()
        return RunMirror(store, f"runs/{run_id}")

    @staticmethod
    def of_log(store: Store, log_name: str) -> contextlib.AbstractContextManager[Any]:
        """For the logs beside a log of a run that another machine drives; nothing if this one drives it."""
        folder = PurePosixPath(log_name).parent
        run = store.root.joinpath(*folder.parts[:2])
        return contextlib.nullcontext() if (run / ORIGIN).exists() else RunMirror(store, str(folder))

    def __enter__(self) -> RunMirror:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._try_to_sync()

    def sync(self) -> None:
        """Send what is new."""
        for path in sorted(self._folder.rglob("*")):
            if path.suffix in GROWING:
                self._send(path.relative_to(self._root).as_posix(), path)

    def _work(self) -> None:
        while not self._ended.wait(self._interval):
            self._try_to_sync()

    def _try_to_sync(self) -> None:
        try:
            self.sync()
        except OSError as error:
            sys.stderr.write(f"the record of the run could not be copied to {self._objects.uri}: {error}\n")

    def _send(self, name: str, path: Path) -> None:
        start, end = self._sent.get(name, (0, 0))
        size = path.stat().st_size
        with path.open("rb") as file:
            while end < size or name not in self._sent:
                if end - start >= PIECE_BYTES:
                    start = end
                file.seek(start)
                content = file.read(max(PIECE_BYTES, end - start + 1))
                self._objects.write(f"{name}.d/{start:015d}", content)
                end = start + len(content)
                self._sent[name] = start, end


def pull_runs(store: Store, *, at_once: bool = False, logs_of: str | None = None) -> None:
    """Bring the records of all runs of an object store to this machine, where they are new or have grown.

    Logs, which may be long, are brought of the run `logs_of`; then nothing is done about the other runs. What was
    asked for a moment ago is not asked again, unless `at_once`. Records that were removed elsewhere go here, too.

    Raises OSError if the store does not answer.
    """
    objects, what = store.objects, (store.root, logs_of)
    if not isinstance(objects, ObjectStoreObjects):
        return
    if not at_once and time.monotonic() - _pulled.get(what, float("-inf")) < PULL_SECONDS:
        return
    seen_path = store.root / "cache" / "runs.json"
    seen = _read_seen(seen_path)
    brought = {_file_of(name)[0] for name, tag in seen.items() if tag != OWN}
    part = f"{logs_of}/" if logs_of else ""
    entries = {part + name: entry for name, entry in objects.entries(f"runs/{part}".rstrip("/")).items()}
    wanted = []
    for name, entry in entries.items():
        if seen.get(name) != entry.tag and (logs_of or "/logs/" not in name) and _is_confined(name):
            is_ours = _is_ours(store, name, brought)
            seen[name] = OWN if is_ours else entry.tag
            wanted += [] if is_ours else [(name, entry)]
    wanted.sort(key=lambda item: _file_of(item[0]))
    by_file = [list(pieces) for _, pieces in itertools.groupby(wanted, key=lambda item: _file_of(item[0])[0])]
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(lambda pieces: _bring(store, objects, pieces), by_file))
    gone = {name for name in seen if name.startswith(part)} - entries.keys()
    _forget(store, {name.partition("/")[0] for name in gone} - {name.partition("/")[0] for name in entries})
    _write_seen(seen_path, {name: tag for name, tag in seen.items() if name not in gone})
    _pulled[what] = time.monotonic()


def _is_confined(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and len(path.parts) > 1


def _is_ours(store: Store, name: str, brought: set[str]) -> bool:
    """Whether this machine has written it itself; then the file is ahead of the object."""
    target = _file_of(name)[0]
    own = (store.root / "runs" / PurePosixPath(name).parts[0] / ORIGIN).exists()
    return own and target not in brought and (store.root / "runs" / target).exists()


def _file_of(name: str) -> tuple[str, int]:
    """The file that an object belongs to, and where in it."""
    match = PIECE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 0)


def _bring(store: Store, objects: ObjectStoreObjects, pieces: list[tuple[str, Entry]]) -> None:
    """Bring what is new of one file; its time becomes that of the newest piece."""
    path = store.root / "runs" / _file_of(pieces[0][0])[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, _ in pieces:
        content = objects.read(f"runs/{name}")
        if PIECE.fullmatch(name):
            path.touch()
            with path.open("rb+") as file:
                file.seek(_file_of(name)[1])
                file.write(content)
        else:
            _write_whole(path, content)
    changed_at = max(entry.changed_at for _, entry in pieces)
    os.utime(path, (changed_at, changed_at))


def _forget(store: Store, run_ids: set[str]) -> None:
    for run_id in run_ids:
        shutil.rmtree(store.root / "runs" / run_id, ignore_errors=True)


def _read_seen(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_seen(path: Path, seen: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, json.dumps(seen).encode())


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")
    temporary.write_bytes(content)
    temporary.replace(path)
