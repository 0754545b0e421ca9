"""What the commands do that steer runs: asking for one again, stopping one, watching them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ropewalk.infra import record
from ropewalk.infra.plan import Selection
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.pipelines.commands import find_run, status_rows, status_table

WATCH_SECONDS = 2.0


def rerun_request(
    store_uri: str, run_id: str, step: str | None, *, failed: bool, start: str | None
) -> tuple[Mapping[str, Any], Selection]:
    """What to ask for to have an earlier run again, or the part of it that the user names."""
    store = Store(store_uri)
    run_id = find_run(store, run_id)
    request = record.read_run(store, run_id)["request"]
    if sum((step is not None, failed, start is not None)) > 1:
        raise UserError("rerun takes one of STEP, --failed and --from; leave the others out")
    if step is not None:
        return request, Selection(force=(step,))
    if start is not None:
        return request, Selection(start=(start,), force=(start,))
    if failed:
        return request, Selection(until=_failed_steps(store, run_id))
    asked = request.get("selection", {})
    return request, Selection(**{key: tuple(v) if isinstance(v, list) else v for key, v in asked.items()})


def _failed_steps(store: Store, run_id: str) -> tuple[str, ...]:
    events = record.read_events(store, run_id)
    names = tuple(dict.fromkeys(event["step"] for event in events if event["type"] == "step_failed"))
    if not names:
        raise UserError(f"no step of run {run_id} failed; `ropewalk rerun {run_id}` asks for all of it again")
    return names


def cancel_run(store_uri: str, run_id: str, *, now: bool, as_json: bool) -> int:
    """Ask a run to stop: by a note in the store, and by a signal if its driver is on this machine."""
    store = Store(store_uri)
    run_id = find_run(store, run_id)
    for event in record.read_events(store, run_id):
        if event["type"] == "run_finished":
            raise UserError(f"run {run_id} has ended ({event['status']}); there is nothing to cancel")
    run = record.read_run(store, run_id)
    driver = record.driver_state(run)
    if driver == "dead":
        raise UserError(f"run {run_id} was killed; there is nothing to cancel")
    store.objects.write(f"runs/{run_id}/cancel", json.dumps({"now": now, "asked_at": time.time()}).encode())
    if driver == "alive":
        os.kill(run["pid"], signal.SIGTERM)
    if as_json:
        sys.stdout.write(json.dumps({"run_id": run_id, "now": now, "driver": driver}) + "\n")
    else:
        how = "stops at once" if now else "lets its steps save, then stops"
        Console().print(f"asked: run {run_id} {how}", highlight=False)
    return 0


def watch_status(store_uri: str) -> int:
    """Show the runs of a store, newest first, until Ctrl-C."""
    store = Store(store_uri)
    console = Console()
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                rows = status_rows(store)[: max(console.height - 4, 1)]
                when = Text(f"{store.uri} · {time.strftime('%H:%M:%S')} · Ctrl-C ends this", style="dim")
                live.update(Group(status_table(rows), when), refresh=True)
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0
