"""The process is killed at chosen points; running again completes, repeats no committed step, gives equal digests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine import run, statuses
from faults import invariants
from faults.points import POINTS
from toy_stages import diamond, executions

from ropewalk.infra.store import Store

DRIVER = Path(__file__).with_name("crashing_driver.py")
COMMITTED = {"after the commit", "before the release", "before it is recorded"}
"""Points at which the step counts as committed."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return [step.commit.digest for step in run(diamond(), tmp_path_factory.mktemp("undisturbed")).steps]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_next_run_completes_with_equal_digests(
    tmp_path, monkeypatch, store_uri, elsewhere, point, undisturbed
):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    command = [sys.executable, str(DRIVER), store_uri, point, "right"]
    killed = subprocess.run(command, env={**os.environ, **elsewhere}, check=False)
    assert killed.returncode == -signal.SIGKILL, "the driver was to die at this point"
    before = executions(tmp_path)
    (tmp_path / "executions").write_text("")
    again = run(diamond(), store_uri)
    expected = {"first": "reused", "left": "reused", "right": "reused" if point in COMMITTED else "ran", "last": "ran"}
    assert statuses(again) == expected
    assert executions(tmp_path).count("number") == 0 and before.count("number") == 1
    assert [step.commit.digest for step in again.steps] == undisturbed
    store = Store(store_uri)
    assert list(invariants.broken_commits(store)) == []
    assert list(invariants.broken_leases(store, drivers_ended=True)) == []
    assert list(invariants.broken_records(store)) == []
