"""A driver is stopped for longer than its lease lasts, another takes over, and the first one wakes up."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from engine import run, statuses
from faults import invariants
from toy_stages import diamond, executions

from ropewalk.infra.record import read_events, run_ids
from ropewalk.infra.store import Store

DRIVER = Path(__file__).with_name("stoppable_driver.py")
TAKEN_OVER = ("lease acquired", "data half written", "data written", "before the commit")
COMMITTED = ("after the commit", "before the release")


def is_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("point", [*TAKEN_OVER, *COMMITTED])
def test_a_zombie_never_makes_a_second_commit(tmp_path, monkeypatch, store_uri, elsewhere, point):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "1")
    command = [sys.executable, str(DRIVER), store_uri, point, "right"]
    zombie = subprocess.Popen(command, env={**os.environ, **elsewhere}, stdout=subprocess.PIPE, text=True)
    try:
        while not is_stopped(zombie.pid):
            assert zombie.poll() is None, "the driver was to stop at this point"
            time.sleep(0.02)
        result = run(diamond(), store_uri)
        zombie.send_signal(signal.SIGCONT)
        told, _ = zombie.communicate(timeout=30)
    finally:
        zombie.kill()
    assert zombie.returncode == 0 and result.status == "succeeded"
    store, right = Store(store_uri), result.steps[2]
    assert store.next_number(right.key) == 1, "one commit"
    assert store.objects.names(f"objects/{right.key}/attempts") == [right.commit.attempt.name], "the other is gone"
    if point in COMMITTED:
        assert statuses(result)["right"] == "reused" and told.startswith("succeeded ran")
    else:
        assert statuses(result)["right"] == "ran"
        assert told == f"succeeded reused committed by run {result.run_id} meanwhile\n"
        waited = [e for e in read_events(store, result.run_id) if e["type"] == "step_waiting"]
        assert [event["step"] for event in waited] == ["right"]
    assert list(invariants.broken_commits(store)) == []
    assert list(invariants.broken_leases(store, drivers_ended=True)) == []
    assert executions(tmp_path).count("parity") == 1


def test_a_zombie_that_wakes_while_its_successor_works_discards_its_attempt(
    tmp_path, monkeypatch, store_uri, elsewhere
):
    import toy_stages

    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "1")
    command = [sys.executable, str(DRIVER), store_uri, "data written", "right"]
    zombie = subprocess.Popen(command, env={**os.environ, **elsewhere}, stdout=subprocess.PIPE, text=True)
    real = toy_stages.total.run

    def wake_the_other_first(config, inputs, output, context):
        if "a" in inputs:
            zombie.send_signal(signal.SIGCONT)
            until(lambda: endings(Store(store_uri), zombie_run) == ["lease lost"])
        real(config, inputs, output, context)

    monkeypatch.setattr(toy_stages.total, "run", staticmethod(wake_the_other_first))
    try:
        until(lambda: is_stopped(zombie.pid))
        (zombie_run,) = run_ids(Store(store_uri))
        result = run(diamond(), store_uri)
        told, _ = zombie.communicate(timeout=30)
    finally:
        zombie.kill()
    assert statuses(result)["right"] == "ran"
    assert told == f"succeeded reused committed by run {result.run_id} meanwhile\n"
    right, objects = result.steps[2], Store(store_uri).objects
    assert objects.names(f"objects/{right.key}/attempts") == [right.commit.attempt.name]
    assert objects.names(f"objects/{right.key}/commits") == ["000000.json"]


def endings(store, run_id):
    """How attempts of a run ended."""
    store.pull_runs(at_once=True)
    return [event["kind"] for event in read_events(store, run_id) if event["type"] == "attempt_failed"]


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


UNRULY = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import engine
from ropewalk.infra.step import Pipeline, Step
from unruly_stages import Config, patient, stubborn
stage = {"patient": patient, "stubborn": stubborn}[sys.argv[3]]
step = Step("s", stage, Config(folder=sys.argv[2], num_failures=1))
result = engine.run(Pipeline("p", (step,)), Path(sys.argv[2]) / "store")
print(result.status, result.steps[0].status, result.steps[0].reason)
"""


@pytest.mark.parametrize("stage", ["patient", "stubborn"])
def test_a_zombie_in_the_middle_of_its_stage_stops_within_the_grace_period(tmp_path, monkeypatch, stage):
    import unruly_stages

    from ropewalk.infra.step import Pipeline, Step

    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "1")
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "1")
    command = [sys.executable, "-c", UNRULY, str(Path(__file__).parents[1]), str(tmp_path), stage]
    zombie = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / stage).exists():
            assert zombie.poll() is None
            time.sleep(0.02)
        zombie.send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        config = unruly_stages.Config(folder=str(tmp_path), num_failures=1)
        result = run(Pipeline("p", (Step("s", getattr(unruly_stages, stage), config),)), tmp_path / "store")
        (tmp_path / "go").unlink()
        zombie.send_signal(signal.SIGCONT)
        told, _ = zombie.communicate(timeout=30)
    finally:
        zombie.kill()
    assert statuses(result) == {"s": "ran"}
    assert told == f"succeeded reused committed by run {result.run_id} meanwhile\n"
    assert Store(tmp_path / "store").next_number(result.steps[0].key) == 1
    assert (tmp_path / "stopped").exists() == (stage == "patient")


def test_a_stage_is_told_that_its_lease_was_taken_even_if_its_driver_is_not(tmp_path, monkeypatch):
    """As on a machine that reaches the store and not its driver."""
    import unruly_stages

    from ropewalk.infra.lease import Holder
    from ropewalk.infra.step import Step
    from ropewalk.infra.task import make_task, run_task
    from ropewalk.stages.context import LocalContext

    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "0.4")
    store, key = Store(tmp_path / "store"), "k" * 64
    step = Step("s", unruly_stages.patient, unruly_stages.Config(folder=str(tmp_path)))
    facts = {"store_uri": store.uri, "key": key, "attempt": "first", "run_id": "run", "record": {}, "log_name": "log"}
    task = make_task(step, inputs={}, commit_number=0, **facts)

    def take_the_lease():
        until(lambda: (tmp_path / "patient").exists())
        successor = json.dumps(asdict(Holder.here("second", "other-run"))).encode()
        assert store.objects.create(f"objects/{key}/leases/000001.json", successor)
        with contextlib.suppress(AssertionError):
            until(lambda: (tmp_path / "stopped").exists())
        (tmp_path / "go").touch()  # So that a stage that is not told ends, too.

    other = threading.Thread(target=take_the_lease)
    other.start()
    outcome = run_task(
        task,
        lambda task, work, report, stop: LocalContext(work, report, stop),
        lambda event: None,
        lambda: False,
        lambda: None,
    )
    other.join()
    assert outcome.kind == "lease lost" and (tmp_path / "stopped").exists()
    assert store.objects.names(f"objects/{key}/attempts") == [] and store.numbers(key) == []
