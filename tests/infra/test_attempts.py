"""Attempts at a step: which failures are tried again and when, time limits, locks, checks, what is recorded."""

import json
import threading
from dataclasses import asdict, replace
from random import Random

import pytest
from engine import plan, run, statuses
from toy_stages import NumberConfig, diamond, number, total
from unruly_stages import Config, checked, flaky, patient, stubborn

from ropewalk.infra.lease import Holder, acquire, look
from ropewalk.infra.plan import Planner, Selection
from ropewalk.infra.record import read_events
from ropewalk.infra.runner import RunPolicy
from ropewalk.infra.step import Pipeline, Retries, Step
from ropewalk.infra.store import Store


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self):
        self.now = 0.0
        self.waits = []

    def __call__(self):
        return self.now

    def pause(self, seconds):
        self.waits.append(seconds)
        self.now += max(seconds, 1e-3)


def one(tmp_path, stage, **options):
    config = {name: options.pop(name) for name in ("error", "num_failures") if name in options}
    return Pipeline("p", (Step("s", stage, Config(folder=str(tmp_path), **config), **options),))


def events_of(tmp_path, result, *kinds):
    return [e for e in read_events(Store(tmp_path / "store"), result.run_id) if e["type"] in kinds]


def executions(tmp_path, name):
    path = tmp_path / name
    return path.stat().st_size if path.exists() else 0


def test_a_failure_of_the_machines_is_tried_again_after_growing_waits(tmp_path):
    clock = Clock()
    pipeline = one(tmp_path, flaky, num_failures=2, retries=Retries(3, 10, 4.0, 60.0))
    result = run(pipeline, tmp_path / "store", clock=clock, pause=clock.pause, random=Random(5))
    assert statuses(result) == {"s": "ran"} and executions(tmp_path, "flaky") == 3
    failed = events_of(tmp_path, result, "attempt_failed")
    expected = Random(5)
    waits = [whole * (1 - expected.random() / 2) for whole in (4.0, 8.0)]
    assert [event["retry_in_seconds"] for event in failed] == waits
    assert [event["kind"] for event in failed] == ["infrastructure"] * 2
    assert failed[0]["error"] == "ConnectionError: the server does not answer"
    assert sum(waits) <= clock.now < sum(waits) + 0.1, "it waits so long and no longer"
    attempts = [event["attempt"] for event in events_of(tmp_path, result, "step_started")]
    assert len(set(attempts)) == 3
    logs = tmp_path / "store/runs" / result.run_id / "logs/s"
    assert {path.stem for path in logs.iterdir()} == set(attempts)


def test_attempts_end_when_there_are_no_more_and_the_last_error_is_the_reason(tmp_path):
    clock = Clock()
    pipeline = one(tmp_path, flaky, num_failures=9, retries=Retries(max_attempts=2))
    result = run(pipeline, tmp_path / "store", clock=clock, pause=clock.pause)
    assert statuses(result) == {"s": "failed"} and executions(tmp_path, "flaky") == 2
    assert result.steps[0].reason == "ConnectionError: the server does not answer"
    (last,) = events_of(tmp_path, result, "step_failed")
    assert (last["kind"], last["num_failed"], last["num_preempted"]) == ("infrastructure", 2, 0)


@pytest.mark.parametrize("error", ["value", "library"])
def test_an_error_of_the_user_is_tried_once(tmp_path, error):
    result = run(one(tmp_path, flaky, num_failures=9, error=error), tmp_path / "store")
    assert statuses(result) == {"s": "failed"} and executions(tmp_path, "flaky") == 1
    assert events_of(tmp_path, result, "step_failed")[0]["kind"] == "user"


