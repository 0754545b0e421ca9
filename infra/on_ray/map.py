"""`map` on Ray: actors that take items as they become free, and results in the order of the items."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from ropewalk.infra.on_ray.errors import died
from ropewalk.infra.on_ray.resources import in_words, places, ray_options
from ropewalk.infra.on_ray.shipping import Shipped, remote
from ropewalk.infra.step import Resources
from ropewalk.infra.task import Report, Stop

LOOK_SECONDS = 1.0
"""How often to ask whether the run was cancelled."""
CALLS_PER_WORKER = 2
"""One in work and one on its way, so that a worker never waits for its next item."""

Call = Callable[[Any], Any]
"""Sends an item to a worker; returns Ray's reference to the result."""


class OrderedMap:
    """One `map` under way.

    A worker gets items only when it is up: maps that share a full cluster go on with the workers that found room.

    Args:
        shipped: What is applied: a function, or a class that each worker builds once.
        resources: Of each worker.
        report: Takes events: that the map waits for room, and that a worker is up.
        cancelled: Whether to give up.
    """

    def __init__(self, shipped: Shipped, resources: Resources, report: Report, cancelled: Stop) -> None:
        self._shipped = shipped
        self._resources = resources
        self._report = report
        self._cancelled = cancelled
        self._actors: list[Any] = []
        self._starting: dict[Any, Call] = {}
        self._load: dict[Call, int] = {}
        """How many calls each worker that is up has."""
        self._running: dict[Any, tuple[int, Call]] = {}
        self._finished: dict[int, Any] = {}
        self._is_queued = False

    def results(self, items: Iterable[Any]) -> Iterator[Any]:
        """Results in item order.

        At most `CALLS_PER_WORKER` items a worker are taken and not yet given back, so a slow reader slows the workers.
        """
        waiting = iter(items)
        first = list(itertools.islice(waiting, max(1, places(self._resources))))
        most_ahead = CALLS_PER_WORKER * len(first)
        numbered = enumerate(itertools.chain(first, waiting))
        taken, given, exhausted = 0, 0, not first
        try:
            self._start_workers(len(first))
            while given < taken or not exhausted:
                while not exhausted and taken - given < most_ahead and (call := self._idle()):
                    exhausted = (entry := next(numbered, None)) is None
                    if entry is not None:
                        self._send(call, *entry)
                        taken += 1
                if given in self._finished:
                    yield _value(self._finished.pop(given))
                    given += 1
                elif given < taken or not exhausted:
                    self._wait()
        finally:
            self._stop_workers()

    def _start_workers(self, number: int) -> None:
        import ray

        kind = remote(_Worker, {"max_restarts": 0, "max_task_retries": 0, **ray_options(self._resources)})
        self._actors = [kind.remote() for _ in range(number)]
        shipped = ray.put(self._shipped)
        self._starting = {actor.build.remote(shipped): actor.call.remote for actor in self._actors}

    def _stop_workers(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _idle(self) -> Call | None:
        """The worker with the fewest calls, if it may have one more."""
        call = min(self._load, key=lambda worker: self._load[worker], default=None)
        return call if call is not None and self._load[call] < CALLS_PER_WORKER else None

    def _send(self, call: Call, number: int, item: Any) -> None:
        self._running[call(item)] = (number, call)
        self._load[call] += 1

    def _wait(self) -> None:
        """Wait until a call ends or a worker is up, or for a moment."""
        import ray

        if self._cancelled():
            raise CancelledError("the run was cancelled; what is finished is kept")
        done, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=LOOK_SECONDS)
        if not done and not self._load and not self._is_queued:
            self._is_queued = True
            self._report({"type": "workers_queued", "workers": in_words(self._resources, len(self._actors))})
        for reference in done:
            if reference in self._starting:
                self._report({"type": "worker_started", "node": _value(reference)})
                self._load[self._starting.pop(reference)] = 0
            else:
                number, call = self._running.pop(reference)
                self._finished[number] = reference
                self._load[call] -= 1


def _value(reference: Any) -> Any:
    """What a call returned; raises what it raised, as if it had run here."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise died(error, "a worker of map") from error


def built(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or the one instance of a class that a worker builds."""
    # Like `is_class` of the stages' context, which the engine may not import.
    is_class = isinstance(function.func if isinstance(function, partial) else function, type)
    return function() if is_class else function


class _Worker:
    """Applies one function to one item after another, or the one instance of a class that it builds."""

    def build(self, shipped: Shipped) -> str:
        """Get ready; not in the constructor, whose errors would look as if the process had died. Returns the node."""
        import ray

        (function,) = shipped.unpack()
        self._call = built(function)
        return ray.get_runtime_context().get_node_id()

    def call(self, item: Any) -> Any:
        """Apply it to one item."""
        return self._call(item)
