"""Shows a run while it goes on: a live table on a terminal, plain lines elsewhere (a file, a pipe, a cluster's log)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ropewalk.infra.told import first_metrics

PROGRESS_SECONDS = 10.0
"""Plain lines: the least time between two about the progress of one step, unless a tenth more is done."""
PROGRESS_FRACTION = 0.1
MAX_METRICS = 3
STYLES = {
    "waiting": "dim",
    "queued": "dim",
    "locked": "yellow",
    "retrying": "yellow",
    "running": "yellow",
    "ran": "green",
    "reused": "cyan",
    "failed": "bold red",
    "skipped": "dim",
}
TOLD_BESIDE_TABLE = {"attempt_failed", "timed_out", "lease_lost", "warning", "cancel_asked"}
"""Nothing of this goes by unseen, even where the table has moved on."""
Event = Mapping[str, Any]


@dataclass
class StepState:
    """What is known of one step."""

    name: str
    status: str = "waiting"
    started: float = 0.0
    seconds: float | None = None
    """How long it took, once it has ended."""
    reason: str = ""
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    first: tuple[float, float] | None = None
    """Time and `done` of the first report: a step that resumes does not begin at 0."""
    last: float = 0.0
    """Time of the last report."""
    shown: tuple[float, float] = (float("-inf"), 0.0)
    """Time and fraction of the last plain line about progress."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def begin(self, now: float) -> None:
        """Start an attempt; what an earlier one reported is forgotten."""
        self.status, self.started, self.seconds, self.first = "queued", now, None, None
        self.done, self.total, self.shown = 0.0, 0.0, (now, 0.0)

    def advance(self, event: Event, now: float) -> None:
        """Take a report of progress."""
        self.status = "running"
        self.done, self.total, self.unit = event["done"], event["total"], event["unit"]
        self.first, self.last = self.first or (now, self.done), now

    def rate(self) -> float | None:
        """Units a second since the first report; None before the second."""
        if self.first is None or self.last <= self.first[0] or self.done <= self.first[1]:
            return None
        return (self.done - self.first[1]) / (self.last - self.first[0])

    def pace(self) -> str:
        """Progress in words: counts, rate, time left."""
        text = f"{_number(self.done)}/{_number(self.total)} {self.unit}"
        rate = self.rate()
        if rate is None:
            return text
        left = duration((self.total - self.done) / rate) if self.done < self.total else ""
        return f"{text}, {_number(rate)}/s" + (f", {left} left" if left else "")


