"""The process that follows a run, and what `sync` says when something is wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from run_records import RecordBuilder, small_record
from shown_runs import history, runs_of

from ropewalk.infra.process import process_start
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking import tracker
from ropewalk.infra.tracking.tracker import TrackingError

pytestmark = pytest.mark.usefixtures("no_server")


def sync(root: Path, run_id: str, **how: Any) -> None:
    tracking.sync(Store(root), run_id, **how)


def test_a_broken_line_is_named(store: Path) -> None:
    record = RecordBuilder(store, "run", "broken")
    record.start(train={})
    with record.path.open("a") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match=r"events\.jsonl has a line that is no JSON .*oops"):
        sync(store, "run")


def test_an_unknown_run_is_named(store: Path) -> None:
    with pytest.raises(UserError, match="no run is called 'nothing'"):
        sync(store, "nothing")


def test_mlflow_being_down_is_one_clear_sentence(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    small_record(store, "run")
    with pytest.raises(TrackingError, match=r"MLflow at http://\*\*\*@127.0.0.1:9 does not take run run") as caught:
        sync(store, "run")
    assert "secret" not in str(caught.value)
    assert tracking.main([str(store), "run"]) == 1


def test_after_the_run_mlflow_is_waited_for_only_so_long(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 1.5)
    small_record(store, "run")
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLflow has only the first 0 events .* `ropewalk sync run` catches up"):
        sync(store, "run", follow=True, tracking_uri="http://127.0.0.1:9")
    assert time.monotonic() - began < 10


def test_the_child_process_follows_a_run_to_its_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A run id left in the environment would make MLflow's fluent API write into a stranger's run.
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    record = RecordBuilder(store, "live", "live")
    assert tracking.mlflow_run_id(Store(store), "live") is None
    child = tracking.start(Store(store), "live")
    try:
        record.start(train={})
        record.begin("train")
        deadline = time.monotonic() + 60
        while tracking.mlflow_run_id(Store(store), "live") is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert tracking.mlflow_run_id(Store(store), "live") is not None
        for at in range(5):
            record.metrics("train", {"loss": float(at)}, at=at)
        record.succeed("train", "rows")
        record.finish()
        assert child.wait(timeout=60) == 0, (record.folder / "logs/tracking.log").read_text()
    finally:
        child.kill()
        child.wait()
    assert history(store, runs_of(store, "live")["train"], "loss") == [(at, float(at)) for at in range(5)]
    assert runs_of(store, "live")["live"].info.status == "FINISHED"


def test_the_child_process_outlives_a_killed_driver_and_closes_its_run(store: Path) -> None:
    code = (
        "import sys, time; from ropewalk.infra.tracking import sync as tracking;"
        "from ropewalk.infra.store import Store; sys.stdin.read();"
        "print(tracking.start(Store(sys.argv[1]), 'orphan').pid, flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None and driver.stdout is not None
    process = {"pid": driver.pid, "process_started": process_start(driver.pid)}
    record = RecordBuilder(store, "orphan", "orphan", driver=process)
    record.start(train={})
    record.begin("train")
    driver.stdin.close()
    child_pid = int(driver.stdout.readline())
    # What a terminal does on Ctrl-C reaches the driver's group, not the child.
    assert os.getpgid(child_pid) != os.getpgid(driver.pid)
    record.metrics("train", {"loss": 1.0}, at=1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child_pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    runs = runs_of(store, "orphan")
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert history(store, runs["train"], "loss") == [(1, 1.0)]


def test_importing_and_starting_needs_no_mlflow() -> None:
    code = "import sys, ropewalk.infra.tracking.sync; print({'mlflow', 'ray', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
