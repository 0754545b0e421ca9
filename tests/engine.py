"""Runs pipelines through the real engine in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropewalk.infra.local import LocalExecutor
from ropewalk.infra.plan import Planner, Selection
from ropewalk.infra.record import RunRecord
from ropewalk.infra.runner import Runner, RunResult, check_selection
from ropewalk.infra.step import Pipeline
from ropewalk.infra.store import Store
from ropewalk.stages.context import LocalContext


def run(pipeline: Pipeline, root: Path, selection: Selection | None = None, executor: Any = None) -> RunResult:
    """One run, steps in this process unless another executor is given."""
    store = Store(root)
    planner = Planner(pipeline, store, selection or Selection())
    check_selection(planner)
    executor = executor or LocalExecutor(lambda task, work, report: LocalContext(work, report))
    events: list[dict[str, Any]] = []
    paths = (str(Path(__file__).parent),)
    return Runner(planner, executor, RunRecord(store, pipeline.name), events.append, paths).execute()


def statuses(result: RunResult) -> dict[str, str]:
    """Status of each step."""
    return {step.name: step.status for step in result.steps}


def plan(pipeline: Pipeline, root: Path) -> dict[str, tuple[str, str]]:
    """Status and reason of each step."""
    return {p.name: (p.status, p.reason) for p in Planner(pipeline, Store(root)).plan()}
