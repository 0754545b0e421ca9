"""Stores of both kinds as fixtures, and the `ropewalk` command on several machines that share one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from object_store_server import new_bucket, object_store_server

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["folder", "object store"])
def kind_of_store(request):
    """Which kind; a real S3 server runs as long as the tests of a module need one."""
    if request.param == "folder":
        yield request.param
    else:
        with object_store_server():
            yield request.param


@pytest.fixture
def store_uri(kind_of_store, tmp_path, monkeypatch):
    """A new store: a folder, or a bucket of a real S3 server; this process has a scratch folder of its own."""
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    return str(tmp_path / "store") if kind_of_store == "folder" else new_bucket()


@pytest.fixture
def elsewhere(tmp_path):
    """Environment of a process on another machine, as far as an object store is concerned."""
    return {"ROPEWALK_SCRATCH": str(tmp_path / "elsewhere")}


@dataclass
class Machine:
    """A machine on which commands are given. A store in a folder is shared by all; else each has its own scratch."""

    store_uri: str
    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    def ropewalk(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Give a command and wait for its end, which must be as expected."""
        done = subprocess.run(**self._process(words), capture_output=True, check=False, timeout=300)
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def told(self, *words: str, code: int | None = 0) -> dict:
        """The JSON object that a command ends with."""
        return json.loads(self.ropewalk(*words, "--json", code=code).stdout.splitlines()[-1])

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Give a command that goes on."""
        return subprocess.Popen(**self._process(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def _process(self, words: tuple[str, ...]) -> dict:
        self.home.mkdir(parents=True, exist_ok=True)
        places = {"ROPEWALK_STORE": self.store_uri, "ROPEWALK_SCRATCH": str(self.home / "scratch")}
        environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **places, **self.variables}
        command = [sys.executable, "-m", "ropewalk.pipelines.cli", *words]
        return {"args": command, "env": environment, "cwd": self.home, "text": True}
