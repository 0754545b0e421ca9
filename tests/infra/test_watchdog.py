"""Limits of time count what an attempt works, not what it waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropewalk.infra.objects import LocalObjects
from ropewalk.infra.watchdog import Watchdog


class Cancelled(list):
    """An executor that only notes what it is asked to cancel."""

    def cancel(self, step=None, *, now=False):
        self.append((step, now))


@pytest.fixture
def watch(tmp_path):
    def make(**limits):
        now, told = [0.0], Cancelled()
        dog = Watchdog(told, LocalObjects(tmp_path), "run", lambda: now[0], lambda event: None)
        dog.enabled = True
        dog.begin("s", "attempt", limits.get("timeout"), limits.get("stall"))

        def after(seconds, *kinds):
            now[0] += seconds
            dog.tick()
            for kind in kinds:
                dog.heard("s", kind)
            return dog, told

        return after

    return make


def test_an_attempt_that_waits_for_its_turn_neither_stalls_nor_takes_too_long(watch):
    after = watch(timeout=5, stall=5)
    after(1000)
    after(0, "running")
    dog, told = after(4)
    assert told == []
    after(2)
    assert told == [("s", False)] and dog.end("s").text.startswith("timeout")


def test_a_stage_that_waits_for_its_workers_does_not_stall(watch):
    after = watch(stall=5)
    after(0, "running")
    after(4, "workers_queued")
    _, told = after(1000, "workers_started")
    after(4, "progress")
    after(4)
    assert told == []
    dog, _ = after(2)
    assert told == [("s", False)] and dog.end("s").is_worth_another_try


def test_a_warning_is_no_sign_of_work(watch):
    after = watch(stall=5)
    after(0, "running")
    after(4, "warning")
    assert after(2)[1] == [("s", False)]


@given(st.lists(st.tuples(st.floats(0, 9), st.sampled_from(["progress", "workers_queued", "workers_started"]))))
def test_the_limit_of_an_attempt_counts_the_seconds_at_work(tmp_path_factory, steps):
    now, told = [0.0], Cancelled()
    dog = Watchdog(told, LocalObjects(tmp_path_factory.mktemp("store")), "run", lambda: now[0], lambda event: None)
    dog.enabled = True
    dog.begin("s", "attempt", 20.0, None)
    dog.heard("s", "running")
    worked, at_work = 0.0, True
    for seconds, kind in steps:
        now[0] += seconds
        worked += seconds if at_work else 0.0
        dog.tick()
        if abs(worked - 20.0) > 1e-6:
            assert bool(told) == (worked > 20.0)
        if told:
            return
        dog.heard("s", kind)
        at_work = kind != "workers_queued"
