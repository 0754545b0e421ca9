"""Moves the events of one run from its record to MLflow, through outages.

The record is the queue: events stay in the file until MLflow has them, so memory does not grow with an outage, and how
far MLflow has got is kept in `mlflow.json`. While MLflow does not answer, one request is made now and then (the circuit
is open); when it answers again, what it has of the run is looked up and the rest is written.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import islice, takewhile
from typing import Any

from ropewalk.infra.record import driver_state, read_run
from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.artifacts import Artifacts
from ropewalk.infra.tracking.database import database_id, open_client, sqlite_path
from ropewalk.infra.tracking.event_tail import EventTail
from ropewalk.infra.tracking.ids import Ids, ids_path, read_ids, write_ids
from ropewalk.infra.tracking.view import View

POLL_SECONDS = 0.3
FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 15.0
PATIENCE_SECONDS = 20.0
"""How long MLflow is waited for once the run has ended."""
MAX_METRIC_EVENTS = 1000
DRIVER_GONE = "the process that ran it ended without a word"


class TrackingError(UserError):
    """MLflow could not be brought up to date. The run and its record are not affected."""


class Tracker:
    """One at a time may work on a run: see `tracking.sync`, which holds a lock."""

    def __init__(self, store: Store, run_id: str, tracking_uri: str) -> None:
        self.run_id = run_id
        self.tracking_uri = tracking_uri
        self._store = store
        self._run = read_run(store, run_id)
        self._ids_path = ids_path(store.root, run_id)
        self._artifacts = Artifacts(store)
        self._tail = EventTail(store.root / "runs" / run_id / "events.jsonl")
        self._pending: deque[dict[str, Any]] = deque()
        """Read, but not written to MLflow; less than a chunk of the file."""
        self._next_unread = 0
        self._client: Any = None
        self._view: View | None = None
        self._is_connected = False
        self.ids = read_ids(self._ids_path)

    def catch_up(self) -> None:
        """Write everything recorded so far. Raises TrackingError if MLflow cannot be reached or refuses."""
        # Asked before reading: what the driver wrote before it ended is then read.
        gone = self._driver_gone()
        try:
            self.push()
            self._settle(gone)
        except _outages() as error:
            self._note_trouble(error)
            where = scrub_text(self.tracking_uri)
            raise TrackingError(f"MLflow at {where} does not take run {self.run_id}: {_brief(error)}") from error

    def follow(self, when_idle: Callable[[], object] = lambda: None) -> None:
        """Write events as they come until the run has ended. Raises TrackingError if MLflow stays away for too long.

        `when_idle` is called now and then when there is nothing to write.
        """
        backoff, deadline = FIRST_BACKOFF_SECONDS, None
        while True:
            gone = self._driver_gone()
            ended = gone or self._tail.has_ended()
            if ended and deadline is None:
                backoff, deadline = FIRST_BACKOFF_SECONDS, time.monotonic() + PATIENCE_SECONDS
            try:
                moved = self.push()
                backoff = FIRST_BACKOFF_SECONDS
                if ended:
                    self._settle(gone)
                    return
                if not moved:
                    when_idle()
                time.sleep(POLL_SECONDS)
            except _outages() as error:
                self._note_trouble(error)
                if deadline is not None and time.monotonic() + backoff > deadline:
                    raise TrackingError(
                        f"MLflow has only the first {self.ids.seq} events of run {self.run_id}: {_brief(error)};"
                        f" `ropewalk sync {self.run_id}` catches up"
                    ) from error
                say(f"MLflow: {_brief(error)}; trying again in {backoff:.0f} s")
                self._wait(backoff, wake_at_end=deadline is None)
                backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def push(self) -> bool:
        """Write all that is recorded, saving after each piece how far MLflow has got; whether there was anything."""
        view = self._connected()
        moved = False
        while view and (self._pending or self._read(view)):
            piece = self._next_piece()
            self._apply(view, piece)
            self.ids.seq = piece[-1]["seq"] + 1
            self._save(self.ids)
            for _ in piece:
                self._pending.popleft()
            moved = True
        if self.ids.trouble and not self.ids.unsent_files:
            self.ids.trouble = ""
            self._save(self.ids)
        return moved

    def has_all(self) -> bool:
        """Whether MLflow has all that is recorded so far, as far as our own notes tell."""
        if self.ids.database != database_id(self.tracking_uri):
            return False
        last = self._tail.last()
        waits = self.ids.is_complete or (last is not None and self.ids.seq > last["seq"] and not self._driver_gone())
        return waits and not self.ids.unsent_files

    def is_under_way(self) -> bool:
        """Whether the run goes on, as far as can be known: then its own tracking process is at it."""
        return not self._tail.has_ended() and not self._driver_gone()

    def _connected(self) -> View | None:
        """The view, after looking up what MLflow has of the run; None while nothing is recorded."""
        if self._is_connected:
            return self._view
        first = self._tail.first()
        if first is None:
            return None
        self._client = self._client or open_client(self.tracking_uri)
        database = database_id(self.tracking_uri)
        if self.ids.database != database:
            self.ids = Ids(database=database)
            self._begin_anew()
        self._view = view = self._view or self._new_view()
        view.state.learn(first)
        view.find()
        if self.ids.seq < (self._pending[0]["seq"] if self._pending else self._next_unread):
            # MLflow has lost what it had.
            self._begin_anew()
            self._view = view = self._new_view()
        self._is_connected = True
        return view

    def _begin_anew(self) -> None:
        self._view = None
        self._pending.clear()
        self._tail.rewind()
        self._next_unread = 0

    def _new_view(self) -> View:
        return View(self._client, self.ids, self._save, self._store.root, self.run_id, self._artifacts)

    def _read(self, view: View) -> bool:
        """Take the next events from the record; False if there are none for MLflow."""
        while events := self._tail.read():
            for event in events:
                view.state.learn(event)
            self._next_unread = events[-1]["seq"] + 1
            self._pending.extend(event for event in events if event["seq"] >= self.ids.seq)
            if self._pending:
                return True
        return False

    def _next_piece(self) -> list[dict[str, Any]]:
        if self._pending[0]["type"] != "metrics":
            return [self._pending[0]]
        metrics = takewhile(lambda event: event["type"] == "metrics", self._pending)
        return list(islice(metrics, MAX_METRIC_EVENTS))

    def _apply(self, view: View, piece: list[dict[str, Any]]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            view.apply(piece)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE" or not view.is_whole():
                raise
            if len(piece) > 1:
                for event in piece:
                    self._apply(view, [event])
                return
            # Trying again would not help, and waiting would keep all later events away from MLflow.
            say(f"MLflow refused event {piece[0]['seq']} ({piece[0]['type']}): {_brief(error)}")
            view.note_refused(piece[0], _brief(error))

    def _settle(self, gone: bool) -> None:
        """After the last event: send what files are left, and check how everything ended. Raises TrackingError."""
        view = self._connected()
        if view is None:
            return
        if self.ids.unsent_files:
            self._send_files_again(view)
        if gone:
            view.state.abandon(DRIVER_GONE)
        view.settle()
        self.ids.is_complete = view.state.ending is not None and not self.ids.unsent_files
        self.ids.trouble = self.ids.trouble if self.ids.unsent_files else ""
        self._save(self.ids)
        if self.ids.unsent_files:
            raise TrackingError(f"MLflow has run {self.run_id}, but {self.ids.trouble}")
        if self.ids.is_complete:
            self._share_ids()

    def _share_ids(self) -> None:
        """Spare other machines that use the store and the same server to write the run once more."""
        if not self._store.is_local and sqlite_path(self.tracking_uri) is None:
            with contextlib.suppress(OSError):
                self._store.objects.write(f"runs/{self.run_id}/{self._ids_path.name}", self._ids_path.read_bytes())

    def _send_files_again(self, view: View) -> None:
        wanted = set(self.ids.unsent_files)
        tail = EventTail(self._tail.path)
        while events := tail.read():
            for event in events:
                if event["seq"] in wanted:
                    view.send_files_again(event)

    def _driver_gone(self) -> bool:
        # Of a process on another machine nothing can be said.
        return driver_state(self._run) == "dead"

    def _wait(self, seconds: float, *, wake_at_end: bool) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
            if wake_at_end and (self._driver_gone() or self._tail.has_ended()):
                return

    def _note_trouble(self, error: BaseException) -> None:
        """Look up what MLflow has before the next request, and let the driver know."""
        self._is_connected = False
        self.ids.trouble = _brief(error)
        with contextlib.suppress(OSError):  # The disk may be the trouble.
            self._save(self.ids)

    def _save(self, ids: Ids) -> None:
        write_ids(self._ids_path, ids)


def say(text: str) -> None:
    """One line in the tracking log."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


def _outages() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # The database's driver may not be installed.
    return (MlflowException, SQLAlchemyError, OSError, ImportError)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    # MLflow's own text goes on with the whole stack of what its HTTP library tried.
    silent = re.match(r"API request to (\w+://[^/\s]+)\S* failed with (timeout )?exception", text)
    return scrub_text(f"{silent[1]} does not answer" if silent else text)[:300]
