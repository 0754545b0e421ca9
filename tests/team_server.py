"""The tracking server of a team on loopback: PostgreSQL, and MLflow as infra/cluster/mlflow/compose.yaml starts it."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ropewalk.stages.context import free_port

COMPOSE = Path(__file__).parents[1] / "infra/cluster/mlflow/compose.yaml"
START_SECONDS = 90.0


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A fresh PostgreSQL server, never as root, which it refuses; gives "user:password@host:port/database"."""
    # Not below pytest's folders: those are closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    data, password, port = folder / "data", secrets.token_hex(8), free_port()
    user = _not_root()
    if user:
        os.chown(folder, user["user"], user["group"])
    secret = folder / "password"
    secret.write_text(password)
    if user:
        os.chown(secret, user["user"], user["group"])
    secret.chmod(0o600)
    options = ["--username=mlflow", f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync"]
    subprocess.run(
        [_program("initdb"), "-D", data, *options], check=True, stdout=subprocess.DEVNULL, cwd=folder, **user
    )
    secret.unlink()
    command = [_program("postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **user)
    environment = {**os.environ, "PGPASSWORD": password}
    client = ["--host=127.0.0.1", f"--port={port}", "--username=mlflow"]
    try:
        _wait(process, lambda: _succeeds([_program("pg_isready"), *client]), folder / "log")
        subprocess.run([_program("createdb"), *client, "mlflow"], check=True, env=environment)
        yield f"mlflow:{password}@127.0.0.1:{port}/mlflow"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        shutil.rmtree(folder)


class MlflowServer:
    """MLflow with the options of the compose file, on a port of its own."""

    def __init__(self, database: str, artifact_root: str, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        service = yaml.safe_load(COMPOSE.read_text())["services"]["mlflow"]
        values = {"MLFLOW_HOST": "127.0.0.1", "ARTIFACT_ROOT": artifact_root, "POSTGRES_PASSWORD": "-"}
        options = [re.sub(r"\$\{(\w+)[^}]*\}", lambda found: values[found[1]], text) for text in service["command"]]
        options = [option.replace("0.0.0.0", "127.0.0.1").replace("5000", str(self.port)) for option in options]
        self.command = [sys.executable, "-m", "mlflow", "server", *options]
        scheme = service["environment"]["MLFLOW_BACKEND_STORE_URI"].partition("://")[0]
        uri = {"MLFLOW_BACKEND_STORE_URI": f"{scheme}://{database}"}
        self._environment = {**os.environ, **service["environment"], **uri}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        _wait(self._process, self._answers, self._log)

    def kill(self) -> None:
        """Kill it with all its workers."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False


def _not_root() -> dict[str, Any]:
    """Options of `subprocess` that leave root's rights; none if we have none."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres", names["nobody"])
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _program(name: str) -> str:
    found = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    assert found, f"{name} is not installed: run tests/services/install_postgresql.sh, as `make test-services` does"
    return found


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _wait(process: subprocess.Popen[Any], is_ready: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-2000:]
        time.sleep(0.2)