class Display:
    """Give it every event of a run. Use it as a context manager around the run.

    Args:
        steps: Names of the pipeline's steps, in order.
        console: Where to write; standard output by default. Give one on standard error if the output is JSON.
        clock: Seconds since the epoch.
    """

    def __init__(
        self, steps: Sequence[str], console: Console | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._steps = {name: StepState(name) for name in steps}
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            live = self._live = Live(console=self._console, get_renderable=self.table, refresh_per_second=4)
            live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        """Take an event of the run record, a `progress` event, or `{"type": "note", "text"}`."""
        with self._lock:
            self._learn(event)
        if event["type"] == "note":
            self._console.print(event["text"], markup=False, highlight=False, soft_wrap=True)
        elif self._live is None or event["type"] in TOLD_BESIDE_TABLE:
            line = self._line(event)
            if line:
                stamp = time.strftime("%H:%M:%S", time.localtime(self._time(event)))
                self._console.print(f"{stamp} {line}", markup=False, highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """The live view."""
        table = Table("step", "status", "progress", "", "time", "", box=None, pad_edge=False)
        with self._lock:
            for state in self._steps.values():
                table.add_row(*self._row(state))
        return table

    def _row(self, state: StepState) -> list[Any]:
        running = state.status == "running"
        bar = ProgressBar(total=1.0, completed=state.fraction, width=20) if running and state.total else ""
        seconds = self._clock() - state.started if running or state.status == "queued" else state.seconds
        shown = first_metrics(state.metrics, MAX_METRICS) if state.status in ("running", "ran") else state.reason
        return [
            Text(state.name),
            Text(state.status, style=STYLES[state.status]),
            bar,
            Text(state.pace() if running and state.total else "", style="dim"),
            Text("" if seconds is None else duration(seconds)),
            Text(shown, style="red" if state.status == "failed" else "dim", overflow="ellipsis", no_wrap=True),
        ]

    def _learn(self, event: Event) -> None:
        kind = event["type"]
        state = self._steps.get(event.get("step", ""))
        if state is None:
            return
        if kind == "step_started":
            state.begin(self._time(event))
        elif kind == "running":
            state.status, state.started = "running", self._time(event)
        elif kind == "workers_queued":
            state.status, state.reason = "queued", f"waits for room for {event['workers']}"
        elif kind == "workers_started":
            state.status = "running"
        elif kind == "progress":
            state.advance(event, self._time(event))
        elif kind == "metrics":
            state.metrics.update(event["metrics"])
        elif kind == "step_succeeded":
            state.status, state.seconds, state.reason = "ran", event["seconds"], event["reason"]
        elif kind == "step_failed":
            state.status, state.seconds, state.reason = "failed", event["seconds"], event["error"]
        elif kind in ("step_reused", "step_skipped"):
            state.status, state.reason = kind.removeprefix("step_"), event["reason"]
        elif kind == "step_waiting":
            state.status, state.reason = "locked", event["reason"]
        elif kind == "attempt_failed":
            state.status, state.seconds, state.reason = "retrying", event["seconds"], event["error"]

    def _line(self, event: Event) -> str | None:
        kind, step = event["type"], event.get("step", "")
        match kind:
            case "step_started":
                return f"{step}: started" + (f" ({event['reason']})" if event.get("reason") else "")
            case "step_reused" | "step_skipped":
                return f"{step}: {kind.removeprefix('step_')} ({event['reason']})"
            case "step_succeeded":
                shown = first_metrics(self._steps[step].metrics, MAX_METRICS) if step in self._steps else ""
                return f"{step}: done in {duration(event['seconds'])}" + (f", {shown}" if shown else "")
            case "step_failed":
                return f"{step}: failed after {duration(event['seconds'])}: {event['error']}"
            case "workers_queued":
                return f"{step}: waits for room for {event['workers']}"
            case "workers_started":
                return f"{step}: its workers have started"
            case "step_waiting":
                return f"{step}: waiting, {event['reason']}"
            case "attempt_failed":
                wait = duration(event["retry_in_seconds"])
                return f"{step}: attempt failed ({event['kind']}), the next one follows in {wait}: {event['error']}"
            case "timed_out":
                return f"{step}: asked to stop: {event['reason']}"
            case "lease_lost":
                return f"{step}: its lease is lost, another run may go on with it"
            case "warning":
                return f"{step}: warning: {event['text']}"
            case "cancel_asked":
                return "cancelling: steps save and stop" if event["level"] == 1 else "cancelling: at once"
            case "run_finished":
                return f"run {event['status']} after {duration(event['seconds'])}"
            case "progress":
                return self._progress_line(event)
        return None

    def _progress_line(self, event: Event) -> str | None:
        """A line about progress, unless one was written a moment and less than a tenth ago."""
        state = self._steps.get(event["step"])
        if state is None:
            return None
        shown_at, shown_fraction = state.shown
        now = self._time(event)
        if now - shown_at < PROGRESS_SECONDS and state.fraction - shown_fraction < PROGRESS_FRACTION - 1e-9:
            return None
        state.shown = (now, state.fraction)
        shown = first_metrics(state.metrics, MAX_METRICS)
        return f"{state.name}: {state.fraction:.0%}, {state.pace()}" + (f", {shown}" if shown else "")

    def _time(self, event: Event) -> float:
        return event["time"] if "time" in event else self._clock()


def duration(seconds: float) -> str:
    """A length of time as people write it: 2.5 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _number(value: float) -> str:
    """A count in a few characters: 999, 12.3k, 4.56M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
