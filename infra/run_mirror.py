"""Run records in an object store: the driver's machine sends its own there, other machines bring them to read.

A record is written as files of the machine that drives the run. What is written whole is an object of the same name.
What only grows (events, logs) becomes `<name>.d/<offset>` objects, of which the last is written again until it is
large enough, so that a long run never sends the same events many times and makes few objects.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from ropewalk.infra.object_store import ObjectStoreObjects
from ropewalk.infra.store import Store

INTERVAL_SECONDS = 3.0
PIECE_BYTES = 64 << 10
PULL_SECONDS = 2.0
"""Records are asked for at most so often by one process."""
GROWING = (".jsonl", ".log")
ORIGIN = ".origin"
"""Beside `run.json` on the machine that wrote the record."""

_pulled: dict[Path, float] = {}
"""When each store, by its folder on this machine, was last asked; on this process's monotonic clock."""


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
            while end < size:
                if end - start >= PIECE_BYTES:
                    start = end
                file.seek(start)
                content = file.read(max(PIECE_BYTES, end - start + 1))
                self._objects.write(f"{name}.d/{start:015d}", content)
                end = start + len(content)
                self._sent[name] = start, end


def pull_runs(store: Store, *, at_once: bool = False) -> None:
    """Bring the records of all runs of an object store to this machine, where they are new or have grown.

    Does nothing if that was done a moment ago, unless `at_once`.

    Raises OSError if the store does not answer.
    """
    objects = store.objects
    if not isinstance(objects, ObjectStoreObjects):
        return
    if not at_once and time.monotonic() - _pulled.get(store.root, float("-inf")) < PULL_SECONDS:
        return
    seen_path = store.root / "cache" / "runs.json"
    seen = _read_seen(seen_path)
    brought = {_file_of(name)[0] for name in seen}
    entries = objects.entries("runs")
    for name, (_, tag) in sorted(entries.items()):
        if seen.get(name) != tag and _is_wanted(store, name, brought):
            _bring(store, objects, name)
            seen[name] = tag
    seen_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = seen_path.with_name(f"{seen_path.name}.{threading.get_native_id()}")
    temporary.write_text(json.dumps({name: tag for name, tag in seen.items() if name in entries}), encoding="utf-8")
    temporary.replace(seen_path)
    _pulled[store.root] = time.monotonic()


def _is_wanted(store: Store, name: str, brought: set[str]) -> bool:
    """Not what this machine has written itself; of that, the file is ahead of the object."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    target = _file_of(name)[0]
    own = (store.root / "runs" / path.parts[0] / ORIGIN).exists()
    return target in brought or not (own and (store.root / "runs" / target).exists())


def _file_of(name: str) -> tuple[str, int]:
    """The file that an object belongs to, and where in it."""
    head, dot, offset = name.rpartition(".d/")
    return (head, int(offset)) if dot and offset.isdigit() else (name, 0)


def _bring(store: Store, objects: ObjectStoreObjects, name: str) -> None:
    target, offset = _file_of(name)
    content = objects.read(f"runs/{name}")
    path = store.root / "runs" / target
    path.parent.mkdir(parents=True, exist_ok=True)
    if target == name:
        temporary = path.with_name(f".{path.name}.{threading.get_native_id()}")
        temporary.write_bytes(content)
        temporary.replace(path)
        return
    path.touch()
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(content)


def _read_seen(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
