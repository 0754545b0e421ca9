"""A store that an earlier version wrote must be readable, and reusable, by every later one.

`golden/store` was written by format version 1 from `toy_stages.diamond()`. Never write it anew: add another beside it.
"""

import json
import shutil
from pathlib import Path

from engine import run, statuses
from toy_stages import diamond

from ropewalk.infra.store import Store, deep_problems

GOLDEN = Path(__file__).parents[1] / "golden" / "store"


def test_every_commit_of_the_golden_store_is_read_and_sound():
    commits = Store(GOLDEN).commits()
    assert len(commits) == 4
    for commit in commits:
        assert deep_problems(commit) == []
        assert json.loads((commit.attempt.data / "value.json").read_text()) in {1, 3, 14}


def test_the_golden_store_is_reused(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "store")
    assert set(statuses(run(diamond(), tmp_path / "store")).values()) == {"reused"}
