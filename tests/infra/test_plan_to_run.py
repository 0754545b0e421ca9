"""What happens to outputs between a plan and the run that follows it at once."""

from __future__ import annotations

from pathlib import Path

import engine
import pytest
import toy_stages

from ropewalk.infra import plan
from ropewalk.infra.plan import Planner
from ropewalk.infra.store import Commit, Store

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
    decided = planner.decide(PIPELINE["first"], {})
    assert (decided.status, decided.commit_number) == ("run", commit.number + 1)
    assert "the disk is going bad" in decided.reason


def test_a_commit_that_came_after_the_plan_is_the_one_that_is_reused(planner: Planner) -> None:
    commit = output(planner)
    attempt = planner.store.begin(commit.key, "0" * 32)
    (attempt.data / "value.json").write_text("3")
    newer = planner.store.commit(attempt, {"step": "first"}, number=commit.number + 1)
    decided = planner.decide(PIPELINE["first"], {})
    assert decided.commit is not None and decided.commit.attempt.name == newer.attempt.name


def test_files_are_looked_at_again_when_the_plan_is_old(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LOOK_AGAIN_SECONDS", 0.0)
    (output(planner).attempt.data / "value.json").unlink()
    assert planner.decide(PIPELINE["first"], {}).status == "run"


def test_a_look_is_good_for_one_decision(planner: Planner) -> None:
    planner.decide(PIPELINE["first"], {})
    (output(planner).attempt.data / "value.json").unlink()
    assert planner.decide(PIPELINE["first"], {}).status == "run"
