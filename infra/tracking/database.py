"""Where MLflow keeps what it shows: a server named by MLFLOW_TRACKING_URI, else sqlite beside the store.

A fresh sqlite database must be made by one process: MLflow runs its migrations without a lock, and several first users
leave a database that never opens again (four at once did, with MLflow 3.17). So it is made under a file lock, in a file
of another name that is renamed when complete; being killed half-way leaves nothing that counts.

Importing this module does not import MLflow, which takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ropewalk.infra.scrub import scrub_text

SQLITE = "sqlite:///"


def default_tracking_uri(store_root: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, else the sqlite database `mlflow.db` in the store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{store_root.resolve() / 'mlflow.db'}"


def artifact_location(store_root: Path, tracking_uri: str, experiment: str) -> str | None:
    """Where an experiment's artifacts go: beside a local database; None leaves the choice to the server."""
    if not tracking_uri.startswith(SQLITE):
        return None
    folder = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in experiment)
    return (store_root.resolve() / "mlartifacts" / folder).as_uri()


def set_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Set what MLflow reads from the environment (default: this process's) and return it. Call before importing it.

    No telemetry; no active run inherited; requests fail at once, since our own loop tries again: a request that MLflow
    repeats after a timeout may have been served, and a repeated creation makes a second run.
    """
    target: Any = os.environ if environment is None else environment
    target.pop("MLFLOW_RUN_ID", None)
    target.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    target.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    target.setdefault("GIT_PYTHON_REFRESH", "quiet")
    target.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Of artifacts that go to S3 without the server's help.
    target.setdefault("AWS_MAX_ATTEMPTS", "2")
    target["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    target["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
    return target


def open_client(tracking_uri: str) -> Any:
    """An `MlflowClient` on this URI alone, whatever the process-wide one is; makes a missing sqlite database."""
    set_environment()
    from mlflow.tracking import MlflowClient

    prepare(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def prepare(tracking_uri: str) -> None:
    """Make the sqlite database if the URI names one that is not there; any number of processes may do so at once."""
    path = sqlite_path(tracking_uri)
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(path.name + ".lock")):
        if path.exists():
            return
        partial = path.with_name(path.name + ".partial")
        for leftover in path.parent.glob(partial.name + "*"):
            leftover.unlink()
        _create(partial)
        partial.replace(path)


def sqlite_path(tracking_uri: str) -> Path | None:
    """The file behind a sqlite URI; None for a server, another database, or a database in memory."""
    if not tracking_uri.startswith(SQLITE):
        return None
    name = tracking_uri.removeprefix(SQLITE).partition("?")[0]
    return None if name in ("", ":memory:") else Path(name)


def database_id(tracking_uri: str) -> str:
    """Which database a URI names now, without secrets: another sqlite file at the same path is another one."""
    path = sqlite_path(tracking_uri)
    if path is None:
        return scrub_text(tracking_uri)
    try:
        return f"{tracking_uri}#{path.stat().st_ino}"
    except FileNotFoundError:
        return tracking_uri


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file; the system frees it when the process ends.

    Yields whether it is held: always, after waiting for it, unless `wait` is off and somebody else holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def _create(path: Path) -> None:
    set_environment()
    import logging

    from mlflow.tracking import MlflowClient

    # MLflow tells of each of its hundred migrations.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    uri = f"{SQLITE}{path}"
    MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
