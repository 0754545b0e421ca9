"""Runs steps as Ray tasks, and gives stages a context whose `map` and `gang` are Ray tasks and Ray Train workers."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.infra.step import Pipeline, Resources, UserError
from ropewalk.infra.task import Outcome, Report, Task, importable, output_to, run_task

CANCEL_CHECK_SECONDS = 1.0
CANCEL_GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Shipped:
    """Objects on their way to another process, unpacked there only after their modules can be imported."""

    import_paths: tuple[str, ...]
    payload: bytes

    @staticmethod
    def pack(import_paths: tuple[str, ...], *objects: Any) -> Shipped:
        """Pack objects whose classes and functions may live in the folders `import_paths`."""
        # Ray's own: it also pickles functions and classes that no other process can import.
        from ray.cloudpickle.cloudpickle import dumps

        return Shipped(import_paths, dumps(objects))

    def unpack(self) -> Any:
        """The objects, in order."""
        import pickle

        with importable(self.import_paths):
            return pickle.loads(self.payload)


class EventBus:
    """Carries what steps report to the driver, and the driver's wish to stop to the steps. A Ray actor."""

    def __init__(self) -> None:
        self._events: deque[tuple[str, dict[str, Any]]] = deque()
        self._results: dict[tuple[str, int], Any] = {}
        self._cancelled = False

    def put(self, step: str, event: dict[str, Any]) -> None:
        """Add an event of a step."""
        self._events.append((step, event))

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        """All events since the last call, in order."""
        taken, self._events = list(self._events), deque()
        return taken

    def put_result(self, gang: str, rank: int, result: Any) -> None:
        """Keep what a rank of a gang returned."""
        self._results[gang, rank] = result

    def take_results(self, gang: str, num_workers: int) -> list[Any]:
        """What the ranks of a gang returned, by rank."""
        return [self._results.pop((gang, rank)) for rank in range(num_workers)]

    def cancel(self) -> None:
        """Ask all steps to stop."""
        self._cancelled = True

    def cancelled(self) -> bool:
        """Whether steps are asked to stop."""
        return self._cancelled


class RayExecutor:
    """An executor on a Ray cluster: this machine (`address=None`) or a running one."""

    def __init__(self, pipeline: Pipeline, address: str | None = None) -> None:
        self._pipeline = pipeline
        self._address = address
        self._running: dict[Any, Task] = {}
        self._cancel_deadline: float | None = None

    def start(self) -> dict[str, Any]:
        """Connect to the cluster, or start one in this process; returns its dashboard's address."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if self._address is None:
            # Never a cluster that happens to be around. The pipeline fixes how many processes a gang has, so a
            # machine with fewer cores runs them on shared cores instead of waiting for ever.
            context = ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, 2),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            context = ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        self._check_feasible(ray.cluster_resources())
        self._bus: Any = _remote(EventBus, {"num_cpus": 0}).remote()
        url = getattr(context, "dashboard_url", None)
        return {"dashboard_url": f"http://{url}" if url else None, "pid": os.getpid()}

    def submit(self, task: Task) -> None:
        """Start a task as soon as the cluster has room. Ray never retries it behind the engine's back."""
        options = {"name": task.step, "max_retries": 0, **ray_resources(task.resources)}
        reference = _remote(_run_in_worker, options).remote(Shipped.pack(task.import_paths, task), self._bus)
        self._running[reference] = task

    def poll(self, report: Callable[[str, dict[str, Any]], None]) -> list[Outcome]:
        """Wait a moment; pass on events; return the outcomes of tasks that ended."""
        import ray

        done, _ = ray.wait(list(self._running), num_returns=1, timeout=0.2) if self._running else ([], [])
        outcomes = [self._outcome(reference) for reference in done]
        # Taken after the outcomes, so that all events of a finished step are passed on before its end.
        for step, event in ray.get(self._bus.take.remote()):
            report(step, event)
        if self._cancel_deadline is not None and time.monotonic() > self._cancel_deadline:
            for reference in self._running:
                ray.cancel(reference, force=True)
            self._cancel_deadline = None
        return outcomes

    def cancel(self) -> None:
        """Ask running steps to save and stop; kill them after a grace period, or at once when asked twice."""
        import ray

        ray.get(self._bus.cancel.remote())
        first = self._cancel_deadline is None
        self._cancel_deadline = time.monotonic() + (CANCEL_GRACE_SECONDS if first else 0)

    def stop(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        ray.shutdown()

    def _outcome(self, reference: Any) -> Outcome:
        import ray
        from ray.exceptions import RayError

        task = self._running.pop(reference)
        try:
            return ray.get(reference)
        except RayError as error:
            # The first line says what happened; some have no message at all (a process that was told to stop).
            message = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            return Outcome(task.step, task.attempt, 0.0, error=f"its process died: {message}")

    def _check_feasible(self, cluster: Mapping[str, float]) -> None:
        for step in self._pipeline:
            for what in (step.resources, step.worker_resources):
                for name, wanted in (("CPU", what.num_cpus), ("GPU", what.num_gpus)):
                    if wanted > cluster.get(name, 0):
                        have = cluster.get(name, 0)
                        raise UserError(f"step {step.name} needs {wanted:g} {name}; the cluster has {have:g}")


def ray_resources(resources: Resources) -> dict[str, Any]:
    """Resources as Ray's options name them."""
    options: dict[str, Any] = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus}
    if resources.memory_gib is not None:
        options["memory"] = int(resources.memory_gib * 2**30)
    return options


