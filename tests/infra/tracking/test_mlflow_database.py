"""The sqlite database is made once, whole, however many want it first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from shown_runs import client_of

pytestmark = pytest.mark.usefixtures("no_server")


def test_four_processes_may_be_the_first_to_use_a_database(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ropewalk.infra.tracking.database import *;"
        "prepare(default_tracking_uri(Path(sys.argv[1])))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0, 0]
    assert [experiment.name for experiment in client_of(tmp_path).search_experiments()] == ["Default"]
    assert not list(tmp_path.glob("*.partial*"))
