"""Requests to the object store get lost, or their answers do: what happened is found out, nothing is made twice."""

import time
from dataclasses import replace

import pytest
from engine import run, statuses
from faults import invariants
from faults.unreliable_server import reliable, sometimes, unreliable_server
from object_store_server import new_bucket
from toy_stages import diamond, executions

from ropewalk.infra.failures import classify
from ropewalk.infra.record import read_events
from ropewalk.infra.remote import object_store
from ropewalk.infra.step import Pipeline, Retries
from ropewalk.infra.store import Store

FAULTS = ("not arrived", "answer lost", "busy")


@pytest.fixture(scope="module")
def server():
    with unreliable_server() as proxy:
        yield proxy


@pytest.fixture
def uri(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    yield new_bucket()
    server.choose = reliable


def every_first_time(fault):
    """Each write of an object goes wrong the first time."""
    seen = set()

    def choose(method, path):
        if method != "PUT" or path in seen:
            return "none"
        seen.add(path)
        return fault

    return choose


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_writes_that_go_wrong_once_are_repeated_and_nobody_notices(server, uri, tmp_path, fault):
    server.choose = every_first_time(fault)
    result = run(diamond(), uri)
    server.choose = reliable
    assert set(statuses(result).values()) == {"ran"} and len(executions(tmp_path)) == 4
    store = Store(uri)
    kinds = {event["type"] for event in read_events(store, result.run_id)}
    assert kinds.isdisjoint({"attempt_failed", "lease_lost", "step_waiting"})
    assert list(invariants.broken_commits(store)) == []
    assert list(invariants.broken_leases(store, drivers_ended=True)) == []


def test_the_answer_to_an_exclusive_creation_is_right_even_if_it_was_lost(server, uri):
    objects = Store(uri).objects
    server.choose = every_first_time("answer lost")
    assert objects.create("a", b"mine")
    assert not objects.create("a", b"yours")
    assert objects.read("a") == b"mine"


@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_of_seconds_is_waited_out(server, uri, fault):
    objects, until = Store(uri).objects, time.monotonic() + 3
    server.choose = lambda method, path: fault if time.monotonic() < until else "none"
    assert objects.create("a", b"mine")
    assert objects.read("a") == b"mine" and objects.names("") == ["a"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_never_answers_is_a_failure_of_the_machines(server, uri, monkeypatch, fault):
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1)
    objects = Store(uri).objects
    server.choose = lambda method, path: fault
    for act in (lambda: objects.create("a", b"mine"), lambda: objects.read("a"), lambda: objects.sizes("a")):
        with pytest.raises(OSError, match=f"{uri}/a") as raised:
            act()
        assert classify(raised.value) == "infrastructure"


def with_quick_retries(pipeline):
    """The same steps, tried often and soon."""
    patient = Retries(max_attempts=9, backoff_seconds=0.3, backoff_cap_seconds=0.5)
    steps = {step.name: replace(step, retries=patient) for step in pipeline}
    chain = []
    for step in steps.values():
        inputs = {slot: steps.get(getattr(source, "name", ""), source) for slot, source in step.inputs.items()}
        steps[step.name] = replace(step, inputs=inputs)
        chain.append(steps[step.name])
    return Pipeline(pipeline.name, tuple(chain))


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_that_outlasts_the_repetitions_costs_attempts_and_no_output(
    server, uri, tmp_path, monkeypatch, fault
):
    """The way to commits is blocked for longer than a request is repeated, then it is free."""
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1)
    began = []

    def choose(method, path):
        if method == "PUT" and "/commits/" in path:
            began.append(time.monotonic())
        return fault if began and time.monotonic() - began[0] < 4 else "none"

    server.choose = choose
    result = run(with_quick_retries(diamond()), uri)
    server.choose = reliable
    store = Store(uri)
    assert result.status == "succeeded", result
    failed = [e for e in read_events(store, result.run_id) if e["type"] == "attempt_failed"]
    assert failed and {event["kind"] for event in failed} == {"infrastructure"}
    assert list(invariants.broken_commits(store)) == []
    assert {store.next_number(step.key) for step in result.steps} == {1}


@pytest.mark.faults
def test_a_server_on_which_every_twentieth_request_goes_wrong_changes_no_digest(server, uri, tmp_path):
    calm = run(diamond(), tmp_path / "calm")
    server.choose = sometimes(0.05)
    results = [run(diamond(), uri) for _ in range(3)]
    server.choose = reliable
    for result in results:
        assert [step.commit.digest for step in result.steps] == [step.commit.digest for step in calm.steps]
    assert set(statuses(results[-1]).values()) == {"reused"}
    assert sum(server.met[fault] for fault in FAULTS) > 0
