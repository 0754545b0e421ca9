"""What `run`, `sync` and `ui` do about MLflow, which is a view of the record and never decides how a run ends."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import asdict

from rich.console import Console

from ropewalk.infra.record import run_ids
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.output import PLAIN, console_on, emit
from ropewalk.pipelines.records import find_run


class Following:
    """The process that brings a run to MLflow while it goes on. There is none until a step really runs."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._child: subprocess.Popen[bytes] | None = None
        self._why: str | None = None
        self._began = time.monotonic()

    def start(self) -> None:
        """Start the process. If that is not possible, the run goes on without."""
        try:
            self._child = tracking.start(self._store, self._run_id)
        except OSError as error:
            self._why = f"its tracking process could not be started: {error}"

    def finish(self, console: Console) -> str | None:
        """Give it a moment to write the rest, and say what is left; returns the run's id in MLflow, if it has one."""
        why = self._why
        if self._child is not None:
            why = "not waited for"
            with contextlib.suppress(KeyboardInterrupt), console.status("writing to MLflow"):
                seconds = tracking.patience(time.monotonic() - self._began)
                why = tracking.wait(self._child, self._store, self._run_id, seconds)
        sync = f"`ropewalk sync {self._run_id} --store {self._store.uri}`"
        if why == tracking.STILL_WRITING:
            console.print(f"MLflow is being written in the background; {sync} waits for it", **PLAIN)
        elif why:
            console.print(f"MLflow does not have all of the run: {why}; {sync} catches up", **PLAIN)
        return tracking.mlflow_run_id(self._store, self._run_id)


def sync_runs(store_uri: str, run_id: str | None, *, all_runs: bool, as_json: bool) -> int:
    """Bring MLflow up to date with a run's record (default: the last run's), or with all; 1 if it did not take some."""
    if all_runs and run_id:
        raise UserError("sync takes a RUN or --all, not both")
    store = open_store(store_uri)
    return _sync_all(store, as_json) if all_runs else _sync_one(store, find_run(store, run_id or "last"), as_json)


def _sync_one(store: Store, run_id: str, as_json: bool) -> int:
    tracking.sync(store, run_id, on_wait=lambda: _tell("another process is writing this run to MLflow; waiting"))
    mlflow_run_id = tracking.mlflow_run_id(store, run_id)
    if as_json:
        emit({"run_id": run_id, "mlflow_run_id": mlflow_run_id})
    else:
        console_on().print(f"run {run_id} is MLflow run {mlflow_run_id}", **PLAIN)
    return 0


def _sync_all(store: Store, as_json: bool) -> int:
    if not run_ids(store):
        raise UserError(f"there are no runs in {store.uri}")
    rows = []
    for synced in tracking.sync_all(store):
        told = {"written": "written", "busy": "another process is writing it", "failed": synced.error}
        _tell(f"run {synced.run_id}: {told[synced.status]}")
        rows.append({**asdict(synced), "mlflow_run_id": tracking.mlflow_run_id(store, synced.run_id)})
    failed = sum(row["status"] == "failed" for row in rows)
    if failed:
        _tell(f"MLflow did not take {failed} of {len(rows)} runs; see above")
    if as_json:
        emit({"runs": rows})
    elif not rows:
        console_on().print("MLflow has all runs")
    return 1 if failed else 0


def show_ui(store_uri: str, host: str, port: int, as_json: bool) -> int:
    """Serve the MLflow UI until Ctrl-C; with `as_json`, the object tells where, as soon as it answers."""
    from ropewalk.infra.tracking.ui import serve_ui

    return serve_ui(open_store(store_uri), host=host, port=port, on_ready=emit if as_json else None)


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
