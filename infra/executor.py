"""Where steps run: what the runner asks of this process, of Ray, or of whatever else runs tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ropewalk.infra.task import Outcome, Task


class Executor(Protocol):
    """Where steps run."""

    def start(self) -> dict[str, Any]:
        """Get ready; returns what to tell the user (`dashboard_url`)."""
        ...

    def submit(self, task: Task) -> None:
        """Take a task; it may start at once. Its process reports an event `running` first."""
        ...

    def poll(self, report: Callable[[str, dict[str, Any]], None]) -> list[Outcome]:
        """Wait a moment; pass on events as `report(step, event)`; return the outcomes of tasks that ended."""
        ...

    def cancel(self, step: str | None = None, *, now: bool = False) -> None:
        """Ask a step, or all, to save and stop; with `now`, stop them at once. Called from another thread."""
        ...

    def stop(self) -> None:
        """Let go of all that was started."""
        ...
