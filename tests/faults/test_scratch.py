"""The scratch folder of a step outlives failures and killed drivers, and goes with the commit and with nothing else."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from engine import run, statuses, value_of
from toy_stages import Config

from ropewalk.infra.lease import Holder
from ropewalk.infra.step import Pipeline, Retries, Step
from ropewalk.infra.store import Store


class Tries(Config):
    """Fails in one way or another until it has been tried `tries` times, which it counts in its scratch folder."""

    tries: int = 1
    error: str = "network"


class resuming:  # noqa: N801
    """See `Tries`."""

    NAME, VERSION = "resuming", 1

    @staticmethod
    def run(config, inputs, output, context):
        (context.work / f"try-{len(list(context.work.iterdir()))}").write_text("x")
        tried = len(list(context.work.iterdir()))
        if tried < config.tries and config.error == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if tried < config.tries:
            raise ConnectionError("again") if config.error == "network" else ValueError("value: wrong")
        (output.data / "value.json").write_text(json.dumps(tried))


def pipeline(**settings):
    step = Step("s", resuming, Tries(**settings), retries=Retries(max_attempts=5, backoff_seconds=0.01))
    return Pipeline("p", (step,))


def test_every_attempt_of_a_run_goes_on_from_the_one_before_and_the_commit_ends_it(store_uri):
    result = run(pipeline(tries=4), store_uri)
    assert value_of(result, "s") == 4
    check_it_is_gone(store_uri, result.steps[0].key)


def check_it_is_gone(store_uri, key):
    store = Store(store_uri)
    assert not (store.root / "work" / key).exists()
    assert store.objects.names(f"work/{key}") == []


def test_the_next_run_goes_on_on_this_machine_and_on_another(store_uri, monkeypatch, tmp_path):
    for machine in ("scratch", "another", "another"):
        monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / machine))
        assert statuses(run(pipeline(tries=4, error="value"), store_uri)) == {"s": "failed"}
    result = run(pipeline(tries=4, error="value"), store_uri)
    assert value_of(result, "s") == 4
    check_it_is_gone(store_uri, result.steps[0].key)


KILLED = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import engine, test_scratch
engine.run(test_scratch.pipeline(tries=3, error="kill"), sys.argv[3])
"""


def test_after_a_killed_driver_the_next_one_goes_on(tmp_path):
    here = Path(__file__)
    command = [sys.executable, "-c", KILLED, str(here.parents[1]), str(here.parent), str(tmp_path)]
    for _ in range(2):
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert value_of(run(pipeline(tries=3, error="kill"), tmp_path), "s") == 3


@pytest.mark.parametrize("taken_over", [False, True])
def test_who_has_committed_leaves_the_scratch_of_its_successor_alone(store_uri, monkeypatch, taken_over):
    """Between its commit and the end a process may sleep, while another takes the lease for a forced run."""
    commit = Store.commit

    def slept_after(self, attempt, record, *, number):
        made = commit(self, attempt, record, number=number)
        if taken_over:
            successor = replace(Holder.here("successor", "other-run"), machine="another")
            name = f"objects/{attempt.key}/leases/000001.json"
            assert self.objects.create(name, json.dumps(asdict(successor)).encode())
        return made

    monkeypatch.setattr(Store, "commit", slept_after)
    result = run(pipeline(), store_uri)
    assert statuses(result) == {"s": "ran"}
    folder = Store(store_uri).root / "work" / result.steps[0].key
    assert folder.exists() == taken_over
