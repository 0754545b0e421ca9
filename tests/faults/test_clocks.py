"""Clocks jump and differ between machines, and times of files leap: nothing is run twice, nothing is lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_stages
from engine import plan, run, statuses
from faults import invariants
from toy_stages import diamond, executions

from ropewalk.infra.record import read_events, run_ids
from ropewalk.infra.store import Store, StoreError

DRIVER = Path(__file__).with_name("skewed_driver.py")
HOUR = 3600.0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return [step.commit.digest for step in run(diamond(), tmp_path_factory.mktemp("undisturbed")).steps]


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_a_clock_that_jumps_in_the_middle_of_a_run_changes_nothing(tmp_path, monkeypatch, jump, undisturbed):
    right_time, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: right_time() + offset[0])
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "0.4")
    real = toy_stages.total.run

    def jumping(config, inputs, output, context):
        offset[0] = jump
        time.sleep(1.0)  # Several renewals of the lease.
        real(config, inputs, output, context)

    monkeypatch.setattr(toy_stages.total, "run", staticmethod(jumping))
    result = run(diamond(), tmp_path)
    assert set(statuses(result).values()) == {"ran"}
    assert [step.commit.digest for step in result.steps] == undisturbed
    store = Store(tmp_path)
    events = list(read_events(store, run_ids(store)[0]))
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {event["type"] for event in events}.isdisjoint({"lease_lost", "attempt_failed"})
    monkeypatch.undo()
    assert set(statuses(run(diamond(), tmp_path)).values()) == {"reused"}


@pytest.mark.parametrize("skew", [HOUR, -HOUR])
def test_drivers_whose_clocks_differ_by_an_hour_run_each_step_once(tmp_path, monkeypatch, skew, undisturbed):
    root = tmp_path / "store"
    environment = {**os.environ, "TOY_COUNTER": str(tmp_path), "ROPEWALK_LEASE_SECONDS": "2"}
    command = [sys.executable, str(DRIVER), str(root)]
    drivers = [
        subprocess.Popen([*command, str(seconds)], env=environment, stdout=subprocess.PIPE, text=True)
        for seconds in (0.0, skew)
    ]
    told = [json.loads(driver.communicate()[0].splitlines()[-1]) for driver in drivers]
    assert [each["status"] for each in told] == ["succeeded", "succeeded"]
    assert told[0]["digests"] == told[1]["digests"] == undisturbed
    assert sorted(executions(tmp_path)) == ["number", "parity", "total", "total"]
    store = Store(root)
    assert list(invariants.broken_commits(store)) == []
    assert list(invariants.broken_leases(store, drivers_ended=True)) == []


def test_a_change_is_seen_though_the_clock_of_the_writer_was_ahead(tmp_path, monkeypatch):
    right_time = time.time
    monkeypatch.setattr(time, "time", lambda: right_time() + HOUR)
    commit = run(diamond(), tmp_path).steps[0].commit
    monkeypatch.undo()
    path = commit.attempt.data / "value.json"
    path.write_text("9")
    with pytest.raises(StoreError, match=f"{path}: content changed since it was committed"):
        Store(tmp_path).fetch(commit.uri)


def set_times(root, seconds):
    for path in root.rglob("*"):
        os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("seconds", [0, 3.4e9])  # 1970 and 2077
def test_leaps_of_file_times_change_nothing(tmp_path, seconds):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "text").write_text("some text")
    pipeline = diamond(external=outside / "text")
    before = run(pipeline, tmp_path / "store")
    set_times(tmp_path, seconds)
    assert {status for status, _ in plan(pipeline, tmp_path / "store").values()} == {"reuse"}
    # What a changed step reads was touched since it was committed, and is right nevertheless.
    changed = diamond(external=outside / "text")
    (outside / "text").write_text("another text")
    after = run(changed, tmp_path / "store")
    assert statuses(after) == {"first": "reused", "left": "reused", "right": "reused", "last": "ran"}
    assert [s.commit.digest for s in after.steps[:3]] == [s.commit.digest for s in before.steps[:3]]
