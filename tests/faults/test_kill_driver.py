"""The process is killed at chosen points; running again completes, repeats no committed step, gives equal digests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from engine import run, statuses
from toy_stages import diamond, executions

DRIVER = Path(__file__).with_name("crashing_driver.py")
POINTS = {
    "attempt begun": False,
    "data written": False,
    "before the manifest": False,
    "before the commit": False,
    "after the commit": True,
    "before the scratch is dropped": True,
    "before it is recorded": True,
}
"""Points, and whether the step counts as committed there."""


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_next_run_completes_with_equal_digests(tmp_path, monkeypatch, point):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    root = tmp_path / "store"
    killed = subprocess.run([sys.executable, str(DRIVER), str(root), point, "right"], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL, "the driver was to die at this point"
    before = executions(tmp_path)
    (tmp_path / "executions").write_text("")
    again = run(diamond(), root)
    expected = {"first": "reused", "left": "reused", "right": "reused" if POINTS[point] else "ran", "last": "ran"}
    if point == "before it is recorded":
        # The first record after `right` began is its own end: the commit stands.
        expected["right"] = "reused"
    assert statuses(again) == expected
    assert executions(tmp_path).count("number") == 0 and before.count("number") == 1
    monkeypatch.delenv("TOY_COUNTER")
    undisturbed = run(diamond(), tmp_path / "undisturbed")
    assert [s.commit.digest for s in again.steps] == [s.commit.digest for s in undisturbed.steps]
