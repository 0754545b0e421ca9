"""Shows what there is to look at in a browser: the MLflow UI on the store's database, the dashboards of live runs.

The server listens on loopback unless another host is asked for. It runs without MLflow's job execution, which costs
about 2 GB of memory and serves nothing of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.infra.doctor.services import check_mlflow
from ropewalk.infra.process import is_alive
from ropewalk.infra.record import run_ids
from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking.database import default_tracking_uri, prepare, set_environment

SERVERS = ("http://", "https://")
DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")
START_SECONDS = 120.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Dashboard:
    """The Ray dashboard of a run that is going on."""

    run_id: str
    url: str


def serve_ui(
    store: Store,
    host: str = "127.0.0.1",
    port: int = 5000,
    *,
    on_ready: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run the MLflow UI until Ctrl-C or SIGTERM, and say where it and the live Ray dashboards are.

    Args:
        store: Whose runs are shown. Those that MLflow does not have are brought to it meanwhile.
        host: Address to listen on. Anything but loopback lets others in: the UI has no login.
        port: Port; a free one is taken instead if it is in use, or 0.
        on_ready: Given `{"mlflow_url", "ray_dashboards": [{"run_id", "url"}]}` instead of printing lines.

    Returns:
        0, also when MLFLOW_TRACKING_URI names a server that runs already: then only its address is shown.

    Raises:
        UserError: There is nothing to show, or no server to show it.
    """
    if not run_ids(store):
        raise UserError(f"there are no runs in {store.uri}: `ropewalk run` makes one, --store names another store")
    dashboards = live_dashboards(store.root)
    tracking_uri = default_tracking_uri(store.root)
    if tracking_uri.startswith(SERVERS):
        check = check_mlflow(store.root)
        if not check.ok:
            raise UserError(f"MLflow at {check.message}")
        _announce(scrub_text(tracking_uri), dashboards, on_ready)
        return 0
    if not tracking_uri.startswith(DATABASES):
        raise UserError(
            f"MLFLOW_TRACKING_URI={scrub_text(tracking_uri)} names neither a server (http://...) nor a database that"
            " the UI can be started on (sqlite:///...): unset it, or look there yourself"
        )
    with mlflow_server(store.root, tracking_uri, host, port) as (process, url), _catching_up(store):
        _announce(url, dashboards, on_ready, ends_with="Ctrl-C stops the server\n")
        with contextlib.suppress(KeyboardInterrupt), _sigterm_as_interrupt():
            process.wait()
            raise UserError(f"the MLflow server ended by itself with exit status {process.returncode}")
    return 0


@contextlib.contextmanager
def mlflow_server(
    store_root: Path, tracking_uri: str, host: str, port: int
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An MLflow server on a database, as its process and address; it answers when this yields and is stopped after.

    Raises UserError with the end of its log if it does not come up.
    """
    try:
        prepare(tracking_uri)
    except OSError as error:
        raise UserError(f"the MLflow database {scrub_text(tracking_uri)} cannot be made: {error}") from None
    port = _usable_port(host, port)
    log_path = store_root / "mlflow-ui.log"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--default-artifact-root", (store_root.resolve() / "mlartifacts").as_uri(), "--no-serve-artifacts"]
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    environment = set_environment({**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    with log_path.open("wb") as log:
        # A session of its own, so that its workers can be stopped with it.
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    try:
        _wait_until_it_answers(process, url, log_path)
        yield process, url
    finally:
        _stop(process)


@contextlib.contextmanager
def _catching_up(store: Store) -> Iterator[None]:
    """Bring to MLflow what it lacks, in a process of its own that ends with the block; what is left waits."""
    child = tracking.start(store, None)
    try:
        yield
    finally:
        child.terminate()
        child.wait()


def live_dashboards(store_root: Path) -> list[Dashboard]:
    """The Ray dashboards of runs whose process is still there, newest run first."""
    found = []
    for path in sorted((store_root / "runs").glob("*/ray.json"), reverse=True):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if facts.get("dashboard_url") and is_alive(facts["pid"], _started(path.parent, facts["pid"])):
            found.append(Dashboard(path.parent.name, facts["dashboard_url"]))
    return found


def _started(run_folder: Path, pid: int) -> float | None:
    """When the run's process started, by its record: tells it from a later process with the same id."""
    with contextlib.suppress(OSError, ValueError):
        run = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
        return run.get("process_started") if run.get("pid") == pid else None
    return None


def _announce(
    mlflow_url: str,
    dashboards: list[Dashboard],
    on_ready: Callable[[dict[str, Any]], None] | None,
    ends_with: str = "",
) -> None:
    if on_ready is not None:
        rows = [{"run_id": dashboard.run_id, "url": dashboard.url} for dashboard in dashboards]
        on_ready({"mlflow_url": mlflow_url, "ray_dashboards": rows})
        return
    lines = [f"MLflow: {mlflow_url}"]
    lines += [f"Ray dashboard of run {dashboard.run_id}: {dashboard.url}" for dashboard in dashboards]
    if not dashboards:
        lines.append("Ray dashboard: none, no run is going on")
    sys.stdout.write("\n".join([*lines, ends_with]))
    sys.stdout.flush()


def _usable_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in (port, 0):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, candidate))
            return probe.getsockname()[1]
    raise UserError(f"--host {host} is no address of this machine: take 127.0.0.1, or one that `ip address` shows")


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except urllib.error.HTTPError:
            # It answers; what it thinks of this path does not matter.
            return
        except OSError:
            time.sleep(0.2)
    tail = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise UserError(f"the MLflow server did not come up: {' '.join(tail) or 'it said nothing'} (log: {log_path})")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_SECONDS)
            return


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
