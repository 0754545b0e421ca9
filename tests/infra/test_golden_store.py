"""Stores that earlier versions wrote must be readable, and reusable, by every later one.

`golden/store` was written by format version 1 from `toy_stages.diamond()`, `golden/store-0.1.0` by the first version
with its run record; there, host and folder were made neutral. Never write one anew: add another beside it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine import plan, run, statuses
from toy_stages import diamond

from ropewalk.infra.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"
STORES = ("store", "store-0.1.0")


@pytest.fixture(params=STORES)
def golden(request, tmp_path):
    shutil.copytree(GOLDEN / request.param, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def recorded(tmp_path):
    """The store that has a run record, too."""
    shutil.copytree(GOLDEN / "store-0.1.0", tmp_path / "store")
    return tmp_path / "store"


def test_every_commit_of_a_golden_store_is_read_and_sound(golden):
    store = Store(golden)
    commits = store.commits()
    assert len(commits) == 4
    for commit in commits:
        assert store.problems(commit, deep=True) == []
        assert json.loads((commit.attempt.data / "value.json").read_text()) in {1, 3, 14}


def test_a_golden_store_is_reused(golden):
    assert set(statuses(run(diamond(), golden)).values()) == {"reused"}


def ropewalk(store, *arguments):
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", *arguments, "--store", str(store), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_that_an_earlier_version_recorded_is_listed_and_shown(recorded):
    (listed,) = ropewalk(recorded, "status")["runs"]
    assert (listed["pipeline"], listed["status"], listed["steps"]) == ("diamond", "succeeded", {"ran": 4})
    shown = ropewalk(recorded, "show", "last")
    assert {step["name"]: step["status"] for step in shown["steps"]} == dict.fromkeys(
        ("first", "left", "right", "last"), "ran"
    )
    assert ropewalk(recorded, "show", "last", "first")["config"]["value"] == 3


def test_reasons_compare_with_what_an_earlier_version_recorded(recorded):
    planned = plan(diamond(value=5), recorded)
    assert planned["first"][0] == "run" and "value 3 -> 5" in planned["first"][1]
