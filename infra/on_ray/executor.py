"""Runs steps as Ray tasks, on this machine or on a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ropewalk.infra.failures import classify
from ropewalk.infra.lease import grace_seconds
from ropewalk.infra.on_ray.bus import Channel, EventBus, Inbox, Message, Orders, attempt_of, put_on
from ropewalk.infra.on_ray.context import RayContext
from ropewalk.infra.on_ray.errors import died
from ropewalk.infra.on_ray.resources import draining_nodes, ray_options, require_room
from ropewalk.infra.on_ray.shipping import Shipped, remote
from ropewalk.infra.step import Step
from ropewalk.infra.task import Outcome, Task, run_logged, sentence

BUS_PATIENCE_SECONDS = 10.0
DRAIN_LOOK_SECONDS = 1.0

OnReport = Callable[[str, dict[str, Any]], None]


@dataclass
class _Running:
    """A task that Ray has."""

    task: Task
    nodes: set[str] = field(default_factory=set)
    """Ray's ids of the nodes that it and its workers run on, as they start."""
    is_queued: bool = False
    """Whether it waits for room for its workers."""
    kill_at: float | None = None
    """When it is killed, if it was asked to stop and has not."""
    killed: bool = False

    def learn(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Take in an event; returns what is to be reported. Of the workers that start only the first matters."""
        kind = event["type"]
        if kind in ("running", "worker_started"):
            self.nodes.add(event["node"])
        if kind == "worker_started":
            shown = [{"type": "workers_started"}] if self.is_queued else []
            self.is_queued = False
            return shown
        self.is_queued = self.is_queued or kind == "workers_queued"
        return [event]


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handling of SIGTERM, which Ray replaces by an exit on the spot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@dataclass
class RayExecutor:
    """An executor on a Ray cluster: this machine (`address=None`) or a running one.

    `steps` are those that may run: `start` refuses what the cluster cannot hold, `wait_seconds` later.
    """

    steps: Iterable[Step]
    address: str | None = None
    wait_seconds: float = 0.0
    _running: dict[Any, _Running] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)
    """Attempts that ended without saying so: parts of them may still be at work somewhere."""
    _inbox: Inbox = field(default_factory=Inbox)
    _drained: set[str] = field(default_factory=set)
    """Nodes that were, at some time, about to be taken away."""
    _drains_seen_at: float = float("-inf")

    def start(self) -> dict[str, Any]:
        """Connect to the cluster, or start one in this process; returns its dashboard's address."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here: dict[str, Any] = {"address": self.address}
        if self.address is None:
            # Never a cluster that happens to be around. The pipeline fixes how many processes a gang has, so a
            # machine with fewer cores runs them on shared cores instead of waiting for ever.
            here = {"address": "local", "num_cpus": max(os.cpu_count() or 1, 2)}
            here |= {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        with _own_sigterm():
            context = ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
        try:
            self._check_room()
        except BaseException:
            self.stop()
            raise
        beside_driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": beside_driver}
        self._bus: Any = remote(EventBus, options).remote()
        url = getattr(context, "dashboard_url", None)
        return {"dashboard_url": f"http://{url}" if url else None, "pid": os.getpid()}

    def _check_room(self) -> None:
        for step in self.steps:
            require_room(f"step {step.name}", step.resources, 1, self.wait_seconds)
            gang_size = getattr(step.stage, "gang_size", lambda config: 1)(step.config)
            require_room(f"step {step.name}", step.worker_resources, gang_size, self.wait_seconds)

    def submit(self, task: Task) -> None:
        """Start a task as soon as the cluster has room. Ray never retries it behind the engine's back."""
        options = {"name": task.step, "max_retries": 0, **ray_options(task.resources)}
        shipped = Shipped.pack(task.import_paths, task)
        reference = remote(_run_in_worker, options).remote(shipped, self._bus, self.wait_seconds)
        self._running[reference] = _Running(task)

    def poll(self, report: OnReport) -> list[Outcome]:
        """Wait a moment; pass on events; return the outcomes of tasks that ended."""
        import ray

        done, _ = ray.wait(list(self._running), num_returns=1, timeout=0.2) if self._running else ([], [])
        # The results bring what the bus has not delivered, so all events of a step are passed on before its end.
        outcomes = [self._outcome(reference, report) for reference in done]
        self._exchange(report)
        self._look_for_drains()
        for reference, running in self._running.items():
            if running.kill_at is not None and time.monotonic() >= running.kill_at and not running.killed:
                running.killed = True
                ray.cancel(reference, force=True)
        return outcomes

    def cancel(self, step: str | None = None, *, now: bool = False) -> None:
        """Ask a step, or all, to save and stop; they are killed after a grace period, or at once with `now`."""
        for running in list(self._running.values()):  # A copy: it may be called from another thread.
            if step in (None, running.task.step):
                kill_at = time.monotonic() + (0.0 if now else grace_seconds())
                running.kill_at = min(kill_at, running.kill_at or kill_at)

    def stop(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        ray.shutdown()

    def _exchange(self, report: OnReport) -> None:
        import ray
        from ray.exceptions import RayError

        attempts = {running.task.attempt: running for running in self._running.values()}
        stop = {name for name, running in attempts.items() if running.kill_at is not None}
        orders = Orders(frozenset(stop), frozenset(self._ended))
        try:
            asked = self._bus.exchange.remote(self._inbox.confirmed, orders)
            boxes: dict[str, list[Message]] = ray.get(asked, timeout=BUS_PATIENCE_SECONDS)
        except RayError:
            return  # The bus is starting anew; what it held is sent again.
        for sender, messages in boxes.items():
            running = attempts.get(attempt_of(sender))
            if running is not None:
                self._deliver(running, {sender: messages}, report)

    def _deliver(self, running: _Running, messages: Mapping[str, list[Message]], report: OnReport) -> None:
        for sender, numbered in messages.items():
            for event in self._inbox.accept(sender, numbered):
                for shown in running.learn(event):
                    report(running.task.step, shown)

    def _outcome(self, reference: Any, report: OnReport) -> Outcome:
        import ray
        from ray.exceptions import RayError

        running = self._running.pop(reference)
        task = running.task
        self._look_for_drains(at_once=True)
        try:
            outcome, kept = ray.get(reference)
        except RayError as error:
            self._ended.add(task.attempt)
            outcome = _lost(running, error)
        else:
            self._deliver(running, kept, report)
        self._inbox.forget(task.attempt)
        # Ray itself tells a preemption only if the node was lost after its deadline.
        is_preempted = outcome.kind == "infrastructure" and running.nodes & self._drained
        return replace(outcome, kind="preempted") if is_preempted else outcome

    def _look_for_drains(self, *, at_once: bool = False) -> None:
        """Remember which nodes were about to be taken away: once they are lost, nothing tells it."""
        if at_once or time.monotonic() > self._drains_seen_at + DRAIN_LOOK_SECONDS:
            self._drained |= draining_nodes()
            self._drains_seen_at = time.monotonic()


def _lost(running: _Running, error: Exception) -> Outcome:
    """The end of a process that did not tell it itself. Ray's own account goes where the process wrote before it."""
    task = running.task
    if task.store.is_local:
        with contextlib.suppress(OSError), Path(task.log_path).open("a", encoding="utf-8") as log:
            log.write(f"{type(error).__name__}: {error}\n")
    kind = "cancelled" if running.kill_at is not None else classify(error)
    # What was raised before its stage could begin: a module that is not there, say.
    cause = getattr(error, "cause", None)
    said = f"its process could not begin: {sentence(cause)}" if cause else str(died(error, "its process"))
    return Outcome(task.step, task.attempt, 0.0, error=said, kind=kind)


def _run_in_worker(shipped: Shipped, bus: Any, wait_seconds: float) -> tuple[Outcome, dict[str, list[Message]]]:
    import ray

    (task,) = shipped.unpack()
    os.environ.update(task.settings)
    channel = Channel(put_on(bus), task.attempt)
    channel.report({"type": "running", "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()})
    outcome = run_logged(
        task,
        lambda task, work, report, stop: RayContext(task, work, report, stop, channel, bus, wait_seconds),
        channel.report,
        channel.cancelled,
        lambda: os._exit(1),
    )
    return outcome, channel.close()
