"""Runs steps in this process, one after another: for tests, debugging and small graphs without Ray."""

from __future__ import annotations

from collections import deque
from typing import Any

from ropewalk.infra.task import MakeContext, Outcome, Task, output_to, run_task


class LocalExecutor:
    """An executor that does one task at a time, when it is polled.

    `make_context` builds what stages are given; the composing side brings it, the engine knows no stage.
    """

    def __init__(self, make_context: MakeContext) -> None:
        self._make_context = make_context
        self._waiting: deque[Task] = deque()
        self._busy = False
        self._cancelled = False

    def start(self) -> dict[str, Any]:
        """Nothing to start."""
        return {}

    def submit(self, task: Task) -> None:
        """Queue a task."""
        self._waiting.append(task)

    def poll(self, report: Any) -> list[Outcome]:
        """Run the next task; `report(step, event)` gets what it logs while it runs."""
        if not self._waiting:
            return []
        task = self._waiting.popleft()
        if self._cancelled:
            return [Outcome(task.step, task.attempt, 0.0, error="cancelled before it started")]
        self._busy = True
        try:
            with output_to(task.log_path):
                return [run_task(task, self._make_context, lambda event: report(task.step, event))]
        finally:
            self._busy = False

    def cancel(self) -> None:
        """Start nothing more and interrupt the task in hand. Called from a signal handler of this very thread."""
        self._cancelled = True
        if self._busy:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Nothing to stop."""
