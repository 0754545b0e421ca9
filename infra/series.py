"""What the record keeps of what running steps report: each point of a curve once, and how fast the work goes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SERIES_SECONDS = 5.0
"""The least time between two points of a throughput series."""

Event = dict[str, Any]


@dataclass
class Series:
    """The series of one step over its attempts. Give it all reports, and `begin` each attempt."""

    clock: Callable[[], float] = time.monotonic
    _recorded: dict[tuple[str | None, str], int] = field(default_factory=dict)
    """Last step of each metric, by what it is about and its name."""
    _floor: dict[tuple[str | None, str], int] = field(default_factory=dict)
    """The same when this attempt began: up to there an earlier one has reported."""
    _progress: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Time and units done at the last point of throughput, or at this attempt's first report, by unit."""

    def begin(self) -> None:
        """A new attempt begins. It may report anew what an earlier one did before it failed."""
        self._floor = dict(self._recorded)
        self._progress = {}

    def to_record(self, event: Event) -> list[Event]:
        """What a report adds to the record."""
        if event["type"] == "progress":
            point = self.throughput(event)
            return [] if point is None else self.to_record(point)
        if event["type"] != "metrics":
            return [event]
        new = self.new_points(event)
        return [] if new is None else [{**new, "metric_step": new["step"]}]

    def new_points(self, event: Event) -> Event | None:
        """A `metrics` event without the points that an earlier attempt has reported; None if none is left."""
        step, about = event["step"], event["about"]
        if step is None:
            return event
        names = [name for name in event["metrics"] if step > self._floor.get((about, name), step - 1)]
        for name in names:
            self._recorded[about, name] = max(step, self._recorded.get((about, name), step))
        return {**event, "metrics": {name: event["metrics"][name] for name in names}} if names else None

    def throughput(self, event: Event) -> Event | None:
        """The metric `progress/<unit>_per_second`, by units done, if a report of progress makes one due."""
        now, done, unit = self.clock(), event["done"], event["unit"]
        before, had = self._progress.setdefault(unit, (now, done))
        if now - before < SERIES_SECONDS or done <= had:
            return None
        self._progress[unit] = (now, done)
        name = f"progress/{re.sub(r'[^0-9A-Za-z]+', '_', unit)}_per_second"
        return {"type": "metrics", "metrics": {name: (done - had) / (now - before)}, "step": done, "about": None}
