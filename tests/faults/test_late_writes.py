"""A holder that was silent for too long goes on: nothing that its successor relies on is touched by it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import unruly_stages
from engine import run, statuses
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.infra.record import read_events, run_ids
from ropewalk.infra.step import Pipeline, Step
from ropewalk.infra.store import Store, StoreError

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import engine, unruly_stages
from ropewalk.infra.step import Pipeline, Step
config = unruly_stages.Config(folder=sys.argv[2], num_failures=1)
pipeline = Pipeline("p", (Step("s", getattr(unruly_stages, sys.argv[3]), config),))
result = engine.run(pipeline, Path(sys.argv[2]) / "store")
print(result.status, result.steps[0].status, result.steps[0].reason)
"""


@pytest.fixture
def short_ttl(monkeypatch):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "1")


def start(folder, stage, trace):
    """A driver whose stage has left its trace."""
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parents[1]), str(folder), stage]
    driver = subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True)
    while not (folder / trace).exists():
        assert driver.poll() is None
        time.sleep(0.02)
    return driver


def pipeline(folder, stage):
    return Pipeline("p", (Step("s", stage, unruly_stages.Config(folder=str(folder), num_failures=1)),))


def wake_at(driver, path, text):
    """Let a stopped driver go on once a file ends with a text."""
    while not (path.exists() and path.read_text().endswith(text)):
        time.sleep(0.02)
    driver.send_signal(signal.SIGCONT)


def test_a_late_checkpoint_does_not_reach_the_successor(tmp_path, short_ttl):
    zombie = start(tmp_path, "resuming", "late")
    try:
        # The successor goes on from the second count, and waits at the fifth for what the zombie writes.
        waker = threading.Thread(target=wake_at, args=(zombie, tmp_path / "counts", "3 4 "), daemon=True)
        waker.start()
        result = run(pipeline(tmp_path, unruly_stages.resuming), tmp_path / "store")
        told, _ = zombie.communicate(timeout=60)
    finally:
        zombie.kill()
    assert statuses(result) == {"s": "ran"} and (tmp_path / "counts").read_text() == "1 2 3 4 5 6 "
    assert told == f"succeeded reused committed by run {result.run_id} meanwhile\n"
    assert not (tmp_path / "store" / "work" / result.steps[0].key).exists()


def test_a_stage_that_lets_no_thread_run_for_longer_than_the_ttl_keeps_its_lease_if_nobody_wants_it(
    tmp_path, short_ttl
):
    told, _ = start(tmp_path, "holding", "holding").communicate(timeout=60)
    assert told == "succeeded ran never run\n"
    store = Store(tmp_path / "store")
    kinds = [event["type"] for run_id in run_ids(store) for event in read_events(store, run_id)]
    assert "lease_lost" not in kinds and kinds.count("step_started") == 1


def test_a_stage_that_lets_no_thread_run_is_done_twice_if_another_driver_wants_it_and_committed_once(
    tmp_path, short_ttl
):
    silent = start(tmp_path, "holding", "holding")
    result = run(pipeline(tmp_path, unruly_stages.holding), tmp_path / "store")
    told, _ = silent.communicate(timeout=60)
    assert statuses(result) == {"s": "ran"}
    assert told == f"succeeded reused committed by run {result.run_id} meanwhile\n"
    assert Store(tmp_path / "store").next_number(result.steps[0].key) == 1


def test_a_scratch_folder_goes_from_holder_to_holder_and_never_back(tmp_path):
    store = Store(tmp_path)
    first = store.work("key", 0)
    (first / "checkpoint").write_text("1")
    assert store.work("key", 0) == first
    second = store.work("key", 3)
    assert (second / "checkpoint").read_text() == "1" and not first.exists()
    with pytest.raises(StoreError, match="a later attempt goes on with it"):
        store.work("key", 2)
    with pytest.raises(FileNotFoundError):
        (first / "checkpoint").write_text("late")
    first.mkdir()  # A stage that makes its folders as it goes.
    (first / "checkpoint").write_text("late")
    assert (store.work("key", 4) / "checkpoint").read_text() == "1"
    store.drop_work("key")
    assert list((tmp_path / "work").iterdir()) == []


@settings(max_examples=30, deadline=None)
@given(generations=st.lists(st.integers(0, 9), min_size=2, max_size=8, unique=True))
def test_of_holders_that_take_the_scratch_folder_at_once_the_latest_has_it_whole(tmp_path_factory, generations):
    store = Store(tmp_path_factory.mktemp("store"))
    (store.work("key", 0) / "checkpoint").write_text("1")
    refused, together = [], threading.Barrier(len(generations))

    def take(generation):
        together.wait()
        try:
            store.work("key", generation)
        except StoreError:
            refused.append(generation)

    threads = [threading.Thread(target=take, args=(generation,)) for generation in generations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latest = max(generations)
    assert latest not in refused
    assert (store.work("key", latest) / "checkpoint").read_text() == "1"
    assert [path.name for path in (store.root / "work" / "key").iterdir()] == [f"{latest:06d}"]
