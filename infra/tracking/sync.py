"""Brings runs' records to MLflow, while they grow or afterwards.

The record in the store is the truth and MLflow a view of it, so nothing here may stop or slow a run: a child process
tails `runs/<run id>/events.jsonl` and alone talks to MLflow. It survives MLflow being down (it tries again, the events
stay where they are), its own death and the death of the run's driver; `sync` brings MLflow up to date from whatever
point it has reached. Doing anything twice changes nothing.

A run in which no step runs starts no child: the next child, `sync_all` or the UI brings it to MLflow, as they do with
runs that an outage or a crash has left behind.

Importing this module does not import MLflow. The engine starts the child with `start` and waits with `wait`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ropewalk.infra.record import read_run, run_ids
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.database import default_tracking_uri, locked, set_environment
from ropewalk.infra.tracking.ids import ids_path, read_ids

if TYPE_CHECKING:
    from ropewalk.infra.tracking.tracker import Tracker

OLDER_SECONDS = 60.0
"""How long a child goes on with older runs once its own has ended."""
NICENESS = 10
"""The child shares the machine with training, which goes first."""
LOOK_SECONDS = 0.1
MAX_WAIT_SECONDS = 60.0
WAIT_FRACTION = 0.1
STILL_WRITING = "it is still being written in the background"


def start(store: Store, run_id: str | None) -> subprocess.Popen[bytes]:
    """Start the child process that follows a run; it ends soon after the run does. Without a run: bring all to MLflow.

    Ctrl-C in the terminal does not reach it, so that it can still write how the run ended.
    """
    command = [sys.executable, "-m", "ropewalk.infra.tracking.sync", store.uri]
    folder = store.root
    if run_id is not None:
        command += [run_id, "--follow"]
        folder = store.root / "runs" / run_id / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tracking.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=set_environment(dict(os.environ)),
        )


def patience(run_seconds: float) -> float:
    """How long a driver waits for MLflow at its end, in seconds.

    A server is waited for: others look at it, and this machine, with the child on it, may go away. The store's own
    database is looked at through `ropewalk ui`, which brings it up to date: it gets a tenth of what the run took.
    """
    named = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    return MAX_WAIT_SECONDS if named else min(WAIT_FRACTION * run_seconds, MAX_WAIT_SECONDS)


def wait(child: subprocess.Popen[bytes], store: Store, run_id: str, seconds: float) -> str | None:
    """Wait until MLflow has all of a run that has ended; None if it has, else why not, without waiting for an outage.

    The child goes on by itself: `STILL_WRITING` says that nothing else is the matter.
    """
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        ended = child.poll() is not None
        ids = read_ids(ids_path(store.root, run_id))
        if ids.is_complete:
            return None
        if ids.trouble or ended:
            return ids.trouble or f"the tracking process ended (log: {store.root}/runs/{run_id}/logs/tracking.log)"
        time.sleep(min(LOOK_SECONDS, left))
    return STILL_WRITING


def mlflow_run_id(store: Store, run_id: str) -> str | None:
    """The id of the run's parent run in MLflow; None until MLflow has it."""
    return read_ids(ids_path(store.root, run_id)).parent_run_id


def sync(
    store: Store,
    run_id: str,
    *,
    follow: bool = False,
    tracking_uri: str | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Write to MLflow what it does not have of a run.

    Args:
        store: Where the run is recorded.
        run_id: The run.
        follow: Go on until the run has ended or the process that runs it is gone; bring older runs to MLflow meanwhile.
        tracking_uri: Which MLflow; by default MLFLOW_TRACKING_URI, else the sqlite database in the store.
        on_wait: Called before waiting for another process that is at it.

    Raises:
        TrackingError: MLflow cannot be reached.
        UserError: the run is unknown, or its record cannot be read.
    """
    from ropewalk.infra.tracking.tracker import Tracker

    uri = tracking_uri or default_tracking_uri(store.root)
    read_run(store, run_id)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(locked(_lock(store, run_id), wait=False)):
            on_wait()
            stack.enter_context(locked(_lock(store, run_id)))
        tracker = Tracker(store, run_id, uri)
        if follow:
            _follow(tracker, store, uri)
        else:
            tracker.catch_up()


@dataclass(frozen=True)
class Synced:
    """How it went with one run."""

    run_id: str
    status: Literal["written", "busy", "failed"]
    """busy: another process is at it, as while the run goes on."""
    error: str | None = None


def sync_all(store: Store, tracking_uri: str | None = None, *, only_ended: bool = False) -> Iterator[Synced]:
    """Bring to MLflow what it does not have of all runs, newest first, one a step of this iterator.

    A run that fails is told of, and the next one is tried. Runs that MLflow has are passed over, and with `only_ended`
    those that go on: also on another machine, their own process is at it.
    """
    uri = tracking_uri or default_tracking_uri(store.root)
    for run_id in run_ids(store):
        synced = _sync_older(store, run_id, uri, only_ended)
        if synced is not None:
            yield synced


def _sync_older(store: Store, run_id: str, uri: str, only_ended: bool) -> Synced | None:
    """Bring one run to MLflow; None if there is nothing to do."""
    from ropewalk.infra.tracking.tracker import Tracker

    with locked(_lock(store, run_id), wait=False) as is_ours:
        try:
            tracker = Tracker(store, run_id, uri)
            if tracker.has_all() or (only_ended and (tracker.is_under_way() or not is_ours)):
                return None
            if is_ours:
                tracker.catch_up()
        except UserError as error:
            return Synced(run_id, "failed", str(error))
        except (KeyError, TypeError) as error:
            # Written by another version: what is read here is missing, or of another kind.
            return Synced(run_id, "failed", f"its record has an event that is not understood: {error!r}")
    return Synced(run_id, "written" if is_ours else "busy")


def _follow(tracker: Tracker, store: Store, uri: str) -> None:
    older = sync_all(store, uri, only_ended=True)
    tracker.follow(lambda: _one(older))
    deadline = time.monotonic() + OLDER_SECONDS
    while time.monotonic() < deadline and _one(older):
        pass


def _one(runs: Iterator[Synced]) -> bool:
    """Bring one more run to MLflow; False if there is none."""
    from ropewalk.infra.tracking.tracker import say

    synced = next(runs, None)
    if synced and synced.error:
        say(f"run {synced.run_id}: {synced.error}")
    return synced is not None


def _lock(store: Store, run_id: str) -> Path:
    return store.root / "runs" / run_id / "mlflow.lock"


def main(arguments: list[str] | None = None) -> int:
    """The child process: `python -m ropewalk.infra.tracking.sync STORE [RUN_ID [--follow]]`."""
    from ropewalk.infra.tracking.tracker import say

    parser = argparse.ArgumentParser(prog="ropewalk.infra.tracking.sync", description="Bring runs' records to MLflow.")
    parser.add_argument("store")
    parser.add_argument("run_id", nargs="?", help="default: all runs")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    asked = parser.parse_args(arguments)
    store = Store(asked.store)
    try:
        if asked.run_id is not None:
            sync(store, asked.run_id, follow=asked.follow)
            return 0
        runs = sync_all(store, only_ended=True)
        while _one(runs):
            pass
    except UserError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    os.nice(NICENESS)
    sys.exit(main())
