"""Brings a run's record to MLflow, while it grows or afterwards.

The record in the store is the truth and MLflow a view of it, so nothing here may stop or slow a run: a child process
tails `runs/<run id>/events.jsonl` and alone talks to MLflow. It survives MLflow being down (it tries again, the events
stay where they are), its own death and the death of the run's driver; `sync` brings MLflow up to date from whatever
point it has reached, kept in `runs/<run id>/mlflow.json`. Doing anything twice changes nothing.

Importing this module does not import MLflow. The engine starts the child with `start` and reads `mlflow_run_id`.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.infra.event_tail import EventTail
from ropewalk.infra.mlflow_database import default_tracking_uri, locked, open_client, set_environment
from ropewalk.infra.mlflow_lineage import Ids
from ropewalk.infra.record import is_alive, process_start
from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.step import UserError

if TYPE_CHECKING:
    from ropewalk.infra.mlflow_view import View

POLL_SECONDS = 0.3
FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 15.0
PATIENCE_SECONDS = 20.0
"""How long MLflow is waited for once the run has ended."""
MAX_METRIC_EVENTS = 1000
DRIVER_GONE = "the process that ran it ended without a word"


class TrackingError(UserError):
    """MLflow could not be brought up to date. The run and its record are not affected."""


def start(store_root: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Start the child process that follows a run of this process. It ends by itself soon after the run does.

    Ctrl-C in the terminal does not reach it, so that it can still write how the run ended.
    """
    folder = store_root / "runs" / run_id / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ropewalk.infra.tracking", str(store_root), run_id]
    with (folder / "tracking.log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--follow", "--parent-pid", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=set_environment(dict(os.environ)),
        )


def mlflow_run_id(store_root: Path, run_id: str) -> str | None:
    """The id of the run's parent run in MLflow; None until MLflow has it."""
    return read_ids(_ids_path(store_root, run_id)).parent_run_id


def sync(
    store_root: Path,
    run_id: str,
    *,
    follow: bool = False,
    parent_pid: int | None = None,
    tracking_uri: str | None = None,
) -> None:
    """Write to MLflow what it does not have of a run. Waits while another process does so.

    Args:
        store_root: The store's folder.
        run_id: The run.
        follow: Go on until the run has finished or the process that runs it is gone.
        parent_pid: The process that runs it; by default the one that an earlier call was told of.
        tracking_uri: Which MLflow; by default MLFLOW_TRACKING_URI, else the sqlite database in the store.

    Raises:
        TrackingError: the run is unknown, or MLflow cannot be reached.
        UserError: the record cannot be read.
    """
    folder = store_root / "runs" / run_id
    if not follow and not (folder / "events.jsonl").is_file():
        raise TrackingError(f"{folder} has no events.jsonl: there is no run {run_id!r} in this store")
    folder.mkdir(parents=True, exist_ok=True)
    # A process that follows the run may hold the lock; when it lets go, little or nothing is left to do.
    with locked(folder / "mlflow.lock"):
        tracker = Tracker(store_root, run_id, tracking_uri or default_tracking_uri(store_root), parent_pid)
        if follow:
            tracker.follow()
        else:
            tracker.catch_up()


