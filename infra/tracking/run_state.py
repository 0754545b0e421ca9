"""What the events of a run say so far: its steps, what they were given, how often they were tried, how they ended.

Knows neither MLflow nor the store: events go in one after another, from the first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Event = Mapping[str, Any]
Shown = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Ending:
    """How a step, or the run, ended."""

    status: str
    """In our words."""
    shown: Shown
    """In MLflow's."""
    seconds: float
    """When, since the epoch."""
    why: str | None = None


RUN_ENDINGS: dict[str, Shown] = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


def ending_of(event: Event) -> Ending | None:
    """The ending that an event tells of; None if it tells of none."""
    kind, when = event["type"], event["time"]
    if kind == "step_reused":
        return Ending("reused", "FINISHED", when)
    if kind == "step_succeeded":
        return Ending("succeeded", "FINISHED", when)
    if kind == "step_failed" and event.get("kind") == "cancelled":
        return Ending("cancelled", "KILLED", when, event["error"])
    if kind == "step_failed":
        return Ending("failed", "FAILED", when)
    if kind == "run_finished":
        return Ending(event["status"], RUN_ENDINGS[event["status"]], when)
    return None


@dataclass
class RunState:
    """The run as its events tell it. `learn` takes them in order, each once."""

    run: Event = field(default_factory=dict)
    """The event `run_started`."""
    steps: dict[str, Event] = field(default_factory=dict)
    """What each step was to be, by name."""
    inputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """What each step was given: `{"uri", "digest", "step"}` by slot."""
    attempts: Counter[str] = field(default_factory=Counter)
    """How many attempts at each step began."""
    last_metric_step: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    endings: dict[str, Ending] = field(default_factory=dict)
    """How each step ended that did."""
    ending: Ending | None = None
    """How the run ended."""
    last_seconds: float = 0.0
    """When the last event happened."""

    def learn(self, event: Event) -> None:
        """Take in the next event. Those of a later version that are unknown here change nothing."""
        kind, step = event["type"], event.get("step", "")
        self.last_seconds = event["time"]
        if kind == "run_started":
            self.run = event
            self.steps = {spec["name"]: spec for spec in event["steps"]}
        if kind in ("step_started", "step_reused"):
            self.inputs[step] = event["inputs"]
        if kind == "step_started":
            self.attempts[step] += 1
            self.endings.pop(step, None)
        if kind == "metrics" and event["metric_step"] is not None:
            self.last_metric_step[step] = max(self.last_metric_step[step], event["metric_step"])
        ending = ending_of(event)
        if kind == "run_finished":
            self._end_all(ending, f"the run {event['status']} before the step did")
        elif ending is not None:
            self.endings[step] = ending

    def abandon(self, why: str) -> None:
        """End what is still open: no process is left that could finish it."""
        if self.ending is None:
            self._end_all(Ending("killed", "KILLED", self.last_seconds, why), why)

    def _end_all(self, ending: Ending | None, why: str) -> None:
        self.ending = ending
        for step in self.inputs.keys() - self.endings.keys():
            self.endings[step] = Ending("killed", "KILLED", self.last_seconds, why)
