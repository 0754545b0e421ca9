"""What `plan` and `explain` do: say what a run would do, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ropewalk.infra import record
from ropewalk.infra.plan import Planner, Selection, StepPlan, check_selection
from ropewalk.infra.reasons import Reason, differences
from ropewalk.infra.step import Step
from ropewalk.pipelines.load import Loaded, load_pipeline
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.output import PLAIN, console_on, emit

Request = Mapping[str, Any]
"""What the user asked for: `pipeline`, `set`, `param`. Kept in `run.json`, so that a run can be repeated."""

STYLES = {"run": "yellow", "may-run": "yellow", "reuse": "green"}


def load(request: Request) -> Loaded:
    """The pipeline that a request names. Raises UserError."""
    return load_pipeline(request["pipeline"], request["param"], request["set"])


def make_plan(request: Request, store_uri: str) -> list[StepPlan]:
    """The plan of a whole pipeline."""
    return Planner(load(request).pipeline, open_store(store_uri)).plan()


def plan_pipeline(request: Request, store_uri: str, selection: Selection, exit_code: bool, as_json: bool) -> int:
    """Show a plan; with `exit_code`, 2 if work remains."""
    plans = check_selection(Planner(load(request).pipeline, open_store(store_uri), selection))
    if as_json:
        emit({"steps": [{**plan.to_json(), "selected": plan.selected} for plan in plans]})
    else:
        show_plan(plans, console_on())
    return 2 if exit_code and any(plan.selected and plan.status != "reuse" for plan in plans) else 0


def show_plan(plans: list[StepPlan], console: Console) -> None:
    """Print a plan as a table."""
    table = Table("step", "plan", "key", "why", box=None, pad_edge=False)
    for plan in plans:
        status = Text(plan.status, STYLES[plan.status]) if plan.selected else Text("not selected", "dim")
        table.add_row(plan.name, status, (plan.key or "")[:12], Text(plan.reason))
    console.print(table)


def explain_step(request: Request, store_uri: str, name: str, as_json: bool) -> int:
    """Say why a step is fresh or stale, and what its identity is made of."""
    loaded, store = load(request), open_store(store_uri)
    step = loaded.pipeline[name]
    plan = next(p for p in Planner(loaded.pipeline, store).plan() if p.name == name)
    changes = [change.text for change in _changes(step, plan, record.previous_step(store, loaded.pipeline.name, name))]
    if as_json:
        facts = {"changes": changes, "code_drift": list(plan.drift), "identity": plan.document}
        emit({**plan.to_json(), **facts})
        return 0
    console = console_on()
    console.print(Text.assemble((name, "bold"), ": ", (plan.status, STYLES[plan.status]), " - ", plan.reason))
    lines = [f"changed: {change}" for change in changes]
    lines += [f"code drift: {module} (the output is still used; --force {name} makes it anew)" for module in plan.drift]
    lines += [f"input {slot}: step {source}" for slot, source in step.upstream.items()]
    lines += [f"input {slot}: files of {external.path}" for slot, external in step.externals.items()]
    for line in lines:
        console.print(f"  {line}", **PLAIN)
    return 0


def _changes(step: Step, plan: StepPlan, before: Mapping[str, Any] | None) -> list[Reason]:
    """How the step differs from when it last had an output."""
    if before is None:
        return []
    old = before["identity"]
    if plan.document is not None:
        return differences(old, plan.document)
    # Its inputs are open, but what the user changed in its own config can be said already.
    return differences(old, {**old, "config": json.loads(step.config.model_dump_json())})
