"""Several drivers run the same pipeline on the same store at once: each key is executed and committed once."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults import invariants
from object_store_server import new_bucket, object_store_server
from toy_stages import diamond, executions

from ropewalk.infra.plan import Planner
from ropewalk.infra.record import read_events, run_ids
from ropewalk.infra.store import Store

DRIVER = Path(__file__).with_name("twin_driver.py")


def race(tmp_path, uri, num_drivers, num_rounds):
    """Run the drivers, each with a scratch folder of its own, as if on machines of their own."""
    drivers = []
    for number in range(num_drivers):
        scratch = {"ROPEWALK_SCRATCH": str(tmp_path / f"scratch{number}")}
        environment = {**os.environ, "TOY_COUNTER": str(tmp_path), **scratch}
        words = [str(tmp_path), uri, f"d{number}", str(num_drivers), str(num_rounds)]
        drivers.append(subprocess.Popen([sys.executable, str(DRIVER), *words], env=environment))
    assert [driver.wait(timeout=300) for driver in drivers] == [0] * num_drivers


def distinct_keys(store, num_rounds):
    plans = [plan for number in range(num_rounds) for plan in Planner(diamond(number), store).plan()]
    assert {plan.status for plan in plans} == {"reuse"}
    return {plan.key: plan for plan in plans}


def check_each_key_was_made_once(tmp_path, store, num_drivers, num_rounds):
    keys = distinct_keys(store, num_rounds)
    assert set(keys) == set(store.known_keys())
    assert {store.next_number(key) for key in keys} == {1}
    assert all(len(store.objects.names(f"objects/{key}/attempts")) == 1 for key in keys), "nobody worked in vain"
    assert len(executions(tmp_path)) == len(keys)
    events = [event["type"] for run_id in run_ids(store) for event in read_events(store, run_id)]
    told = Counter(events)
    assert told["run_finished"] == num_drivers * num_rounds
    assert told["step_failed"] == told["attempt_failed"] == 0
    assert told["step_waiting"] > 0, "they did meet"


@pytest.mark.parametrize(
    ("num_drivers", "num_rounds"), [(2, 10), (4, 10), pytest.param(2, 50, marks=pytest.mark.faults)]
)
def test_each_key_is_executed_and_committed_once_and_all_drivers_succeed(tmp_path, num_drivers, num_rounds):
    race(tmp_path, str(tmp_path / "store"), num_drivers, num_rounds)
    store = Store(tmp_path / "store")
    check_each_key_was_made_once(tmp_path, store, num_drivers, num_rounds)
    assert list(invariants.broken_commits(store)) == []
    assert list(invariants.broken_leases(store, drivers_ended=True)) == []


@pytest.mark.parametrize("num_rounds", [4, pytest.param(50, marks=pytest.mark.faults)])
def test_the_same_holds_on_an_object_store(tmp_path, monkeypatch, num_rounds):
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    with object_store_server():
        uri = new_bucket()
        race(tmp_path, uri, 2, num_rounds)
        check_each_key_was_made_once(tmp_path, Store(uri), 2, num_rounds)