def _remote(function: Any, options: Mapping[str, Any]) -> Any:
    """A function or class as Ray's, with options."""
    import ray

    return ray.remote(**options)(function)


def _run_in_worker(shipped: Shipped, bus: Any) -> Outcome:
    (task,) = shipped.unpack()
    with output_to(task.log_path):
        return run_task(task, partial(_make_context, bus), lambda event: bus.put.remote(task.step, event))


def _make_context(bus: Any, task: Task, work: Path, report: Report) -> RayContext:
    return RayContext(work, report, bus, task)


@dataclass
class CancelSignal:
    """Asks the bus whether to stop, at most once a second."""

    bus: Any
    _next: float = 0.0
    _state: bool = False

    def __call__(self) -> bool:
        """Whether the run was cancelled."""
        import ray

        if not self._state and time.monotonic() >= self._next:
            self._state = ray.get(self.bus.cancelled.remote())
            self._next = time.monotonic() + CANCEL_CHECK_SECONDS
        return self._state


class RayContext:
    """What a stage is given on Ray."""

    def __init__(self, work: Path, report: Report, bus: Any, task: Task) -> None:
        self.work = work
        self._report = report
        self._bus = bus
        self._task = task
        self._gangs = itertools.count()
        self.cancelled = CancelSignal(bus)

    def log(self, metrics: Mapping[str, float], *, step: int | None = None, about: str | None = None) -> None:
        """Report metrics."""
        self._report({"type": "metrics", "metrics": dict(metrics), "step": step, "about": about})

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress."""
        self._report({"type": "progress", "done": done, "total": total, "unit": unit})

    def map(self, function: Callable[..., Any], items: Iterable[Any], *, resources: Any = None) -> Iterator[Any]:
        """Apply a function to every item as Ray tasks (a class: as actors), results in item order.

        Twice as many items as fit the cluster are under way at most, so memory stays bounded.
        """
        import ray

        options = ray_resources(resources or self._task.worker_resources)
        width = max(1, int(ray.cluster_resources().get("CPU", 1) // max(options["num_cpus"], 0.01)))
        paths = self._task.import_paths
        if isinstance(function.func if isinstance(function, partial) else function, type):
            call = _actor_calls(_remote(_MapWorker, options), Shipped.pack(paths, function), width)
        else:
            remote = _remote(_map_one, {**options, "max_retries": 0})
            call = partial(remote.remote, ray.put(Shipped.pack(paths, function)))
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(call(item))
            if len(waiting) >= 2 * width:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())

    def gang(
        self, function: Callable[[Any, Any], Any], config: Any, *, num_workers: int, resources: Any = None
    ) -> list[Any]:
        """Run `function(config, worker)` on `num_workers` Ray Train workers; results by rank."""
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        wanted: Resources = resources or self._task.worker_resources
        name = f"{self._task.attempt}-{next(self._gangs)}"
        use_gpu = wanted.num_gpus > 0
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={
                "shipped": Shipped.pack(self._task.import_paths, function, config, self._task),
                "bus": self._bus,
                "gang": name,
            },
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": wanted.num_cpus, **({"GPU": wanted.num_gpus} if use_gpu else {})},
            ),
            # Stages keep checkpoints of their own in `work`; Ray Train's retries are off so that the engine counts.
            run_config=RunConfig(
                name=name,
                storage_path=str(self.work / "ray_train"),
                failure_config=FailureConfig(max_failures=0),
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        )
        trainer.fit()
        return ray.get(self._bus.take_results.remote(name, num_workers))


class RayWorker:
    """A rank of a gang on Ray Train."""

    def __init__(self, rank: int, world_size: int, bus: Any, step: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._bus = bus
        self._step = step
        self.cancelled = CancelSignal(bus)

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Report metrics; only rank 0's are kept."""
        if self.rank == 0:
            event = {"type": "metrics", "metrics": dict(metrics), "step": step, "about": None}
            self._bus.put.remote(self._step, event)

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress; only rank 0's is shown."""
        if self.rank == 0:
            self._bus.put.remote(self._step, {"type": "progress", "done": done, "total": total, "unit": unit})


def _train_loop(settings: dict[str, Any]) -> None:
    import ray
    from ray import train

    function, config, task = settings["shipped"].unpack()
    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    worker = RayWorker(rank, world_size, settings["bus"], task.step)
    with output_to(str(Path(task.log_path).with_suffix(f".rank{rank}.log"))):
        result = function(config, worker)
    ray.get(settings["bus"].put_result.remote(settings["gang"], rank, result))


def _map_one(shipped: Shipped, item: Any) -> Any:
    (function,) = shipped.unpack()
    return function(item)


class _MapWorker:
    """Builds a class once and calls the instance for every item."""

    def __init__(self, shipped: Shipped) -> None:
        (build,) = shipped.unpack()
        self._call = build()

    def call(self, item: Any) -> Any:
        """Apply the instance to one item."""
        return self._call(item)


def _actor_calls(actor: Any, shipped: Shipped, width: int) -> Callable[[Any], Any]:
    """Hands items round to `width` actors, made when first needed."""
    actors: list[Any] = []
    turn = itertools.count()

    def call(item: Any) -> Any:
        number = next(turn) % width
        if number == len(actors):
            actors.append(actor.remote(shipped))
        return actors[number].call.remote(item)

    return call
