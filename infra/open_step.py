"""A step that has to run in this run and has not ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ropewalk.infra.failures import Tries
from ropewalk.infra.lease import Watch
from ropewalk.infra.plan import StepPlan
from ropewalk.infra.series import Series
from ropewalk.infra.step import Step
from ropewalk.infra.task import Outcome


@dataclass
class OpenStep:
    """What a run keeps about it."""

    step: Step
    plan: StepPlan
    key: str
    watch: Watch
    tries: Tries
    attempt: str | None = None
    """The attempt under way."""
    lost_lease: bool = False
    """Whether the attempt under way has told so: then it matters no more how it ends."""
    ended: set[str] = field(default_factory=set)
    """Attempts of this run that are over."""
    due: float = 0.0
    """When to try, or look at the lease, next."""
    waited_for: set[str] = field(default_factory=set)
    """Attempts of other runs that held the lease."""
    series: Series = field(default_factory=Series)

    def failure(self, outcome: Outcome) -> dict[str, Any]:
        """What is recorded of an attempt that failed."""
        ended = {"seconds": outcome.seconds, "kind": outcome.kind, "error": outcome.error or "failed"}
        counts = {"num_failed": self.tries.failed, "num_preempted": self.tries.preempted}
        return {"step": outcome.step, "key": self.key, "attempt": outcome.attempt, **ended, **counts}
