"""Stops what has to be stopped: the whole run when somebody asks for it, an attempt that takes too long or stalls.

It has a thread of its own, because the driver's may be busy: an executor may run a stage in it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ropewalk.infra.executor import Executor
from ropewalk.infra.lease import grace_seconds
from ropewalk.infra.objects import Objects

TICK_SECONDS = 0.25
ASK_STORE_SECONDS = 1.0

SAVE_AND_STOP, AT_ONCE = 1, 2
SIGNS_OF_WORK = {"running", "workers_started", "metrics", "progress"}


@dataclass(frozen=True)
class Verdict:
    """Why an attempt was stopped."""

    text: str
    is_worth_another_try: bool


@dataclass
class _Watched:
    """An attempt under way. Only what it does counts, not how long it waits for its turn or for its workers."""

    attempt: str
    timeout_seconds: float | None
    stall_seconds: float | None
    worked: float = 0.0
    """Seconds that it was at work before `since`."""
    since: float | None = None
    """Since when it is at work; None while it waits."""
    heard: float = 0.0
    verdict: Verdict | None = None
    kill_at: float | None = None

    def at_work(self, now: float) -> None:
        """It has given a sign of work."""
        self.heard = now
        self.since = now if self.since is None else self.since

    def waits(self, now: float) -> None:
        """It waits for room: its clocks stand still until the next sign of work."""
        if self.since is not None:
            self.worked, self.since = self.worked + now - self.since, None

    def judge(self, now: float) -> Verdict | None:
        """What is wrong with it; None if nothing is."""
        if self.since is None:
            return None
        if self.timeout_seconds is not None and self.worked + now - self.since > self.timeout_seconds:
            # Another attempt would take as long.
            return Verdict(f"timeout: it took longer than {self.timeout_seconds:g} s", False)
        if self.stall_seconds is not None and now - self.heard > self.stall_seconds:
            return Verdict(f"stalled: it reported nothing for {self.stall_seconds:g} s", True)
        return None


class Watchdog:
    """Watches one run. Use it as a context manager around the run's loop."""

    def __init__(
        self,
        executor: Executor,
        objects: Objects,
        run_id: str,
        clock: Callable[[], float],
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self.enabled = False
        """Set once the executor has started: only then it can be told to stop."""
        self._executor = executor
        self._objects = objects
        self._cancel_name = f"runs/{run_id}/cancel"
        self._clock = clock
        self._on_event = on_event
        self._watched: dict[str, _Watched] = {}
        self._asked = 0
        self._told = 0
        self._kill_at: float | None = None
        self._ask_store_at = 0.0
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join()

    @property
    def cancelled(self) -> bool:
        """Whether the run is to stop."""
        return self._asked > 0

    def ask(self, level: int) -> None:
        """Ask the run to save and stop, or to stop at once."""
        self._asked = max(self._asked, level)
        self._wake.set()

    @contextlib.contextmanager
    def signals(self, num_running: Callable[[], int]) -> Iterator[None]:
        """The first Ctrl-C, SIGTERM or SIGHUP asks running steps to save and stop, the second stops them at once.

        Where nothing runs, the first one ends the run by KeyboardInterrupt; should stopping hang, the third one does.
        """
        count = 0

        def stop(number: int, frame: Any) -> None:
            nonlocal count
            count += 1
            self.ask(SAVE_AND_STOP if count == 1 else AT_ONCE)
            if count > 2 or not num_running():
                raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # The end of the terminal counts as well, unless the user has asked for the opposite (nohup).
        hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
        saved = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, *hangup)}
        try:
            yield
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)

    def begin(self, step: str, attempt: str, timeout_seconds: float | None, stall_seconds: float | None) -> None:
        """Watch an attempt at a step."""
        self._watched[step] = _Watched(attempt, timeout_seconds, stall_seconds)

    def heard(self, step: str, kind: str) -> None:
        """A step has reported an event of this kind."""
        watched = self._watched.get(step)
        if watched is not None and kind in SIGNS_OF_WORK:
            watched.at_work(self._clock())
        elif watched is not None and kind == "workers_queued":
            watched.waits(self._clock())

    def end(self, step: str) -> Verdict | None:
        """Watch an attempt no more; returns why it was stopped, None if it was not."""
        watched = self._watched.pop(step, None)
        return watched.verdict if watched else None

    def tick(self) -> None:
        """Look once."""
        now = self._clock()
        if now >= self._ask_store_at:
            self._ask_store_at = now + ASK_STORE_SECONDS
            self.ask(self._level_in_store())
        if not self.enabled:
            return
        self._stop_run(now)
        for step, watched in list(self._watched.items()):
            self._stop_attempt(step, watched, now)

    def _stop_run(self, now: float) -> None:
        if self._kill_at is not None and now >= self._kill_at:
            self._asked, self._kill_at = AT_ONCE, None
        if self._asked > self._told:
            self._told = self._asked
            self._on_event({"type": "cancel_asked", "level": self._told})
            self._kill_at = now + grace_seconds() if self._told == SAVE_AND_STOP else None
            self._executor.cancel(now=self._told == AT_ONCE)

    def _stop_attempt(self, step: str, watched: _Watched, now: float) -> None:
        if watched.verdict is None:
            watched.verdict = verdict = watched.judge(now)
            if verdict is not None:
                watched.kill_at = now + grace_seconds()
                event = {"type": "timed_out", "step": step, "attempt": watched.attempt, "reason": verdict.text}
                self._on_event(event)
                self._executor.cancel(step)
        elif watched.kill_at is not None and now >= watched.kill_at:
            watched.kill_at = None
            self._executor.cancel(step, now=True)

    def _level_in_store(self) -> int:
        """What `ropewalk cancel` has asked for, from this machine or another."""
        try:
            asked = json.loads(self._objects.read(self._cancel_name))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError):
            return 0  # No answer, or half of one: the next look will tell.
        return AT_ONCE if asked.get("now") else SAVE_AND_STOP

    def _work(self) -> None:
        while not self._closed.is_set():
            self.tick()
            self._wake.wait(TICK_SECONDS)
            self._wake.clear()
