"""What the records of runs say, for the commands that show or name a run."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.infra import record
from ropewalk.infra.step import UserError, unknown
from ropewalk.infra.store import Store

UNFINISHED = {"alive": "running", "dead": "killed"}
ENDED = {"step_reused": "reused", "step_succeeded": "ran", "step_failed": "failed", "step_skipped": "skipped"}
UNDER_WAY = {"running": "running", "workers_queued": "queued", "workers_started": "running"}
"""What events say of a step that has neither ended nor failed."""
NOT_BEGUN = "not begun"
METRICS = '"type": "metrics"'


@dataclass(frozen=True)
class RunView:
    """A run as its record tells it at the moment."""

    run_id: str
    description: dict[str, Any]
    """What it was asked for."""
    status: str
    steps: dict[str, dict[str, Any]]
    """By name: config, inputs, status, attempts, output, metrics."""

    def row(self) -> dict[str, Any]:
        """As `status --json` lists it."""
        counts = dict(Counter(step["status"] for step in self.steps.values()))
        running = [name for name, step in self.steps.items() if step["status"] == "running"]
        facts = {"pipeline": self.description["pipeline"], "status": self.status, "steps": counts}
        return {"run_id": self.run_id, **facts, "running": [] if self.status == "killed" else running}


def find_run(store: Store, run_id: str, *, submitted: bool = False) -> str:
    """The id of a run that is in the store; `last` is the newest. Raises UserError if there is none.

    With `submitted`, also one that waits for its turn on a cluster.
    """
    known = record.run_ids(store) if run_id == "last" else []
    if run_id == "last" and not known and not (submitted and _not_begun(store)):
        raise UserError(f"there are no runs in {store.uri}")
    if run_id == "last":
        return max(known[:1] + (_not_begun(store) if submitted else []))
    store.pull_runs()
    if has_begun(store, run_id) or (submitted and run_id in _not_begun(store)):
        return run_id
    if run_id in _not_begun(store):
        raise UserError(
            f"run {run_id} was submitted to a cluster and has not begun: `ropewalk logs {run_id} -f` waits for it,"
            f" `ropewalk logs {run_id} --driver` shows what became of it"
        )
    raise UserError(f"{unknown('run', run_id, record.run_ids(store)[:5])}; --store {store.uri} was searched")


def has_begun(store: Store, run_id: str) -> bool:
    """Whether a run's driver has written what it was asked for."""
    return record.is_run_id(run_id) and (store.root / "runs" / run_id / "run.json").is_file()


def rows(store: Store) -> list[dict[str, Any]]:
    """How the runs of a store stand, newest first. One whose record cannot be read is listed as such."""
    found = [_row(store, run_id) for run_id in record.run_ids(store)]
    for run_id in _not_begun(store):
        request = _read_json(store.root / "runs" / run_id / "job.json")["request"]
        pipeline = Path(request.get("pipeline", "")).stem
        found.append({"run_id": run_id, "pipeline": pipeline, "status": NOT_BEGUN, "steps": {}, "running": []})
    return sorted(found, key=lambda row: row["run_id"], reverse=True)


def view(store: Store, run_id: str, *, with_metrics: bool = True) -> RunView:
    """A run as its record tells it. Raises UserError for an unknown run, or a record that cannot be read."""
    try:
        description = record.read_run(store, run_id)
        steps: dict[str, dict[str, Any]] = {}
        ending = None
        for event in _events(store, run_id, with_metrics):
            _learn(steps, event)
            ending = event["status"] if event["type"] == "run_finished" else ending
        for name, step in steps.items():
            if step["attempts"]:
                step["log"] = _log_place(store, run_id, name, step["attempt"])
        driver = record.driver_state(description)
        status = ending or UNFINISHED.get(driver) or f"unfinished on {description['host']}"
        return RunView(run_id, {"pipeline": "?", **description}, status, steps)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the record of run {run_id} in {store.uri} cannot be read ({type(error).__name__}: {error}):"
            " it was damaged, or written by another version"
        ) from error


def _row(store: Store, run_id: str) -> dict[str, Any]:
    try:
        return view(store, run_id, with_metrics=False).row()
    except UserError as error:
        facts = {"pipeline": "?", "status": "unreadable", "steps": {}, "running": []}
        return {"run_id": run_id, **facts, "error": str(error)}


def _not_begun(store: Store) -> list[str]:
    """Runs that were handed to a cluster from this machine, and have no record yet."""
    jobs = (store.root / "runs").glob("*/job.json")
    return [path.parent.name for path in jobs if not has_begun(store, path.parent.name)]


def _events(store: Store, run_id: str, with_metrics: bool) -> Iterator[dict[str, Any]]:
    """The events of a run. Those with metrics are most of a training run's, and are not even parsed if not wanted."""
    path = store.root / "runs" / run_id / "events.jsonl"
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and (with_metrics or METRICS not in line):
                yield json.loads(line)


def _learn(steps: dict[str, dict[str, Any]], event: dict[str, Any]) -> None:
    """Take in the next event of a run."""
    kind = event["type"]
    if kind == "run_started":
        for each in event["steps"]:
            steps[each["name"]] = {**each, "status": "waiting", "metrics": {}, "attempts": []}
    step = steps.get(event.get("step", ""))
    if step is None:
        return
    if kind == "step_started":
        facts = {key: event[key] for key in ("key", "attempt", "inputs", "reason")}
        step.update(status="queued", **facts)
        step["attempts"].append({"attempt": event["attempt"]})
    elif kind in UNDER_WAY:
        step["status"] = UNDER_WAY[kind]
    elif kind == "step_waiting":
        step.update(status="waiting", reason=event["reason"])
    elif kind in ("attempt_failed", "step_failed") and step["attempts"]:
        step["attempts"][-1].update(_some(event, "kind", "error", "retry_in_seconds"))
        step["status"] = "waiting"
    elif kind == "metrics":
        step["metrics"].update(event["metrics"])
    if kind in ENDED:
        step.update(status=ENDED[kind], **_some(event, "key", "output", "seconds", "reason", "error"))


def _log_place(store: Store, run_id: str, step: str, attempt: str) -> str:
    """The file of an attempt's log, or the folder of its pieces in an object store."""
    place = f"{store.uri}/{record.log_name(run_id, step, attempt)}"
    return place if store.is_local else f"{place}.d"


def _some(event: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: event[name] for name in names if name in event}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
