"""What `run` and `sync` do about MLflow, which is a view of the record and never decides how a run ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict

from rich.console import Console

from ropewalk.infra import tracking
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store

WAIT_SECONDS = 60.0


class Following:
    """The process that brings a run to MLflow while it goes on. There is none until a step really runs."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process."""
        self._child = tracking.start(self._store, self._run_id)

    def finish(self, console: Console) -> str | None:
        """Give it some time to write the rest, and say what it could not; returns the run's id in MLflow."""
        if self._child is not None:
            why: str | None = "not waited for"
            with contextlib.suppress(KeyboardInterrupt), console.status("writing to MLflow"):
                why = tracking.wait(self._child, self._store, self._run_id, WAIT_SECONDS)
            if why:
                catch_up = f"`ropewalk sync {self._run_id} --store {self._store.uri}` catches up"
                console.print(f"MLflow does not have all of the run: {why}; {catch_up}", markup=False, soft_wrap=True)
        return tracking.mlflow_run_id(self._store, self._run_id)


def sync_run(store_uri: str, run_id: str, as_json: bool) -> int:
    """Bring MLflow up to date with a run's record."""
    from ropewalk.pipelines.commands import find_run

    store = Store(store_uri)
    run_id = find_run(store, run_id)
    tracking.sync(store, run_id, on_wait=lambda: _tell("another process is writing this run to MLflow; waiting"))
    mlflow_run_id = tracking.mlflow_run_id(store, run_id)
    if as_json:
        sys.stdout.write(json.dumps({"run_id": run_id, "mlflow_run_id": mlflow_run_id}) + "\n")
    else:
        Console().print(f"run {run_id} is MLflow run {mlflow_run_id}", highlight=False)
    return 0


def sync_all_runs(store_uri: str, as_json: bool) -> int:
    """Bring MLflow up to date with all runs of a store; 1 if it did not take some."""
    store = Store(store_uri)
    rows = []
    for synced in tracking.sync_all(store):
        told = {"written": "written", "busy": "another process is writing it", "failed": synced.error}
        _tell(f"run {synced.run_id}: {told[synced.status]}")
        rows.append({**asdict(synced), "mlflow_run_id": tracking.mlflow_run_id(store, synced.run_id)})
    failed = sum(row["status"] == "failed" for row in rows)
    if as_json:
        sys.stdout.write(json.dumps({"runs": rows}, ensure_ascii=False) + "\n")
    elif not rows:
        Console().print("MLflow has all runs")
    if failed:
        raise UserError(f"MLflow did not take {failed} of {len(rows)} runs; see above")
    return 0


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