def test_a_failed_attempt_leaves_no_lease_and_no_commit_and_the_plan_tells_the_error(tmp_path):
    pipeline = one(tmp_path, flaky, num_failures=1, error="value")
    result = run(pipeline, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert look(store.objects, result.steps[0].key).is_free and store.latest(result.steps[0].key)[0] is None
    (planned,) = Planner(pipeline, store).plan()
    assert planned.reason == f"failed in run {result.run_id}: value: cannot be used"
    assert [reason.kind for reason in planned.reasons] == ["failed"]
    run(pipeline, tmp_path / "store")
    assert plan(pipeline, tmp_path / "store")["s"][0] == "reuse"


def test_waiting_for_the_next_attempt_holds_nothing_up(tmp_path):
    first = one(tmp_path, flaky, num_failures=1, retries=Retries(backoff_seconds=0.05)).steps[0]
    pipeline = Pipeline("p", (first, Step("other", number, NumberConfig())))
    result = run(pipeline, tmp_path / "store")
    ended = [event["step"] for event in events_of(tmp_path, result, "step_succeeded")]
    assert ended == ["other", "s"]


def test_an_attempt_that_takes_too_long_is_asked_to_stop_and_fails_for_good(tmp_path):
    result = run(one(tmp_path, patient, timeout_seconds=0.3), tmp_path / "store")
    assert statuses(result) == {"s": "failed"} and executions(tmp_path, "stopped") == 1
    assert result.steps[0].reason == "timeout: it took longer than 0.3 s"
    assert result.status == "failed" and not Store(tmp_path / "store").commits(), "half an output is no output"


def test_an_attempt_that_stalls_is_interrupted_and_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "0.2")
    pipeline = one(tmp_path, stubborn, num_failures=1, stall_seconds=0.5, retries=Retries(backoff_seconds=0.01))
    result = run(pipeline, tmp_path / "store")
    assert statuses(result) == {"s": "ran"} and executions(tmp_path, "stubborn") == 2
    (failed,) = events_of(tmp_path, result, "attempt_failed")
    assert failed["kind"] == "timeout" and failed["error"] == "stalled: it reported nothing for 0.5 s"


def test_reports_keep_an_attempt_from_stalling(tmp_path):
    threading.Timer(1.5, (tmp_path / "go").touch).start()
    result = run(one(tmp_path, patient, stall_seconds=0.7), tmp_path / "store")
    assert statuses(result) == {"s": "ran"} and executions(tmp_path, "patient") == 1


def test_an_output_that_breaks_the_stages_promise_is_not_committed_and_kept_for_inspection(tmp_path):
    pipeline = one(tmp_path, checked)
    result = run(pipeline, tmp_path / "store")
    assert result.steps[0].reason == "value.json: is empty"
    store = Store(tmp_path / "store")
    assert not store.commits()
    assert list((tmp_path / "store/objects" / result.steps[0].key / "attempts").glob("*/data/value.json"))
    (tmp_path / "go").touch()
    assert statuses(run(pipeline, tmp_path / "store")) == {"s": "ran"}


def test_fail_fast_starts_nothing_more(tmp_path):
    bad = one(tmp_path, flaky, num_failures=9, error="value").steps[0]
    pipeline = Pipeline("p", (bad, *(Step(f"n{i}", number, NumberConfig(value=i)) for i in range(3))))
    policy = RunPolicy(fail_fast=True, max_parallel_steps=1)
    result = run(pipeline, tmp_path / "store", policy=policy)
    assert statuses(result) == {"s": "failed", "n0": "skipped", "n1": "skipped", "n2": "skipped"}
    assert result.steps[1].reason == "s failed"
    kept_going = run(pipeline, tmp_path / "store", policy=RunPolicy(max_parallel_steps=1))
    assert statuses(kept_going) == {"s": "failed", "n0": "ran", "n1": "ran", "n2": "ran"}


def test_no_more_steps_are_under_way_than_allowed(tmp_path):
    pipeline = Pipeline("p", tuple(Step(f"n{i}", number, NumberConfig(value=i)) for i in range(5)))
    for most in (1, 2):
        root = tmp_path / str(most)
        result = run(pipeline, root, policy=RunPolicy(max_parallel_steps=most))
        running, peak = 0, 0
        for event in read_events(Store(root), result.run_id):
            running += (event["type"] == "step_started") - (event["type"] == "step_succeeded")
            peak = max(peak, running)
        assert peak == most and result.status == "succeeded"


def hold(tmp_path, pipeline, **changes):
    """A lease on the first step, as another process would hold it."""
    (planned, *_) = Planner(pipeline, Store(tmp_path / "store")).plan()
    holder = replace(Holder.here("other", "other-run"), **changes)
    return planned.key, acquire(Store(tmp_path / "store").objects, planned.key, holder)


def test_a_locked_step_is_skipped_or_fails_if_the_user_wants_that(tmp_path):
    _, lease = hold(tmp_path, diamond())
    skipped = run(diamond(), tmp_path / "store", policy=RunPolicy(on_locked="skip"))
    assert set(statuses(skipped).values()) == {"skipped"} and skipped.status == "failed"
    assert skipped.steps[0].reason.startswith("locked by run other-run (process ")
    failed = run(diamond(), tmp_path / "store", policy=RunPolicy(on_locked="fail"))
    assert statuses(failed)["first"] == "failed" and failed.steps[0].reason.startswith("locked by run other-run")
    assert plan(diamond(), tmp_path / "store")["first"][1].endswith(f"held by {lease_holder(tmp_path)}")
    lease.release()


