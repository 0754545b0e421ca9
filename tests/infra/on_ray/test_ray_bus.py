"""Events over a bus that dies and loses answers: each arrives once and in order, and reporting never waits."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.infra.on_ray import bus as ray_bus
from ropewalk.infra.on_ray.bus import Channel, EventBus, Inbox, Orders


class Unreliable:
    """A bus that is started anew (empty), or whose answer is lost, as its script says; then it works."""

    def __init__(self, script):
        self.bus = EventBus()
        self.script = list(script)
        self.lock = threading.Lock()

    def put(self, *arguments):
        with self.lock:
            trouble = self.script.pop(0) if self.script else None
            if trouble == "dies before":
                self.bus = EventBus()
                raise ConnectionError("gone")
            answer = self.bus.put(*arguments)
            if trouble == "dies after":
                self.bus = EventBus()
            if trouble in ("dies after", "answer lost"):
                raise ConnectionError("gone")
            if trouble == "dies silently":
                self.bus = EventBus()
            return answer

    def exchange(self, *arguments):
        with self.lock:
            return self.bus.exchange(*arguments)


@pytest.fixture(scope="module", autouse=True)
def hurried():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_bus, "ASK_SECONDS", 0.005)
        patch.setattr(ray_bus, "BATCH_SECONDS", 0.001)
        yield


def points(events):
    return [event["n"] for event in events if event["type"] == "metrics"]


def metric(number):
    return {"type": "metrics", "n": number}


troubles = st.sampled_from([None, "dies before", "dies after", "dies silently", "answer lost"])


@settings(max_examples=40, deadline=None)
@given(script=st.lists(troubles, max_size=12), num_events=st.integers(0, 40), polls=st.integers(0, 12))
def test_every_event_arrives_once_and_in_order_whatever_the_bus_does(script, num_events, polls):
    bus, inbox, found = Unreliable(script), Inbox(), []
    channel = Channel(bus.put, "attempt")
    for number in range(num_events):
        channel.report(metric(number))
        if number % 7 == 3:
            time.sleep(0.003)
    for _ in range(polls):
        for sender, messages in bus.exchange(inbox.confirmed, Orders()).items():
            found += inbox.accept(sender, messages)
        time.sleep(0.002)
    for sender, messages in channel.close().items():
        found += inbox.accept(sender, messages)
    assert points(found) == list(range(num_events))


def test_what_the_driver_has_is_not_kept():
    bus, inbox = Unreliable([]), Inbox()
    channel = Channel(bus.put, "attempt")
    for number in range(5):
        channel.report(metric(number))
    deadline = time.monotonic() + 10
    while channel._kept and time.monotonic() < deadline:
        for sender, messages in bus.exchange(inbox.confirmed, Orders()).items():
            list(inbox.accept(sender, messages))
        time.sleep(0.002)
    assert channel.close() == {channel.sender: []}
    assert bus.exchange(inbox.confirmed, Orders()) == {}


def test_of_progress_that_waits_only_the_last_is_kept():
    channel = Channel(Unreliable(["dies before"] * 1000).put, "attempt")
    for number in range(100):
        channel.report({"type": "progress", "done": number})
    channel.report(metric(1))
    channel.report({"type": "progress", "done": 100})
    kept = [event for _, event in channel.close()[channel.sender]]
    assert len(kept) < 50 and kept[-3:] == [
        {"type": "progress", "done": 99},
        metric(1),
        {"type": "progress", "done": 100},
    ]


def test_the_wish_to_stop_reaches_the_attempts_that_are_meant():
    bus = Unreliable(["dies silently"])
    stopped, going = Channel(bus.put, "one"), Channel(bus.put, "two")
    deadline = time.monotonic() + 10
    while not stopped.cancelled() and time.monotonic() < deadline:
        bus.exchange({}, Orders(stop=frozenset({"one"})))
        time.sleep(0.002)
    assert stopped.cancelled() and not going.cancelled()
    stopped.close()
    going.close()


def test_a_process_of_an_attempt_that_was_given_up_ends_itself(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(ray_bus.os, "_exit", lambda code: ended.set())
    bus = Unreliable([])
    bus.exchange({}, Orders(ended=frozenset({"one"})))
    channel = Channel(bus.put, "one")
    assert ended.wait(10)
    channel.close()


def test_what_another_process_could_not_send_goes_along():
    inbox = Inbox()
    rank, step = (Channel(Unreliable(["dies before"] * 1000).put, "attempt") for _ in range(2))
    rank.report(metric(1))
    step.report(metric(2))
    step.carry(rank.close())
    kept = step.close()
    assert sorted(n for sender in kept for n in points(inbox.accept(sender, kept[sender]))) == [1, 2]
    assert [list(inbox.accept(sender, messages)) for sender, messages in kept.items()] == [[], []], "known already"


def test_an_attempt_that_has_ended_is_forgotten():
    inbox = Inbox()
    list(inbox.accept("one-a", [(0, metric(0))]))
    list(inbox.accept("two-a", [(4, metric(0))]))
    inbox.forget("one")
    assert inbox.confirmed == {"two-a": 4}
