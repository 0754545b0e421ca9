"""What a stage reports, in its log too: a line now and then, so that `ropewalk logs -f` shows how a step goes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

INTERVAL_SECONDS = 10.0
"""The least time between two lines of a kind."""
MAX_METRICS = 6
STDOUT = 1
"""Which is the log while a stage runs, whatever `sys.stdout` is."""
Report = Callable[[dict[str, Any]], None]


def told(report: Report, clock: Callable[[], float] = time.monotonic) -> Report:
    """The same report, of which standard output shows progress and metrics: the first, the last of progress, and some.

    A log that cannot be written is no reason for a stage to fail.
    """
    told_at: dict[Any, float] = {}

    def report_and_tell(event: dict[str, Any]) -> None:
        report(event)
        kind = event["type"], tuple(event.get("metrics", ()))
        is_due = clock() - told_at.get(kind, float("-inf")) >= INTERVAL_SECONDS
        line = _line(event) if is_due or event.get("done", 0) == event.get("total") else None
        if line is not None:
            told_at[kind] = clock()
            with contextlib.suppress(OSError):
                os.write(STDOUT, f"{time.strftime('%H:%M:%S')} {line}\n".encode())

    return report_and_tell


def _line(event: Mapping[str, Any]) -> str | None:
    if event["type"] == "progress":
        return f"{event['done']:,} of {event['total']:,} {event['unit']}"
    if event["type"] == "metrics":
        shown = first_metrics(event["metrics"], MAX_METRICS)
        return shown if event["step"] is None else f"step {event['step']}: {shown}"
    return None


def first_metrics(metrics: Mapping[str, float], num_metrics: int) -> str:
    """The few metrics that were reported first, in words: stages report the main ones first."""
    return ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:num_metrics])
