"""How a run and its steps ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ropewalk.infra.store import Commit

StepStatus = Literal["ran", "reused", "failed", "skipped"]


@dataclass
class StepResult:
    """How a step ended in this run."""

    name: str
    status: StepStatus
    key: str | None = None
    commit: Commit | None = None
    seconds: float = 0.0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As `run --json` shows it."""
        return {
            "name": self.name,
            "status": self.status,
            "key": self.key,
            "output": self.commit.output if self.commit else None,
            "seconds": round(self.seconds, 3),
            "reason": self.reason,
        }


@dataclass
class RunResult:
    """How a run ended."""

    run_id: str
    pipeline: str
    status: Literal["succeeded", "failed", "cancelled"]
    steps: list[StepResult]
