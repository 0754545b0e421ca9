"""A lease is held by one process at a time, outlives no silent holder, and is noticed when it is lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from object_store_server import new_bucket, object_store_server

from ropewalk.infra import lease
from ropewalk.infra.lease import Holder, LeaseLostError, LockedError, Watch, acquire, look
from ropewalk.infra.objects import LocalObjects
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store

KEY = "k" * 64
HOLD = """
import sys, time
from ropewalk.infra.lease import Holder, acquire
from ropewalk.infra.store import Store
lease = acquire(Store(sys.argv[1]).objects, sys.argv[2], Holder.here("attempt", "run"))
print("held", flush=True)
while not lease.lost():
    time.sleep(0.02)
print("lost", flush=True)
"""


@pytest.fixture(scope="module")
def server():
    with object_store_server():
        yield


@pytest.fixture(params=["folder", "object store"])
def objects(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return LocalObjects(tmp_path)
    request.getfixturevalue("server")
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path))
    return Store(new_bucket()).objects


@pytest.fixture
def short_ttl(monkeypatch):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "1")


def holder(attempt="a", **changes):
    return replace(Holder.here(attempt, "run"), **changes)


def elsewhere(attempt="a", ttl=60.0):
    """A holder on another machine: whether its process lives cannot be known."""
    return holder(attempt, machine="another", host="far", ttl_seconds=ttl)


def leave(objects, who, generation=0, **beat):
    """A lease as a process would leave it that is somewhere else."""
    objects.create(f"objects/{KEY}/leases/{generation:06d}.json", json.dumps(asdict(who)).encode())
    if beat:
        objects.write(f"objects/{KEY}/leases/{generation:06d}.beat", json.dumps(beat).encode())


def test_a_held_lease_is_refused_and_a_released_one_is_taken_as_the_next_generation(objects):
    first = acquire(objects, KEY, holder("a"))
    with pytest.raises(LockedError, match=f"locked by run run .process {os.getpid()} on "):
        acquire(objects, KEY, holder("b"))
    assert Watch(objects, KEY).free() is None
    first.release()
    assert look(objects, KEY).is_free and Watch(objects, KEY).free() == (0, 0)
    second = acquire(objects, KEY, holder("b"))
    second.confirm()
    second.release()
    assert look(objects, KEY).stamp[0] == 1


def test_of_many_that_take_a_free_lease_at_once_one_gets_it(objects):
    for generation in range(5):
        start, won, refused = threading.Barrier(12), [], []

        def take(name, start=start, won=won, refused=refused):
            start.wait()
            try:
                won.append(acquire(objects, KEY, holder(name)))
            except LockedError:
                refused.append(name)

        threads = [threading.Thread(target=take, args=(f"t{number}",)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and len(refused) == 11
        assert look(objects, KEY).stamp[0] == generation
        won[0].release()


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(objects):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, objects.uri, KEY], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout.readline() == "held\n"
    assert Watch(objects, KEY).free() is None
    process.kill()
    process.wait()
    stamp = Watch(objects, KEY).free()
    assert stamp is not None
    acquire(objects, KEY, holder("b"), stamp).release()


def test_a_stopped_holder_is_given_up_after_its_ttl_and_notices_when_it_wakes(objects, short_ttl):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, objects.uri, KEY], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout.readline() == "held\n"
    watch, began = Watch(objects, KEY), time.monotonic()
    while time.monotonic() - began < 2.5:  # longer than the ttl: it is alive, so it is left alone
        assert watch.free() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    while (stamp := watch.free()) is None:
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    mine = acquire(objects, KEY, holder("b"), stamp)
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == "lost\n"
    process.wait()
    mine.confirm()
    mine.release()


def test_a_lease_is_not_taken_over_on_an_older_look(objects):
    leave(objects, elsewhere(), count=1, released=False)
    with pytest.raises(LockedError):
        acquire(objects, KEY, holder("b"), (0, 0))
    acquire(objects, KEY, holder("b"), (0, 1)).release()
    leave(objects, elsewhere(), 2)
    with pytest.raises(LockedError):
        acquire(objects, KEY, holder("c"), (0, 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.floats(0.1, 40.0), st.just("beat"), st.just("look")), max_size=25))
def test_a_silent_holder_elsewhere_is_given_up_a_ttl_after_its_last_beat_was_first_seen(tmp_path_factory, actions):
    objects, now, count = LocalObjects(tmp_path_factory.mktemp("store")), [0.0], 0
    leave(objects, elsewhere(ttl=30.0), count=0, released=False)
    watch = Watch(objects, KEY, lambda: now[0])
    first_seen: dict[int, float] = {}
    for action in actions:
        if action == "beat":
            count += 1
            leave(objects, elsewhere(), count=count, released=False)
        elif action == "look":
            first_seen.setdefault(count, now[0])
            assert (watch.free() is not None) == (now[0] - first_seen[count] >= 30.0)
        else:
            now[0] += action


def test_an_attempt_that_is_known_to_be_over_holds_nothing(objects):
    leave(objects, elsewhere("mine"))
    assert Watch(objects, KEY).free() is None
    assert Watch(objects, KEY).free(ended={"mine"}) == (0, -1)


def test_a_lease_file_of_another_version_counts_as_held_for_the_usual_time(objects):
    objects.create(f"objects/{KEY}/leases/000000.json", b'{"somebody": 1}')
    now = [0.0]
    watch = Watch(objects, KEY, lambda: now[0])
    assert watch.free() is None
    now[0] = lease.ttl_seconds()
    assert watch.free() is not None


def test_the_heart_stops_with_the_release(objects, short_ttl):
    held = acquire(objects, KEY, holder())
    held.release()
    before = look(objects, KEY)
    time.sleep(0.6)
    assert look(objects, KEY) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lease-")]


class Failing(LocalObjects):
    """A folder that cannot be written while `broken` is set."""

    broken = False

    def write(self, name, content):
        if self.broken:
            raise OSError(28, "No space left on device")
        super().write(name, content)


def until(condition, seconds=20.0):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def test_a_store_that_fails_for_less_than_a_ttl_costs_a_warning_and_not_the_lease(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "4")
    objects, events = Failing(tmp_path), []
    held = acquire(objects, KEY, holder(), None, events.append)
    objects.broken = True
    until(lambda: events)
    objects.broken = False
    count = look(objects, KEY).stamp[1]
    until(lambda: look(objects, KEY).stamp[1] > count)
    assert not held.lost()
    assert {event["type"] for event in events} == {"warning"} and "No space left" in events[0]["text"]
    held.confirm()
    held.release()
    assert look(objects, KEY).released


def test_a_lease_that_cannot_be_renewed_for_its_ttl_is_lost_and_work_that_goes_on_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "0.4")
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "0.2")
    objects, events, interrupted = Failing(tmp_path), [], threading.Event()
    held = acquire(objects, KEY, holder(), None, events.append, interrupted.set)
    objects.broken = True
    assert interrupted.wait(20) and held.lost()
    assert events[-1] == {"type": "lease_lost"}
    with pytest.raises(LeaseLostError):
        held.confirm()
    held.release()


def test_work_that_ends_in_time_after_the_loss_is_not_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "0.4")
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "30")
    objects, interrupted = LocalObjects(tmp_path), threading.Event()
    held = acquire(objects, KEY, holder(), None, lambda event: None, interrupted.set)
    leave(objects, elsewhere(), 1)
    until(held.lost)
    held.release()
    assert not interrupted.is_set()
    assert not look(objects, KEY).released, "the successor's lease is not ours to release"


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_ttl_that_is_none_is_refused_with_the_variable_named(monkeypatch, text):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", text)
    with pytest.raises(UserError, match=f"ROPEWALK_LEASE_SECONDS={text}: must be a positive number of seconds"):
        lease.ttl_seconds()


def test_a_process_is_told_from_another_that_got_its_pid(tmp_path):
    gone = holder(process_started=(Holder.here("a", "run").process_started or 0) - 1)
    assert gone.is_gone and not holder().is_gone and not elsewhere().is_gone
    leave(LocalObjects(Path(tmp_path)), gone)
    assert Watch(LocalObjects(tmp_path), KEY).free() is not None
