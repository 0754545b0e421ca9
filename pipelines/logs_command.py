"""What `ropewalk logs` does: prints the logs of a run, and follows them until the run ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO

from ropewalk.infra import record
from ropewalk.infra.run_logs import RunLogs, print_logs
from ropewalk.infra.step import UserError, unknown
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.event_tail import EventTail
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.output import emit
from ropewalk.pipelines.records import find_run, has_begun

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 6.0
"""In an object store the last lines of a log may arrive after the end of the run."""
JOB_POLL_SECONDS = 10.0
"""How often a cluster is asked about a run whose driver is on another machine."""


def show_logs(
    store_uri: str, run_id: str, step: str | None, *, attempt: int | None, follow: bool, as_json: bool
) -> int:
    """Print the logs of a run; with `follow`, go on until the run has ended."""
    store = open_store(store_uri)
    run_id = find_run(store, run_id, submitted=follow)
    store.pull_runs(logs_of=run_id)
    ending = Ending(store, run_id)
    wait = ending.wait if follow else lambda: False
    logs = RunLogs(store.root / "runs" / run_id, step, attempt)
    exit_status = 0
    try:
        steps = _steps(store, run_id, wait)
        if step is not None and step not in steps:
            raise UserError(f"run {run_id}: {unknown('step', step, steps)}")
        print_logs(logs, _write, wait)
    except KeyboardInterrupt:
        exit_status = 130
    if as_json:
        emit({"run_id": run_id, "logs": [log.to_json() for log in logs.files()]})
    elif exit_status == 0:
        sys.stderr.write(_why_nothing(logs, store, run_id, step, attempt))
    return exit_status


def _why_nothing(logs: RunLogs, store: Store, run_id: str, step: str | None, attempt: int | None) -> str:
    """What to tell where nothing was printed; nothing where something was."""
    files = logs.files()
    if any(log.path.stat().st_size for log in files):
        return ""
    if files:
        show = f"ropewalk show {run_id} {step or 'STEP'} --store {store.uri}"
        return f"nothing was written to it; metrics that were reported: {show}\n"
    of = f" of step {step}" if step else ""
    return f"run {run_id} has no logs{of}{' and attempt' if attempt else ''}: it did not run\n"


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
                self._store.pull_runs(logs_of=self._run_id)
            return False
        time.sleep(POLL_SECONDS)
        self._store.pull_runs(logs_of=self._run_id)
        return True

    def over(self) -> bool:
        """Whether the run has ended, its driver is gone, or its job is over."""
        if self._events.has_ended():
            return True
        self._store.pull_runs()
        if not has_begun(self._store, self._run_id):
            return self._job_is_over()
        state = record.driver_state(record.read_run(self._store, self._run_id))
        return state == "dead" or (state == "elsewhere" and self._job_is_over())

    def _job_is_over(self) -> bool:
        from ropewalk.infra.jobs.submit import job_end, read_job

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
    from ropewalk.infra.jobs.submit import Job, follow_job, job_log, read_job

    if address:
        job = Job(address, run_id)
    else:
        store = open_store(store_uri)
        # A job that waits for its turn has no record of a run yet.
        run_id = find_run(store, run_id, submitted=True)
        job = read_job(store, run_id)
    if job is None:
        raise UserError(f"run {run_id} was not submitted to a cluster; its driver wrote to the terminal it ran in")
    exit_status, lines = 0, WholeLines(sys.stdout)
    try:
        if follow:
            follow_job(job, lines.write)
        else:
            lines.write(job_log(job))
    except KeyboardInterrupt:
        exit_status = 130
    lines.close()
    if as_json:
        emit({"run_id": job.submission_id, "job": job.to_json()})
    return exit_status


class WholeLines:
    """Passes text on as it comes; remembers the last line that was not empty, and ends one that was left open."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._open = ""
        self.last = ""

    def write(self, text: str) -> None:
        """Take the next part."""
        self._file.write(text)
        self._file.flush()
        *whole, self._open = (self._open + text).split("\n")
        self.last = next((line for line in reversed(whole) if line.strip()), self.last)

    def close(self) -> None:
        """No more will come."""
        if self._open:
            self.write("\n")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
