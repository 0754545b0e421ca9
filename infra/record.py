"""The record of a run: append-only files under `runs/<run id>/`, the truth that MLflow is a view of.

run.json            what was asked for: pipeline, settings, selection, who runs it
events.jsonl        one JSON object a line, in the order things happened
steps/<step>.json   the identity and output of each step that was committed or reused
failures/<step>.json  the key, identity and error of each step that failed
plan.json           what was to run, and why
cancel              there if somebody wants the run to stop; {"now": true}: at once
logs/<step>/<attempt>.log

Every event has `seq`, `time` and `type`; those of a step have `step`:

    run_started     run_id, pipeline, store_uri, git, versions, steps
    step_reused     key, inputs, output, reason. May follow step_started: another run has committed the output
    step_skipped    reason
    step_waiting    key, holder, reason: another run works on the key; nothing is held meanwhile
    step_started    key, attempt, inputs, reason: an attempt was handed to the executor. Once for each attempt
    running         node, pid, attempt: its process has begun
    workers_queued  workers, attempt: the stage waits for room for its workers; meanwhile no limit of time counts
    workers_started attempt: the first of them is at work
    metrics         metrics, metric_step, about, attempt
    warning         text, attempt
    lease_lost      attempt: another run may have taken over; the attempt is asked to stop
    timed_out       attempt, reason: the attempt took too long or stalled, and is asked to stop
    attempt_failed  key, attempt, seconds, kind, error, num_failed, num_preempted, retry_in_seconds: another follows
    step_failed     key, attempt, seconds, kind, error, num_failed, num_preempted: none follows
    step_succeeded  key, attempt, seconds, output, reason
    cancel_asked    level: 1 to save and stop, 2 at once
    run_finished    status, seconds
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from ropewalk.infra.objects import naming
from ropewalk.infra.process import is_alive, process_start
from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import External, Pipeline, Step, UserError, unknown
from ropewalk.infra.store import Store

RECORDED_PACKAGES = ("ropewalk", "torch", "transformers", "ray", "deepspeed", "mlflow", "pyarrow", "datasets", "bm25s")


def is_run_id(text: str) -> bool:
    """Whether a text can be a run id: it is the name of a folder."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", text) is not None


def new_run_id() -> str:
    """A run id that sorts by time, also among the runs of one second."""
    now = time.time()
    fraction = int(now % 1 * 0x10000)
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{fraction:04x}{secrets.token_hex(1)}"


def log_name(run_id: str, step: str, attempt: str) -> str:
    """Where the output of an attempt is kept, relative to the store."""
    return f"runs/{run_id}/logs/{step}/{attempt}.log"


