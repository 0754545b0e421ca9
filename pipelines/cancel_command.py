"""What `cancel` does: asks a run to stop, wherever it goes on."""

from __future__ import annotations

import json
import os
import signal
import time

from ropewalk.infra import record
from ropewalk.infra.step import UserError
from ropewalk.infra.tracking.event_tail import EventTail
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.output import PLAIN, console_on, emit
from ropewalk.pipelines.records import find_run, has_begun


def cancel_run(store_uri: str, run_id: str, *, now: bool, as_json: bool) -> int:
    """Ask a run to stop: by a note in the store, and by a signal if its driver is on this machine."""
    from ropewalk.infra.jobs.submit import read_job

    store = open_store(store_uri)
    run_id = find_run(store, run_id, submitted=True)
    if not has_begun(store, run_id):
        job = read_job(store, run_id)
        assert job is not None
        return cancel_job(run_id, job.address, now=False, as_json=as_json)
    last = EventTail(store.root / "runs" / run_id / "events.jsonl").last()
    if last is not None and last["type"] == "run_finished":
        raise UserError(f"run {run_id} has ended ({last['status']}); there is nothing to cancel")
    run = record.read_run(store, run_id)
    driver = record.driver_state(run)
    if driver == "dead":
        raise UserError(f"run {run_id} was killed; there is nothing to cancel")
    store.objects.write(f"runs/{run_id}/cancel", json.dumps({"now": now, "asked_at": time.time()}).encode())
    if driver == "alive":
        os.kill(run["pid"], signal.SIGTERM)
    _tell(run_id, now, {"driver": driver}, as_json)
    return 0


def cancel_job(run_id: str, address: str, *, now: bool, as_json: bool) -> int:
    """Stop a submitted run through its cluster: before it has begun, or when its store cannot be reached."""
    from ropewalk.infra.jobs.submit import Job, stop_job

    if now:
        raise UserError("--now needs the store: through its cluster a run is always asked to save first; leave it out")
    if not stop_job(Job(address, run_id)):
        raise UserError(f"the job of run {run_id} has ended; there is nothing to cancel")
    _tell(run_id, now, {"address": address}, as_json)
    return 0


def _tell(run_id: str, now: bool, facts: dict[str, str], as_json: bool) -> None:
    if as_json:
        emit({"run_id": run_id, "now": now, **facts})
    else:
        how = "stops at once" if now else "lets its steps save, then stops"
        console_on().print(f"asked: run {run_id} {how}", **PLAIN)
