"""What the commands do, apart from parsing their arguments. Heavy imports stay inside the functions that need them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ropewalk.infra import record
from ropewalk.infra.executor import Executor
from ropewalk.infra.plan import Planner, Selection, StepPlan, check_selection
from ropewalk.infra.reasons import differences
from ropewalk.infra.record import RunRecord
from ropewalk.infra.results import RunResult
from ropewalk.infra.runner import Runner, RunPolicy
from ropewalk.infra.step import Step, UserError
from ropewalk.infra.store import Store
from ropewalk.pipelines.display import Display
from ropewalk.pipelines.load import Loaded, load_pipeline
from ropewalk.pipelines.tracking_commands import Following

Request = Mapping[str, Any]
"""What the user asked for: `pipeline`, `set`, `param`. Kept in `run.json`, so that a run can be repeated."""

STYLES = {"run": "yellow", "may-run": "yellow", "reuse": "green", "ran": "green", "reused": "green", "failed": "red"}


def run_pipeline(
    request: Request,
    store_uri: str,
    selection: Selection,
    *,
    executor: str,
    address: str | None,
    as_json: bool,
    run_id: str | None = None,
    wait_for_resources: float = 0.0,
    policy: RunPolicy = RunPolicy(),  # noqa: B008 - it is frozen
) -> int:
    """Run a pipeline and report how it went; 0 if everything asked for succeeded, 130 if it was cancelled."""
    loaded = _load(request)
    store = Store(store_uri)
    planner = Planner(loaded.pipeline, store, selection)
    plans = check_selection(planner)
    console = _lasting_console(sys.stderr if as_json else sys.stdout)
    show_plan(plans, console)
    open_steps = [loaded.pipeline[plan.name] for plan in plans if plan.selected and plan.status != "reuse"]
    runs_on = _executor(executor, address, open_steps, wait_for_resources)
    run_record = _run_record(store, loaded, {**request, "selection": asdict(selection)}, run_id)
    run_record.write("plan.json", {"steps": [plan.to_json() for plan in plans]})
    console.print(f"run {run_record.run_id} · store {store.uri}", highlight=False, soft_wrap=True)
    following = Following(store, run_record.run_id)

    def started(facts: dict[str, Any]) -> None:
        following.start()
        run_record.write("ray.json", facts)
        if facts.get("dashboard_url"):
            display({"type": "note", "text": f"Ray dashboard: {facts['dashboard_url']}"})

    display = Display([step.name for step in loaded.pipeline], console)
    with display:
        runner = Runner(planner, runs_on, run_record, display, loaded.import_paths, started, policy)
        result = runner.execute()
    mlflow_run_id = following.finish(console)
    _show_result(result, console, store)
    if as_json:
        sys.stdout.write(json.dumps(result_json(result, mlflow_run_id), ensure_ascii=False) + "\n")
    return {"succeeded": 0, "failed": 1, "cancelled": 130}[result.status]


def _lasting_console(stream: TextIO) -> Console:
    """A console on a stream, also while the local executor sends all output of this process to a step's log."""
    try:
        copy = os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, buffering=1)
    except OSError:  # A stream without a file: nothing can be redirected either.
        return Console(file=stream)
    return Console(file=copy)


def result_json(result: RunResult, mlflow_run_id: str | None) -> dict[str, Any]:
    """The object that `run --json` ends with."""
    return {
        "run_id": result.run_id,
        "pipeline": result.pipeline,
        "status": result.status,
        "mlflow_run_id": mlflow_run_id,
        "steps": [step.to_json() for step in result.steps],
    }


def make_plan(request: Request, store_uri: str) -> list[StepPlan]:
    """The plan of a whole pipeline."""
    return Planner(_load(request).pipeline, Store(store_uri)).plan()


def show_plan(plans: list[StepPlan], console: Console | None = None) -> None:
    """Print a plan as a table."""
    table = Table("step", "plan", "key", "why", box=None, pad_edge=False)
    for plan in plans:
        status = Text(plan.status, style=STYLES[plan.status])
        table.add_row(plan.name, status, (plan.key or "")[:12], Text(plan.reason))
    (console or Console()).print(table)