class Tracker:
    """Moves events from a run's record to MLflow. One at a time may work on a run."""

    def __init__(self, store_root: Path, run_id: str, tracking_uri: str, parent_pid: int | None) -> None:
        self.run_id = run_id
        self.tracking_uri = tracking_uri
        self._store_root = store_root
        self._ids_path = _ids_path(store_root, run_id)
        self._tail = EventTail(store_root / "runs" / run_id / "events.jsonl")
        self._pending: deque[dict[str, Any]] = deque()
        self._view: View | None = None
        self.ids = read_ids(self._ids_path)
        if self.ids.tracking_uri != scrub_text(tracking_uri):
            self.ids = Ids(tracking_uri=scrub_text(tracking_uri), driver=self.ids.driver)
        if parent_pid is not None:
            driver = {"host": socket.gethostname(), "pid": parent_pid, "started": process_start(parent_pid)}
            self.ids.driver = driver
            self._save(self.ids)

    def catch_up(self) -> None:
        """Write everything recorded so far. Raises TrackingError if MLflow cannot be reached or refuses."""
        # Asked before reading: what the driver wrote before it ended is then read.
        gone = self._driver_gone()
        try:
            self.push()
            self._close_if_abandoned(gone)
        except _outages() as error:
            where = scrub_text(self.tracking_uri)
            raise TrackingError(f"MLflow at {where} does not take run {self.run_id}: {_brief(error)}") from error

    def follow(self) -> None:
        """Write events as they come until the run has ended. Raises TrackingError if MLflow stays away for too long."""
        backoff, deadline = FIRST_BACKOFF_SECONDS, None
        while True:
            gone = self._driver_gone()
            ended = gone or self._tail.has_ended()
            if ended and deadline is None:
                backoff, deadline = FIRST_BACKOFF_SECONDS, time.monotonic() + PATIENCE_SECONDS
            try:
                self.push()
                backoff = FIRST_BACKOFF_SECONDS
                if ended:
                    self._close_if_abandoned(gone)
                    return
                time.sleep(POLL_SECONDS)
            except _outages() as error:
                self._close()
                if deadline is not None and time.monotonic() + backoff > deadline:
                    raise TrackingError(
                        f"MLflow has only the first {self.ids.seq} events of run {self.run_id}: {_brief(error)};"
                        f" `ropewalk sync {self.run_id}` catches up"
                    ) from error
                say(f"MLflow: {_brief(error)}; trying again in {backoff:.0f} s")
                self._wait(backoff, wake_at_end=deadline is None)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def push(self) -> None:
        """Write all that is recorded, saving after each piece how far MLflow has got."""
        view = self._view or self._open()
        while view and (events := self._tail.read()):
            for event in events:
                view.remember(event)
            self._pending.extend(event for event in events if event["seq"] >= self.ids.seq)
            while self._pending:
                piece = self._next_piece()
                self._apply(view, piece)
                self.ids.seq = piece[-1]["seq"] + 1
                self._save(self.ids)
                for _ in piece:
                    self._pending.popleft()

    def _apply(self, view: View, piece: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            view.apply(piece)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            # Trying again would not help, and waiting would keep all later events away from MLflow.
            for event in piece:
                say(f"MLflow refused event {event['seq']} ({event['type']}): {_brief(error)}")
                view.note_refused(event, _brief(error))

    def _next_piece(self) -> list[dict[str, Any]]:
        if self._pending[0]["type"] != "metrics":
            return [self._pending[0]]
        metrics = takewhile(lambda event: event["type"] == "metrics", self._pending)
        return list(islice(metrics, MAX_METRIC_EVENTS))

    def _open(self) -> View | None:
        """Connect and find this run in MLflow; None while nothing is recorded."""
        first = self._tail.first()
        if first is None:
            return None
        from ropewalk.infra.mlflow_view import View

        view = View(open_client(self.tracking_uri), self.ids, self._save, self._store_root, self.run_id)
        view.remember(first)
        view.find()
        self._view = view
        return view

    def _close(self) -> None:
        """Forget the connection and begin again with the first event: what MLflow has is looked up anew."""
        self._view = None
        self._pending.clear()
        self._tail.rewind()

    def _close_if_abandoned(self, gone: bool) -> None:
        last = self._tail.last()
        if gone and last and self._view and not self._view.finished:
            self._view.abandon(last["time"], DRIVER_GONE)

    def _driver_gone(self) -> bool:
        driver = self.ids.driver
        # Of a process on another machine nothing can be said.
        return driver.get("host") == socket.gethostname() and not is_alive(driver["pid"], driver["started"])

    def _wait(self, seconds: float, *, wake_at_end: bool) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
            if wake_at_end and (self._driver_gone() or self._tail.has_ended()):
                return

    def _save(self, ids: Ids) -> None:
        temporary = self._ids_path.with_name(self._ids_path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(ids), indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._ids_path)


def read_ids(path: Path) -> Ids:
    """The content of `mlflow.json`; empty if there is none yet or it cannot be read (all of it can be found again)."""
    try:
        return Ids(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Ids()


def say(text: str) -> None:
    """One line in the tracking log."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _ids_path(store_root: Path, run_id: str) -> Path:
    return store_root / "runs" / run_id / "mlflow.json"


def _outages() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return scrub_text(lines[0] if lines else type(error).__name__)[:300]


def main(arguments: list[str] | None = None) -> int:
    """The child process: `python -m ropewalk.infra.tracking STORE RUN_ID [--follow --parent-pid N]`."""
    parser = argparse.ArgumentParser(prog="ropewalk.infra.tracking", description="Bring a run's record to MLflow.")
    parser.add_argument("store", type=Path)
    parser.add_argument("run_id")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--parent-pid", type=int, help="the process that runs it")
    parser.add_argument("--tracking-uri")
    asked = parser.parse_args(arguments)
    try:
        sync(
            asked.store,
            asked.run_id,
            follow=asked.follow,
            parent_pid=asked.parent_pid,
            tracking_uri=asked.tracking_uri,
        )
    except UserError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
