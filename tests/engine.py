"""Runs pipelines through the real engine in tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ropewalk.infra.local import LocalExecutor
from ropewalk.infra.plan import Planner, Selection, check_selection
from ropewalk.infra.record import RunRecord
from ropewalk.infra.results import RunResult
from ropewalk.infra.runner import Runner
from ropewalk.infra.step import Pipeline
from ropewalk.infra.store import Store
from ropewalk.stages.context import LocalContext


def run(
    pipeline: Pipeline, root: str | Path, selection: Selection | None = None, executor: Any = None, **options: Any
) -> RunResult:
    """One run, steps in this process unless another executor is given; options as in `Runner`."""
    store = Store(root)
    planner = Planner(pipeline, store, selection or Selection())
    check_selection(planner)
    executor = executor or LocalExecutor(lambda task, work, report, stop: LocalContext(work, report, stop))
    events: list[dict[str, Any]] = []
    paths = (str(Path(__file__).parent),)
    return Runner(planner, executor, RunRecord(store, pipeline.name), events.append, paths, **options).execute()


def statuses(result: RunResult) -> dict[str, str]:
    """Status of each step."""
    return {step.name: step.status for step in result.steps}


def plan(pipeline: Pipeline, root: str | Path) -> dict[str, tuple[str, str]]:
    """Status and reason of each step."""
    return {p.name: (p.status, p.reason) for p in Planner(pipeline, Store(root)).plan()}


def value_of(result: RunResult, step: str) -> Any:
    """What a toy step wrote."""
    commit = next(s.commit for s in result.steps if s.name == step)
    assert commit is not None
    return json.loads((commit.attempt.data / "value.json").read_text())
