"""The UI serves the store's runs on loopback until it is stopped, and knows which dashboards are alive."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_records import RecordBuilder, store_with_database, write_quickstart_run

from ropewalk.infra.doctor import services as doctor_services
from ropewalk.infra.doctor.machine import Check
from ropewalk.infra.process import process_start
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.database import default_tracking_uri, open_client
from ropewalk.infra.tracking.sync import mlflow_run_id, sync
from ropewalk.infra.tracking.ui import live_dashboards, mlflow_server, serve_ui

SERVE = """
import json, sys
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.ui import serve_ui
sys.exit(serve_ui(Store(sys.argv[1]), port=0, on_ready=lambda facts: print(json.dumps(facts), flush=True)))
"""


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], subprocess.Popen[str]]]:
    """A store with a finished run, and a process that serves it."""
    root = store_with_database(tmp_path_factory.mktemp("served"))
    write_quickstart_run(root, "run-1", steps=3)
    older = RecordBuilder(root, "run-0", "quickstart-before")
    older.start(train={})
    older.finish()
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(root)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sync(Store(root), "run-1")
    yield root, json.loads(process.stdout.readline()), process
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    process.stdout.close()


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def test_the_ui_shows_the_stores_runs_and_their_files(served: tuple[Path, dict[str, Any], Any]) -> None:
    root, facts, _ = served
    assert facts["ray_dashboards"] == []
    assert b"MLflow" in get(facts["mlflow_url"])
    run = mlflow_run_id(Store(root), "run-1")
    shown = get(f"{facts['mlflow_url']}/get-artifact?path=report/data/report.html&run_uuid={run}")
    assert shown == b"<h1>Report</h1>"


def test_the_ui_brings_runs_to_mlflow_that_it_does_not_have(served: tuple[Path, dict[str, Any], Any]) -> None:
    root, _, _ = served
    deadline = time.monotonic() + 60
    while (shown := mlflow_run_id(Store(root), "run-0")) is None:
        assert time.monotonic() < deadline, (root / "tracking.log").read_text()
        time.sleep(0.1)
    assert open_client(default_tracking_uri(root)).get_run(shown).data.tags["ropewalk.run_id"] == "run-0"


def test_the_ui_listens_on_loopback_only(served: tuple[Path, dict[str, Any], Any]) -> None:
    _, facts, _ = served
    port = int(facts["mlflow_url"].rsplit(":", 1)[1])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {fields[1].split(":")[0] for fields in listening if int(fields[1].split(":")[1], 16) == port}
    assert addresses == {"0100007F"}


def test_a_run_written_through_the_server_is_the_same(
    served: tuple[Path, dict[str, Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, facts, _ = served
    write_quickstart_run(tmp_path, "run-2", steps=3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", facts["mlflow_url"])
    sync(Store(tmp_path), "run-2")
    sync(Store(tmp_path), "run-2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    client = open_client(default_tracking_uri(root))

    def described(run_id: str) -> dict[str, Any]:
        found = client.search_runs(["1"], f"tags.`ropewalk.run_id` = '{run_id}'")
        full = [client.get_run(run.info.run_id) for run in found]
        return {
            run.info.run_name.replace(run_id, "RUN"): (
                run.info.status,
                run.info.end_time,
                run.data.params,
                run.data.metrics,
                sorted(entry.dataset.name for entry in run.inputs.dataset_inputs),
                len(run.inputs.model_inputs),
                len(run.outputs.model_outputs),
                sorted(entry.path for entry in client.list_artifacts(run.info.run_id)),
            )
            for run in full
        }

    assert described("run-2") == described("run-1")
    assert len(described("run-1")) == 9


def test_the_doctor_finds_the_server_well(
    served: tuple[Path, dict[str, Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = served[1]["mlflow_url"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    assert doctor_services.check_mlflow(tmp_path) == Check("mlflow", True, f"{url} answers")
    assert doctor_services.check_clock(url).ok


def test_stopping_it_leaves_no_process_behind(tmp_path: Path) -> None:
    root = store_with_database(tmp_path)
    with mlflow_server(root, default_tracking_uri(root), "127.0.0.1", 0) as (process, _):
        group = process.pid
        assert [entry for entry in Path("/proc").glob("[0-9]*") if _group(entry) == group]
    assert not [entry for entry in Path("/proc").glob("[0-9]*") if _group(entry) == group]


def _group(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[2])
    except OSError:
        return None


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    database.write_text("this is no database")
    with (
        pytest.raises(UserError, match=r"did not come up: .*mlflow-ui\.log"),
        mlflow_server(tmp_path, f"sqlite:///{database}", "127.0.0.1", 0),
    ):
        pytest.fail("it came up")


def test_a_server_that_runs_already_is_only_pointed_to(
    served: tuple[Path, dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, facts, _ = served
    monkeypatch.setenv("MLFLOW_TRACKING_URI", facts["mlflow_url"].replace("http://", "http://me:secret@"))
    assert serve_ui(Store(root)) == 0
    shown = capsys.readouterr().out
    assert "MLflow: http://***@127.0.0.1" in shown and "secret" not in shown
    assert "none, no run is going on" in shown
    assert "Ctrl-C" not in shown


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:9", r"MLflow at http://127\.0\.0\.1:9 does not answer \(.*refused\)"),
        ("http://127.0.0.1:port", r"MLflow at http://127\.0\.0\.1:port does not answer \(nonnumeric port"),
        ("./mlruns", r"MLFLOW_TRACKING_URI=\./mlruns names neither a server .* nor a database"),
        ("sqlite:////proc/none/mlflow.db", r"the MLflow database sqlite:////proc/none/mlflow\.db cannot be made"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    uri: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quickstart_run(tmp_path, "run", steps=1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=message):
        serve_ui(Store(tmp_path))


def test_a_store_without_runs_is_named_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no runs in .*/typo: "):
        serve_ui(Store(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    write_quickstart_run(store_with_database(tmp_path), "run", steps=1)
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        serve_ui(Store(tmp_path), host="192.0.2.1")


def test_only_dashboards_of_living_runs_are_shown(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    here, url = os.getpid(), "http://127.0.0.1:8265"
    # The last one has our pid but another start time: its process is gone and the system gave the id out again.
    for run_id, pid, started in (
        ("alive", here, process_start(here)),
        ("dead", int(gone.stdout), 1.0),
        ("reused", here, 1.0),
    ):
        folder = tmp_path / "runs" / run_id
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"pid": pid, "process_started": started}))
        (folder / "ray.json").write_text(json.dumps({"pid": pid, "dashboard_url": url}))
    assert [(dashboard.run_id, dashboard.url) for dashboard in live_dashboards(tmp_path)] == [("alive", url)]


def test_a_port_in_use_is_replaced_by_a_free_one(tmp_path: Path) -> None:
    from ropewalk.infra.tracking.ui import _usable_port

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _usable_port("127.0.0.1", port) != port
    assert _usable_port("127.0.0.1", port) == port
