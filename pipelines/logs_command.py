"""What `ropewalk logs` does: prints the logs of a run, and follows them until the run ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

from ropewalk.infra import record
from ropewalk.infra.event_tail import EventTail
from ropewalk.infra.run_logs import RunLogs, print_logs
from ropewalk.infra.step import UserError, unknown
from ropewalk.infra.store import Store

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 6.0
"""In an object store the last lines of a log may arrive after the end of the run."""
JOB_POLL_SECONDS = 10.0
"""How often a cluster is asked about a run whose driver is on another machine."""


def show_logs(
    store_uri: str, run_id: str, step: str | None, *, attempt: int | None, follow: bool, as_json: bool
) -> int:
    """Print the logs of a run; with `follow`, go on until the run has ended."""
    from ropewalk.pipelines.commands import find_run

    store = Store(store_uri)
    run_id = find_run(store, run_id)
    ending = Ending(store, run_id)
    wait = ending.wait if follow else lambda: False
    logs = RunLogs(store.root / "runs" / run_id, step, attempt)
    try:
        steps = _steps(store, run_id, wait)
        if step is not None and step not in steps:
            raise UserError(f"run {run_id}: {unknown('step', step, steps)}")
        print_logs(logs, _write, wait)
    except KeyboardInterrupt:
        return 130
    if as_json:
        rows = [log.to_json() for log in logs.files()]
        sys.stdout.write(json.dumps({"run_id": run_id, "logs": rows}, ensure_ascii=False) + "\n")
    return 0


class Ending:
    """Finds out when nobody writes the logs of a run any more."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._events = EventTail(store.root / "runs" / run_id / "events.jsonl")
        self._ask_again = 0.0
        self._waited = False

    def wait(self) -> bool:
        """Wait a moment; False once the run has ended, in whatever way."""
        if self.over():
            if not self._store.is_local and not self._waited:
                self._waited = True
                time.sleep(LAST_WORDS_SECONDS)
                self._store.pull_runs()
            return False
        time.sleep(POLL_SECONDS)
        return True

    def over(self) -> bool:
        """Whether the run has ended, its driver is gone, or its job is over."""
        if self._events.has_ended():
            return True
        state = record.driver_state(record.read_run(self._store, self._run_id))
        return state == "dead" or (state == "elsewhere" and self._job_is_over())

    def _job_is_over(self) -> bool:
        from ropewalk.infra.submit import job_end, read_job

        job = read_job(self._store, self._run_id)
        if job is None or time.monotonic() < self._ask_again:
            return False
        self._ask_again = time.monotonic() + JOB_POLL_SECONDS
        try:
            return job_end(job) is not None
        except UserError:
            # A cluster that does not answer now tells nothing about the run: its logs may still grow.
            return False


def _steps(store: Store, run_id: str, wait: Callable[[], bool]) -> list[str]:
    """Names of the run's steps; a run that has only just begun is waited for."""
    events = EventTail(store.root / "runs" / run_id / "events.jsonl")
    while (first := events.first()) is None:
        if not wait():
            return []
    return [step["name"] for step in first["steps"]]


def show_driver_log(store_uri: str, run_id: str, address: str | None, *, follow: bool, as_json: bool) -> int:
    """Print what the driver of a submitted run wrote, from its cluster; that is known by the store or given."""
    from ropewalk.infra.submit import Job, follow_job, job_log, read_job
    from ropewalk.pipelines.commands import find_run

    if address:
        job = Job(address, run_id)
    else:
        store = Store(store_uri)
        # A job that waits for its turn has no record of a run yet.
        job = read_job(store, run_id) or read_job(store, find_run(store, run_id))
    if job is None:
        raise UserError(f"run {run_id} was not submitted to a cluster; its driver wrote to the terminal it ran in")
    if follow:
        try:
            follow_job(job, _write_text)
        except KeyboardInterrupt:
            return 130
    else:
        _write_text(job_log(job))
    if as_json:
        sys.stdout.write(json.dumps({"run_id": job.submission_id, "job": job.to_json()}, ensure_ascii=False) + "\n")
    return 0


def _write(line: str) -> None:
    _write_text(line + "\n")


def _write_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