def lease_holder(tmp_path):
    (planned, *_) = Planner(diamond(), Store(tmp_path / "store")).plan()
    return look(Store(tmp_path / "store").objects, planned.key).holder


def test_a_locked_step_waits_while_others_run_and_uses_the_output_of_the_holder(tmp_path):
    pipeline = Pipeline("p", (Step("s", number, NumberConfig()), Step("other", number, NumberConfig(value=2))))
    key, lease = hold(tmp_path, pipeline)
    store, record = Store(tmp_path / "store"), {"run_id": "other-run", "code": {}}

    def commit():
        attempt = store.begin(key, "other")
        (attempt.data / "value.json").write_text(json.dumps(1))
        store.commit(attempt, record, number=0)
        lease.release()

    threading.Timer(1.0, commit).start()
    result = run(pipeline, tmp_path / "store")
    assert statuses(result) == {"s": "reused", "other": "ran"}
    assert result.steps[0].reason == "committed by run other-run meanwhile"
    (waiting,) = events_of(tmp_path, result, "step_waiting")
    assert waiting["holder"].startswith("run other-run")
    ends = [e["step"] for e in events_of(tmp_path, result, "step_reused", "step_succeeded")]
    assert ends == ["other", "s"]


def test_a_step_whose_holder_gives_up_runs_here(tmp_path):
    _, lease = hold(tmp_path, diamond())
    threading.Timer(0.7, lease.release).start()
    result = run(diamond(), tmp_path / "store")
    assert set(statuses(result).values()) == {"ran"} and events_of(tmp_path, result, "step_waiting")


def test_force_waits_its_turn_and_commits_the_next_number_once(tmp_path):
    run(diamond(), tmp_path / "store")
    result = run(diamond(), tmp_path / "store", Selection(force=("first",)))
    assert [result.steps[0].commit.number, Store(tmp_path / "store").next_number(result.steps[0].key)] == [1, 2]


def test_a_log_that_cannot_be_written_fails_the_step_with_its_path(tmp_path):
    def block(task, work, report, stop):
        raise AssertionError("the stage must not run")

    from ropewalk.infra.local import LocalExecutor
    from ropewalk.infra.record import RunRecord

    real = RunRecord.log_name
    try:
        RunRecord.log_name = lambda self, step, attempt: "objects/file/a.log"
        (tmp_path / "store/objects").mkdir(parents=True)
        (tmp_path / "store/objects/file").write_text("in the way")
        result = run(diamond(), tmp_path / "store", executor=LocalExecutor(block))
    finally:
        RunRecord.log_name = real
    assert result.steps[0].status == "failed"
    assert result.steps[0].reason.startswith("the log of the step cannot be written: ")
    assert "objects/file" in result.steps[0].reason


def test_a_note_in_the_store_cancels_the_run(tmp_path):
    pipeline = Pipeline("p", (*one(tmp_path, patient).steps, Step("after", number, NumberConfig())))

    def note():
        store = Store(tmp_path / "store")
        (folder,) = (tmp_path / "store/runs").iterdir()
        store.objects.write(f"runs/{folder.name}/cancel", b'{"now": false}')

    threading.Timer(1.0, note).start()
    result = run(pipeline, tmp_path / "store", policy=RunPolicy(max_parallel_steps=1))
    assert result.status == "cancelled" and executions(tmp_path, "stopped") == 1
    assert statuses(result) == {"s": "failed", "after": "skipped"}
    assert "cancelled" in result.steps[0].reason and result.steps[1].reason == "the run was cancelled"
    assert not Store(tmp_path / "store").commits()
    assert look(Store(tmp_path / "store").objects, result.steps[0].key).released


def test_the_policy_and_limits_of_a_step_are_no_part_of_its_key(tmp_path):
    plain = Step("s", total, NumberConfig())
    limited = replace(plain, retries=Retries(1, 1, 1, 1), timeout_seconds=1, stall_seconds=1)
    keys = {Planner(Pipeline("p", (step,)), Store(tmp_path)).plan()[0].key for step in (plain, limited)}
    assert len(keys) == 1 and asdict(limited.retries)["max_attempts"] == 1
