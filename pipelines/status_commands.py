"""What `status` and `show` do: tell how runs stand, and what came out of their steps."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ropewalk.infra.step import UserError, unknown
from ropewalk.pipelines import records
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.output import PLAIN, console_on, emit

WATCH_SECONDS = 2.0
STYLES = {"ran": "green", "reused": "green", "failed": "red"}


def show_status(store_uri: str, as_json: bool) -> int:
    """List the runs of a store."""
    store = open_store(store_uri)
    rows = records.rows(store)
    for row in rows:
        if "error" in row:
            sys.stderr.write(f"ropewalk: {row['error']}\n")
    if as_json:
        emit({"store": store.uri, "runs": rows})
    elif rows:
        console_on().print(status_table(rows))
    else:
        console_on().print(f"no runs in {store.uri}", **PLAIN)
    return 0


def watch_status(store_uri: str, as_json: bool) -> int:
    """Show the runs of a store, newest first, until Ctrl-C; with `as_json`, end with how they stood last."""
    store = open_store(store_uri)
    console = console_on(sys.stderr if as_json else sys.stdout)
    rows: list[dict[str, Any]] = []
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                rows = records.rows(store)
                shown = status_table(rows[: max(console.height - 4, 1)])
                when = Text(f"{store.uri} · {time.strftime('%H:%M:%S')} · Ctrl-C ends this", style="dim")
                live.update(Group(shown, when), refresh=True)
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        if as_json:
            emit({"store": store.uri, "runs": rows})
        return 0


def status_table(rows: list[dict[str, Any]]) -> Table:
    """The runs as a table."""
    table = Table("run", "pipeline", "status", "ran", "reused", "failed", "now running", box=None, pad_edge=False)
    for row in rows:
        counts = [str(row["steps"].get(kind, 0)) for kind in ("ran", "reused", "failed")]
        table.add_row(row["run_id"], Text(row["pipeline"]), row["status"], *counts, ", ".join(row["running"]))
    return table


def show_run(store_uri: str, run_id: str, step: str | None, as_json: bool) -> int:
    """Show a run or one of its steps."""
    store = open_store(store_uri)
    view = records.view(store, records.find_run(store, run_id))
    if step is not None and step not in view.steps:
        raise UserError(f"run {view.run_id}: {unknown('step', step, list(view.steps))}")
    if step is not None:
        document = {"run_id": view.run_id, **view.steps[step]}
    else:
        document = {"run": {**view.description, **view.row()}, "steps": list(view.steps.values())}
    if as_json:
        emit(document)
    elif step is not None:
        console_on().print_json(data=document)
    else:
        _show(view)
    return 0


def _show(view: records.RunView) -> None:
    console = console_on()
    console.print(f"run {view.run_id} · {view.description['pipeline']} · {view.status}", **PLAIN)
    table = Table("step", "status", "seconds", "output digest", "why", box=None, pad_edge=False)
    for name, step in view.steps.items():
        digest = str((step.get("output") or {}).get("digest", ""))[:12]
        status = Text(step["status"], STYLES.get(step["status"], ""))
        seconds = f"{step['seconds']:.1f}" if "seconds" in step else ""
        table.add_row(name, status, seconds, digest, Text(step.get("error") or step.get("reason", "")))
    console.print(table)
    console.print(f"ropewalk show {view.run_id} STEP tells where a step's output and log are", **PLAIN)