def explain_step(request: Request, store_uri: str, name: str, as_json: bool) -> int:
    """Say why a step is fresh or stale, and what its identity is made of."""
    loaded, store = _load(request), Store(store_uri)
    step = loaded.pipeline[name]
    plan = next(p for p in Planner(loaded.pipeline, store).plan() if p.name == name)
    before = record.previous_step(store, loaded.pipeline.name, name)
    changes = differences(before["identity"], plan.document) if before and plan.document else []
    if plan.document is None and before is not None:
        # Its inputs are open, but what the user changed in its own config can be said already.
        old = before["identity"]
        changes = differences(old, {**old, "config": json.loads(step.config.model_dump_json())})
    if as_json:
        document = {
            **plan.to_json(),
            "changes": [change.text for change in changes],
            "code_drift": list(plan.drift),
            "identity": plan.document,
        }
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
        return 0
    console = Console()
    console.print(Text.assemble((name, "bold"), ": ", (plan.status, STYLES[plan.status]), " - ", plan.reason))
    for change in changes:
        console.print(f"  changed: {change.text}", markup=False, highlight=False)
    for module in plan.drift:
        console.print(f"  code drift: {module} (the output is still used; --force {name} makes it anew)", markup=False)
    for slot, source in step.upstream.items():
        console.print(f"  input {slot}: step {source}", markup=False, highlight=False)
    for slot, external in step.externals.items():
        console.print(f"  input {slot}: files of {external.path}", markup=False, highlight=False)
    return 0


def show_status(store_uri: str, as_json: bool) -> int:
    """List the runs of a store."""
    store = Store(store_uri)
    rows = status_rows(store)
    if as_json:
        sys.stdout.write(json.dumps({"store": store.uri, "runs": rows}, ensure_ascii=False) + "\n")
    elif rows:
        Console().print(status_table(rows))
    else:
        Console().print(f"no runs in {store.uri}", soft_wrap=True)
    return 0


def status_rows(store: Store) -> list[dict[str, Any]]:
    """How the runs of a store stand, newest first."""
    return [_run_state(store, run_id) for run_id in record.run_ids(store)]


def status_table(rows: list[dict[str, Any]]) -> Table:
    """The same as a table."""
    table = Table("run", "pipeline", "status", "ran", "reused", "failed", "now running", box=None, pad_edge=False)
    for row in rows:
        counts = [str(row["steps"].get(kind, 0)) for kind in ("ran", "reused", "failed")]
        table.add_row(row["run_id"], row["pipeline"], row["status"], *counts, ", ".join(row["running"]))
    return table


def show_run(store_uri: str, run_id: str, step: str | None, as_json: bool) -> int:
    """Show a run or one of its steps."""
    store = Store(store_uri)
    run_id = find_run(store, run_id)
    steps = _steps_of(store, run_id)
    description = record.read_run(store, run_id)
    if step is not None and step not in steps:
        raise UserError(f"run {run_id} has no step {step!r}; it has {', '.join(steps)}")
    document = {"run": {**description, **_run_state(store, run_id)}, "steps": list(steps.values())}
    if step is not None:
        document = {"run_id": run_id, **steps[step]}
    if as_json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
        return 0
    console = Console()
    if step is not None:
        console.print_json(data=document)
        return 0
    state = document["run"]
    console.print(f"run {run_id} · {state['pipeline']} · {state['status']}", highlight=False)
    table = Table("step", "status", "seconds", "output digest", "why", box=None, pad_edge=False)
    for entry in steps.values():
        digest = str((entry.get("output") or {}).get("digest", ""))[:12]
        why = Text(entry.get("error") or entry.get("reason", ""))
        style = STYLES.get(entry["status"], "")
        table.add_row(entry["name"], Text(entry["status"], style), f"{entry.get('seconds', 0):.1f}", digest, why)
    console.print(table)
    console.print(f"ropewalk show {run_id} STEP tells where a step's output and log are", highlight=False)
    return 0


def show_diagnosis(store_uri: str, as_json: bool) -> int:
    """Check the machine; 1 if something is wrong."""
    from ropewalk.infra.doctor import diagnose

    checks = diagnose(Path(store_uri).absolute())
    if as_json:
        rows = [{"name": check.name, "ok": check.ok, "message": check.message} for check in checks]
        sys.stdout.write(json.dumps({"checks": rows}, ensure_ascii=False) + "\n")
    else:
        marks = {True: Text("ok", "green"), False: Text("wrong", "red"), None: Text("note", "yellow")}
        table = Table("check", "", "finding", box=None, pad_edge=False)
        for check in checks:
            table.add_row(check.name, marks[check.ok], Text(check.message))
        Console().print(table)
    return 1 if any(check.ok is False for check in checks) else 0


def _load(request: Request) -> Loaded:
    return load_pipeline(request["pipeline"], request["param"], request["set"])


def _run_record(store: Store, loaded: Loaded, request: Request, run_id: str | None) -> RunRecord:
    """A new record; a run that was submitted to a cluster also records its job."""
    from ropewalk.infra.submit import check_same_store, driver_job

    job = driver_job(run_id)
    if job is None:
        return RunRecord(store, loaded.pipeline.name, _repeatable(request), run_id)
    check_same_store(job, store)
    # What the submitter asked for, with the paths of its machine: this driver's are gone with the job.
    run_record = RunRecord(store, loaded.pipeline.name, job.request, run_id)
    run_record.write("job.json", job.to_json())
    return run_record


