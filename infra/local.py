"""Runs steps in this process, one after another: for tests, debugging and small graphs without Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from ropewalk.infra.task import MakeContext, Outcome, Task, run_logged


class InterruptedByDriverError(BaseException):
    """Raised in the middle of a stage that did not end in time; no `except Exception` of a stage holds it."""


class LocalExecutor:
    """An executor that does one task at a time, when it is polled.

    `make_context` builds what stages are given; the composing side brings it, the engine knows no stage. A stage that
    does not end when asked is interrupted between two steps of the interpreter, if it runs in the main thread.
    """

    def __init__(self, make_context: MakeContext) -> None:
        self._make_context = make_context
        self._waiting: deque[Task] = deque()
        self._current: Task | None = None
        self._stopped: set[str] = set()
        """Attempts that were asked to stop."""

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
        if task.attempt in self._stopped:
            return [Outcome(task.step, task.attempt, 0.0, error="cancelled before it started", kind="cancelled")]
        report(task.step, {"type": "running", "node": None, "pid": os.getpid()})
        try:
            with self._interruptible(task):
                return [
                    run_logged(
                        task,
                        self._make_context,
                        lambda event: report(task.step, event),
                        lambda: task.attempt in self._stopped,
                        self._interrupt,
                    )
                ]
        except InterruptedByDriverError:
            return [Outcome(task.step, task.attempt, 0.0, error="interrupted", kind="cancelled")]

    def cancel(self, step: str | None = None, *, now: bool = False) -> None:
        """Ask a step, or all, to save and stop; with `now`, interrupt it. Called from another thread or a signal."""
        current = self._current
        for task in [*self._waiting, *([current] if current else [])]:
            if step in (None, task.step):
                self._stopped.add(task.attempt)
        if now and current is not None and current.attempt in self._stopped:
            self._interrupt()

    def stop(self) -> None:
        """Nothing to stop."""

    def _interrupt(self) -> None:
        """Make the main thread raise InterruptedByDriverError, even out of a system call."""
        if self._current is not None and self._handles_signal:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    @contextlib.contextmanager
    def _interruptible(self, task: Task) -> Iterator[None]:
        def handle(number: int, frame: Any) -> None:
            if self._current is not None:
                raise InterruptedByDriverError("interrupted: it did not end when it was asked to")

        self._handles_signal = threading.current_thread() is threading.main_thread()
        saved = signal.signal(signal.SIGUSR2, handle) if self._handles_signal else None
        self._current = task
        try:
            yield
        finally:
            self._current = None
            if self._handles_signal:
                signal.signal(signal.SIGUSR2, saved)
