"""What `run` and `rerun` do: drive a pipeline to its end and report how it went."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.text import Text

from ropewalk.infra import record
from ropewalk.infra.executor import Executor
from ropewalk.infra.plan import Planner, Selection, check_selection
from ropewalk.infra.record import RunRecord
from ropewalk.infra.results import RunResult
from ropewalk.infra.runner import Runner
from ropewalk.infra.step import Step, UserError
from ropewalk.infra.store import Store
from ropewalk.pipelines.display import Display
from ropewalk.pipelines.load import Loaded
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.options import PolicyOptions
from ropewalk.pipelines.output import PLAIN, emit, lasting_console
from ropewalk.pipelines.plan_commands import Request, load, show_plan
from ropewalk.pipelines.records import find_run
from ropewalk.pipelines.tracking_commands import Following

EXIT_STATUS = {"succeeded": 0, "failed": 1, "cancelled": 130}


def run_pipeline(
    request: Request,
    store_uri: str,
    selection: Selection,
    how: PolicyOptions,
    executor: str,
    address: str | None,
    run_id: str | None,
    as_json: bool,
) -> int:
    """Run a pipeline and report how it went; 0 if everything asked for succeeded, 130 if it was cancelled."""
    loaded = load(request)
    store = open_store(store_uri)
    planner = Planner(loaded.pipeline, store, selection)
    plans = check_selection(planner)
    console = lasting_console(sys.stderr if as_json else sys.stdout)
    show_plan(plans, console)
    open_steps = [loaded.pipeline[plan.name] for plan in plans if plan.selected and plan.status != "reuse"]
    runs_on = _executor(executor, address, open_steps, how.wait_for_resources)
    run_record = _run_record(store, loaded, {**request, "selection": asdict(selection)}, run_id)
    run_record.write("plan.json", {"steps": [plan.to_json() for plan in plans]})
    console.print(f"run {run_record.run_id} · store {store.uri}", **PLAIN)
    following = Following(store, run_record.run_id)

    def started(facts: dict[str, Any]) -> None:
        following.start()
        run_record.write("ray.json", facts)
        if facts.get("dashboard_url"):
            display({"type": "note", "text": f"Ray dashboard: {facts['dashboard_url']}"})

    display = Display([step.name for step in loaded.pipeline], console)
    with display:
        result = Runner(planner, runs_on, run_record, display, loaded.import_paths, started, how.policy).execute()
    mlflow_run_id = following.finish(console)
    _show_result(result, console, store)
    if as_json:
        emit(result_json(result, mlflow_run_id))
    return EXIT_STATUS[result.status]


def result_json(result: RunResult, mlflow_run_id: str | None) -> dict[str, Any]:
    """The object that `run --json` ends with."""
    return {
        "run_id": result.run_id,
        "pipeline": result.pipeline,
        "status": result.status,
        "mlflow_run_id": mlflow_run_id,
        "steps": [step.to_json() for step in result.steps],
    }


def rerun_request(
    store_uri: str, run_id: str, step: str | None, selected: Selection, *, failed: bool
) -> tuple[Mapping[str, Any], Selection]:
    """What to ask for to have an earlier run again, or the part of it that the user names.

    The step that is named, and those of --from, run anew. Without any choice the run's own one holds.
    """
    store = open_store(store_uri)
    run_id = find_run(store, run_id)
    request = record.read_run(store, run_id)["request"]
    if "pipeline" not in request:
        raise UserError(f"run {run_id} does not say which file its pipeline came from; `ropewalk run FILE` runs it")
    if failed and (step is not None or selected != Selection()):
        raise UserError("rerun --failed chooses the steps itself; leave the other choice out")
    if failed:
        return request, Selection(until=_failed_steps(store, run_id))
    if step is None and selected == Selection():
        return request, TypeAdapter(Selection).validate_python(request.get("selection", {}))
    anew = (*selected.force, *selected.start, *([step] if step is not None else []))
    return request, replace(selected, force=anew)


def _failed_steps(store: Store, run_id: str) -> tuple[str, ...]:
    events = record.read_events(store, run_id)
    names = tuple(dict.fromkeys(event["step"] for event in events if event["type"] == "step_failed"))
    if not names:
        raise UserError(f"no step of run {run_id} failed; `ropewalk rerun {run_id}` asks for all of it again")
    return names


def _run_record(store: Store, loaded: Loaded, request: Request, run_id: str | None) -> RunRecord:
    """A new record; a run that was submitted to a cluster also records its job."""
    from ropewalk.infra.jobs.submit import check_same_store, driver_job

    if run_id and not re.fullmatch(r"\w[\w-]*", run_id):
        raise UserError(f"--run-id {run_id}: must be letters, digits, '-' and '_'")
    job = driver_job(run_id)
    if job is None:
        return RunRecord(store, loaded.pipeline.name, _repeatable(request), run_id)
    check_same_store(job, store)
    # What the submitter asked for, with the paths of its machine: this driver's are gone with the job.
    run_record = RunRecord(store, loaded.pipeline.name, job.request, run_id)
    run_record.write("job.json", job.to_json())
    return run_record


def _repeatable(request: Request) -> Request:
    """The request as it can be repeated from another folder."""
    target = request["pipeline"]
    return {**request, "pipeline": str(Path(target).resolve()) if Path(target).is_file() else target}


def _executor(name: str, address: str | None, steps: list[Step], wait_for_resources: float) -> Executor:
    if name == "local":
        if address:
            raise UserError("--address names a Ray cluster; it does not go with --executor local")
        from ropewalk.infra.local import LocalExecutor
        from ropewalk.stages.context import LocalContext

        return LocalExecutor(lambda task, work, report, stop: LocalContext(work, report, stop))
    from ropewalk.infra.on_ray.executor import RayExecutor
    from ropewalk.infra.remote.reachable import require_ray

    if address and steps:
        require_ray(address)
    return RayExecutor(steps, address, wait_for_resources)


def _show_result(result: RunResult, console: Console, store: Store) -> None:
    for step in result.steps:
        if step.status == "failed":
            console.print(Text.assemble((f"{step.name} failed: ", "red"), step.reason), soft_wrap=True)
            console.print(f"  log: ropewalk logs {result.run_id} {step.name} --store {store.uri}", **PLAIN)
    counts = {
        kind: sum(step.status == kind for step in result.steps) for kind in ("ran", "reused", "failed", "skipped")
    }
    parts = [f"{number} {kind}" for kind, number in counts.items() if number]
    console.print(Text.assemble((result.status, "bold"), f": {', '.join(parts)}"))
    for step in result.steps:
        report = step.commit and step.commit.attempt.data / "report.html"
        if report and report.is_file():
            console.print(f"report: {report}", **PLAIN)
    if result.status == "succeeded":
        console.print(f"MLflow: ropewalk ui --store {store.uri}", **PLAIN)
