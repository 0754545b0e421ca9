"""The record of a run: append-only files under `runs/<run id>/`, the truth that MLflow is a view of.

run.json            what was asked for: pipeline, settings, who runs it
events.jsonl        one JSON object a line, in the order things happened
steps/<step>.json   the identity of each step that was committed or reused
plan.json           what was to run, and why
logs/<step>/<attempt>.log
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import UserError, unknown
from ropewalk.infra.store import Store

RECORDED_PACKAGES = ("ropewalk", "torch", "transformers", "ray", "deepspeed", "mlflow", "pyarrow", "datasets", "bm25s")


def new_run_id() -> str:
    """A run id that sorts by time."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + "-" + secrets.token_hex(2)


class RunRecord:
    """Writes the record of one run. `request` is what it takes to ask for the same again."""

    def __init__(self, store: Store, pipeline: str, request: Mapping[str, Any] | None = None) -> None:
        self.run_id = new_run_id()
        self.folder = store.root / "runs" / self.run_id
        self.folder.mkdir(parents=True)
        asked = {"pipeline": pipeline, "request": dict(request or {}), "started_at": time.time()}
        process = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": process_start(os.getpid())}
        self.write("run.json", {**asked, **process})
        self._events = (self.folder / "events.jsonl").open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._sequence = 0

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        """Add an event, without secrets; it is on its way to the disk when this returns."""
        with self._lock:
            stamped = {"seq": self._sequence, "time": time.time(), **scrub(event)}
            self._events.write(json.dumps(stamped, ensure_ascii=False) + "\n")
            self._events.flush()
            self._sequence += 1
        return stamped

    def write(self, name: str, document: Any) -> None:
        """Write a JSON file of the record, whole or not at all, without secrets."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(scrub(document), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    def log_path(self, step: str, attempt: str) -> Path:
        """Where the output of an attempt is kept."""
        path = self.folder / "logs" / step / f"{attempt}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def close(self) -> None:
        """Sync the events to the disk."""
        self._events.flush()
        os.fsync(self._events.fileno())
        self._events.close()


def run_ids(store: Store) -> list[str]:
    """All recorded runs, newest first."""
    return sorted((path.parent.name for path in (store.root / "runs").glob("*/run.json")), reverse=True)


def read_run(store: Store, run_id: str) -> dict[str, Any]:
    """What a run was asked for. Raises UserError for an unknown run."""
    path = store.root / "runs" / run_id / "run.json"
    if not path.is_file():
        raise UserError(unknown("run", run_id, run_ids(store)[:5]))
    return json.loads(path.read_text(encoding="utf-8"))


def read_events(store: Store, run_id: str) -> Iterator[dict[str, Any]]:
    """The events of a run. A last line that was cut off by a crash is left out."""
    with (
        contextlib.suppress(FileNotFoundError),
        (store.root / "runs" / run_id / "events.jsonl").open(encoding="utf-8") as file,
    ):
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def previous_step(store: Store, pipeline: str, step: str) -> dict[str, Any] | None:
    """The newest record of a step of this name in this pipeline: its key, identity, code modules and run."""
    for run_id in run_ids(store):
        path = store.root / "runs" / run_id / "steps" / f"{step}.json"
        if path.is_file() and read_run(store, run_id)["pipeline"] == pipeline:
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def driver_state(run: Mapping[str, Any]) -> Literal["alive", "dead", "elsewhere"]:
    """Whether the process that drives a run is still there."""
    if run["host"] != socket.gethostname():
        return "elsewhere"
    return "alive" if is_alive(run["pid"], run["process_started"]) else "dead"


def is_alive(pid: int, started: float | None) -> bool:
    """Whether this machine still has the process with this pid and start time (None: any start time)."""
    now = process_start(pid)
    return now is not None and (started is None or now == started)


def process_start(pid: int) -> float | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else float(fields[19])


def git_state() -> dict[str, Any]:
    """Commit and dirtiness of the git checkout that we stand in, None where there is none."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def versions() -> dict[str, str]:
    """Versions of the packages that shape results."""
    found = {}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
