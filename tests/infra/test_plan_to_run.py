"""What happens to outputs between a plan and the run that follows it at once."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
import toy_stages

from ropewalk.infra import plan
from ropewalk.infra.local import LocalExecutor
from ropewalk.infra.plan import Planner
from ropewalk.infra.record import RunRecord
from ropewalk.infra.runner import Runner
from ropewalk.infra.store import Commit, Store
from ropewalk.stages.context import LocalContext

PIPELINE = toy_stages.diamond()


@pytest.fixture
def planner(tmp_path: Path) -> Planner:
    """After the plan, which found all outputs sound."""
    engine.run(PIPELINE, tmp_path)
    planner = Planner(PIPELINE, Store(tmp_path))
    assert {each.status for each in planner.plan()} == {"reuse"}
    return planner


def output(planner: Planner) -> Commit:
    return next(commit for commit in planner.store.commits() if commit.record["step"] == "first")


def test_an_output_that_was_withdrawn_after_the_plan_is_made_again(planner: Planner) -> None:
    commit = output(planner)
    planner.store.withdraw(commit.key, commit.number, "test", "the disk is going bad")
    executor = LocalExecutor(lambda task, work, report, stop: LocalContext(work, report, stop))
    result = Runner(planner, executor, RunRecord(planner.store, "diamond"), lambda event: None).execute()
    assert engine.statuses(result) == {"first": "ran", "left": "reused", "right": "reused", "last": "reused"}
    assert "the disk is going bad" in result.steps[0].reason


def test_files_are_looked_at_again_when_the_plan_is_old(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LOOK_AGAIN_SECONDS", 0.0)
    (output(planner).attempt.data / "value.json").unlink()
    assert planner.decide(PIPELINE["first"], {}).status == "run"


def test_a_look_is_good_for_one_decision(planner: Planner) -> None:
    planner.decide(PIPELINE["first"], {})
    (output(planner).attempt.data / "value.json").unlink()
    assert planner.decide(PIPELINE["first"], {}).status == "run"