class RunRecord:
    """Writes the record of one run. `request` is what it takes to ask for the same again; whoever submits a run to a
    cluster chooses its `run_id`, which must be new.
    """

    def __init__(
        self, store: Store, pipeline: str, request: Mapping[str, Any] | None = None, run_id: str | None = None
    ) -> None:
        self.run_id = run_id or new_run_id()
        if not is_run_id(self.run_id):
            raise UserError(f"--run-id {self.run_id}: must be letters, digits, '-', '_' and '.'; leave the option out")
        self.folder = store.root / "runs" / self.run_id
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "run.json").exists():
            raise UserError(f"--run-id {self.run_id}: the store has a run with this id; leave the option out")
        self._store = store
        self._mirror = contextlib.ExitStack()
        """Keeps the record in the object store, too, if that is where the store is."""
        asked = {"pipeline": pipeline, "request": dict(request or {}), "started_at": time.time()}
        process = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": process_start(os.getpid())}
        self.write("run.json", {**asked, **process})
        self._events = (self.folder / "events.jsonl").open("ab", buffering=0)
        self._lock = threading.Lock()
        self._sequence = 0
        if not store.is_local:
            from ropewalk.infra.remote.run_mirror import RunMirror

            self._mirror.enter_context(RunMirror.of_own_run(store, self.run_id))

    def append(self, event: dict[str, Any]) -> dict[str, Any]:
        """Add an event, without secrets; it is on its way to the disk when this returns."""
        with self._lock:
            stamped = {"seq": self._sequence, "time": time.time(), **scrub(event)}
            _append_whole(self._events, (json.dumps(stamped, ensure_ascii=False) + "\n").encode())
            self._sequence += 1
        return stamped

    def write(self, name: str, document: Any) -> None:
        """Write a JSON file of the record, whole or not at all, without secrets."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        text = json.dumps(scrub(document), indent=1, ensure_ascii=False) + "\n"
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        if not self._store.is_local:
            # At once: garbage collection on another machine must see which outputs this run uses.
            self._store.objects.write(f"runs/{self.run_id}/{name}", text.encode())

    def log_name(self, step: str, attempt: str) -> str:
        """Where the output of an attempt is kept, relative to the store."""
        return log_name(self.run_id, step, attempt)

    def close(self) -> None:
        """Sync the events to the disk."""
        with naming(self.folder / "events.jsonl"):
            os.fsync(self._events.fileno())
        self._events.close()
        self._mirror.close()


def _append_whole(file: FileIO, line: bytes) -> None:
    """Append a line, all of it or nothing. Raises OSError naming the file."""
    size = os.fstat(file.fileno()).st_size
    try:
        with naming(Path(str(file.name))):
            while line:
                line = line[file.write(line) :]
    except OSError:
        file.truncate(size)
        raise


def run_ids(store: Store) -> list[str]:
    """All recorded runs, newest first."""
    store.pull_runs()
    return sorted((path.parent.name for path in (store.root / "runs").glob("*/run.json")), reverse=True)


def read_run(store: Store, run_id: str) -> dict[str, Any]:
    """What a run was asked for. Raises UserError for an unknown run."""
    store.pull_runs()
    path = store.root / "runs" / run_id / "run.json"
    if not is_run_id(run_id) or not path.is_file():
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


class History:
    """What earlier runs of a pipeline say of its steps. Runs are read from the newest back, each once, as needed."""

    def __init__(self, store: Store, pipeline: str) -> None:
        self._pipeline = pipeline
        self._store = store
        self._unread: Iterator[str] | None = None
        self._outputs: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, dict[str, Any]] = {}

    def output(self, step: str) -> dict[str, Any] | None:
        """The newest record of an output of a step: its key, identity, digest and run."""
        while step not in self._outputs and self._read_one():
            pass
        return self._outputs.get(step)

    def failure(self, step: str) -> dict[str, Any] | None:
        """The record of a step's last failure, None if it has had an output since: its key, error and run."""
        while step not in self._outputs and step not in self._failures and self._read_one():
            pass
        return self._failures.get(step)

    def _read_one(self) -> bool:
        """Read the next older run; False if there is none."""
        if self._unread is None:
            self._unread = iter(run_ids(self._store))
        run_id = next(self._unread, None)
        if run_id is None:
            return False
        if read_run(self._store, run_id)["pipeline"] == self._pipeline:
            folder = self._store.root / "runs" / run_id
            outputs, failures = _documents(folder / "steps"), _documents(folder / "failures")
            newer = self._outputs.keys() | self._failures.keys() | outputs.keys()
            self._failures |= {name: document for name, document in failures.items() if name not in newer}
            self._outputs = outputs | self._outputs
        return True


def _documents(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def previous_step(store: Store, pipeline: str, step: str) -> dict[str, Any] | None:
    """The newest record of an output of a step of this name in this pipeline."""
    return History(store, pipeline).output(step)


def driver_state(run: Mapping[str, Any]) -> Literal["alive", "dead", "elsewhere"]:
    """Whether the process that drives a run is still there."""
    if run["host"] != socket.gethostname():
        return "elsewhere"
    return "alive" if is_alive(run["pid"], run["process_started"]) else "dead"


def run_started(pipeline: Pipeline, store: Store, run_id: str) -> dict[str, Any]:
    """The first event of a run: what it is about, and what shapes its results beside its identity."""
    return {
        "type": "run_started",
        "run_id": run_id,
        "pipeline": pipeline.name,
        "store_uri": store.uri,
        "git": git_state(),
        "versions": versions(),
        "steps": [_described(step) for step in pipeline],
    }


def _described(step: Step) -> dict[str, Any]:
    inputs = {
        slot: {"external": source.path} if isinstance(source, External) else {"step": source.name}
        for slot, source in step.inputs.items()
    }
    stage = {"name": step.name, "stage": step.stage.NAME, "version": step.stage.VERSION}
    return {**stage, "config": step.config.model_dump(mode="json"), "inputs": inputs}


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