def _executor(name: str, address: str | None, steps: list[Step], wait_for_resources: float) -> Executor:
    if name == "local":
        if address:
            raise UserError("--address names a Ray cluster; it does not go with --executor local")
        from ropewalk.infra.local import LocalExecutor
        from ropewalk.stages.context import LocalContext

        return LocalExecutor(lambda task, work, report, stop: LocalContext(work, report, stop))
    if name != "ray":
        raise UserError(f"--executor {name}: known are ray and local")
    from ropewalk.infra.on_ray import RayExecutor

    return RayExecutor(steps, address, wait_for_resources)


def _repeatable(request: Request) -> Request:
    """The request as it can be repeated from another folder."""
    target = request["pipeline"]
    return {**request, "pipeline": str(Path(target).resolve()) if Path(target).is_file() else target}


def _show_result(result: RunResult, console: Console, store: Store) -> None:
    for step in result.steps:
        if step.status == "failed":
            console.print(Text.assemble((f"{step.name} failed: ", "red"), step.reason))
            console.print(f"  log: {store.root / 'runs' / result.run_id / 'logs' / step.name}", soft_wrap=True)
    counts = {
        kind: sum(step.status == kind for step in result.steps) for kind in ("ran", "reused", "failed", "skipped")
    }
    parts = [f"{number} {kind}" for kind, number in counts.items() if number]
    console.print(Text.assemble((result.status, "bold"), f": {', '.join(parts)}"))
    for step in result.steps:
        report = step.commit and step.commit.attempt.data / "report.html"
        if report and report.is_file():
            console.print(f"report: {report}", soft_wrap=True, highlight=False)
    if result.status == "succeeded":
        console.print(f"MLflow: ropewalk ui --store {store.uri}", soft_wrap=True, highlight=False)


def find_run(store: Store, run_id: str) -> str:
    """The id of a run that is in the store; `last` is the newest. Raises UserError if there is none."""
    if run_id != "last":
        record.read_run(store, run_id)
        return run_id
    known = record.run_ids(store)
    if not known:
        raise UserError(f"there are no runs in {store.uri}")
    return known[0]


def _run_state(store: Store, run_id: str) -> dict[str, Any]:
    description = record.read_run(store, run_id)
    steps = _steps_of(store, run_id)
    finished = next((e for e in record.read_events(store, run_id) if e["type"] == "run_finished"), None)
    driver = record.driver_state(description)
    unfinished = {"alive": "running", "dead": "killed", "elsewhere": f"unfinished on {description['host']}"}
    state = finished["status"] if finished else unfinished[driver]
    counts: dict[str, int] = {}
    for entry in steps.values():
        counts[entry["status"]] = counts.get(entry["status"], 0) + 1
    running = [e["name"] for e in steps.values() if e["status"] == "running" and driver != "dead"]
    return {
        "run_id": run_id,
        "pipeline": description["pipeline"],
        "status": state,
        "steps": counts,
        "running": running,
    }


def _steps_of(store: Store, run_id: str) -> dict[str, dict[str, Any]]:
    """The steps of a run as its events tell them, by name."""
    steps: dict[str, dict[str, Any]] = {}
    ended = {"step_reused": "reused", "step_succeeded": "ran", "step_failed": "failed", "step_skipped": "skipped"}
    for event in record.read_events(store, run_id):
        kind = event["type"]
        if kind == "run_started":
            steps = {
                step["name"]: {**step, "status": "waiting", "metrics": {}, "attempts": []} for step in event["steps"]
            }
        elif kind == "step_started":
            facts = {key: event[key] for key in ("key", "attempt", "inputs", "reason")}
            log = store.root / "runs" / run_id / "logs" / event["step"] / f"{event['attempt']}.log"
            steps[event["step"]].update(status="running", log=str(log), **facts)
            steps[event["step"]]["attempts"].append({"attempt": event["attempt"]})
        elif kind == "step_waiting":
            steps[event["step"]].update(status="waiting", reason=event["reason"])
        elif kind in ("attempt_failed", "step_failed") and steps[event["step"]]["attempts"]:
            facts = {key: event[key] for key in ("kind", "error", "retry_in_seconds") if key in event}
            steps[event["step"]]["attempts"][-1].update(facts)
            steps[event["step"]]["status"] = "waiting"
        if kind == "metrics":
            steps[event["step"]]["metrics"].update(event["metrics"])
        if kind in ended:
            facts = {key: event[key] for key in ("key", "output", "seconds", "reason", "error") if key in event}
            steps[event["step"]].update(status=ended[kind], **facts)
    return steps
