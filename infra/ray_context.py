"""What stages are given on Ray: `map` as Ray tasks or actors, `gang` as Ray Train workers."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.infra.ray_bus import Channel, Message, put_on
from ropewalk.infra.ray_resources import mark_preemption, places, ray_needs, ray_options, require_room
from ropewalk.infra.step import Resources
from ropewalk.infra.task import Report, Stop, Task, importable, output_to

CANCEL_CHECK_SECONDS = 1.0
CALLS_PER_WORKER = 2
"""One in work and one on its way, so that a worker never waits for its next item."""
SECONDARY_FAILURE_SECONDS = 5.0


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


class RayContext:
    """What a stage is given on Ray."""

    def __init__(
        self, task: Task, work: Path, report: Report, stop: Stop, channel: Channel, bus: Any, wait_seconds: float
    ) -> None:
        self.work = work
        self.cancelled = stop
        self._report = report
        self._channel = channel
        self._wait_seconds = wait_seconds
        self._bus = bus
        self._task = task
        self._gangs = itertools.count()

    def log(self, metrics: Mapping[str, float], *, step: int | None = None, about: str | None = None) -> None:
        """Report metrics."""
        self._report({"type": "metrics", "metrics": dict(metrics), "step": step, "about": about})

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress."""
        self._report({"type": "progress", "done": done, "total": total, "unit": unit})

    def map(self, function: Callable[..., Any], items: Iterable[Any], *, resources: Any = None) -> Iterator[Any]:
        """Apply a function to every item as Ray tasks (a class: as actors), results in item order.

        Items are taken as workers become free, and no more than twice as many as the cluster has workers for are
        ahead of the result that is asked for: a slow reader slows the workers, and memory stays bounded. Raises what
        the function raised, Ray's error if a worker died, and CancelledError once the run is cancelled.
        """
        import ray

        wanted: Resources = resources or self._task.worker_resources
        require_room(f"step {self._task.step}", wanted, 1, self._wait_seconds, self.cancelled)
        width = max(1, places(wanted))
        shipped = ray.put(Shipped.pack(self._task.import_paths, function))
        # Like `is_class` of the stages' context, which the engine may not import.
        is_class = isinstance(function.func if isinstance(function, partial) else function, type)
        workers = (_Actors if is_class else _Tasks)(shipped, ray_options(wanted), width)
        return _OrderedMap(workers, self.cancelled).results(items, CALLS_PER_WORKER * width)

    def gang(
        self, function: Callable[[Any, Any], Any], config: Any, *, num_workers: int, resources: Any = None
    ) -> list[Any]:
        """Run `function(config, worker)` on `num_workers` Ray Train workers; results by rank.

        The workers start together or not at all: a gang waits until the cluster has room for all of it.
        """
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        wanted: Resources = resources or self._task.worker_resources
        require_room(f"step {self._task.step}", wanted, num_workers, self._wait_seconds, self.cancelled)
        name = f"{self._task.attempt}-{next(self._gangs)}"
        results = remote(_Results, {"num_cpus": 0}).remote()
        shipped = Shipped.pack(self._task.import_paths, function, config, self._task)
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"shipped": shipped, "bus": self._bus, "results": results},
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=wanted.num_gpus > 0,
                resources_per_worker={"CPU": wanted.num_cpus, **ray_needs(wanted)},
            ),
            # Stages keep checkpoints of their own in `work`, and the engine counts retries: Ray Train has none.
            run_config=RunConfig(
                name=name,
                storage_path=str(self.work / "ray_train"),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            ),
            torch_config=TorchConfig(backend="nccl" if wanted.num_gpus > 0 else "gloo"),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _first_cause(error) from error
        ranks: Any = ray.get(results.take.remote())
        for _, kept in ranks.values():
            self._channel.carry(kept)
        return [ranks[rank][0] for rank in range(num_workers)]


class RayWorker:
    """A rank of a gang on Ray Train."""

    def __init__(self, rank: int, world_size: int, channel: Channel) -> None:
        self.rank = rank
        self.world_size = world_size
        self.cancelled = channel.cancelled
        self._channel = channel

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Report metrics; only rank 0's are kept."""
        if self.rank == 0:
            self._channel.report({"type": "metrics", "metrics": dict(metrics), "step": step, "about": None})

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress; only rank 0's is shown."""
        if self.rank == 0:
            self._channel.report({"type": "progress", "done": done, "total": total, "unit": unit})


def remote(function: Any, options: Mapping[str, Any]) -> Any:
    """A function or class as Ray's, with options."""
    import ray

    return ray.remote(**options)(function)


Call = Callable[[Any], Any]


class _Tasks:
    """Workers of `map` that are Ray tasks: each call runs wherever there is room."""

    def __init__(self, shipped: Any, options: Mapping[str, Any], width: int) -> None:
        call = partial(remote(_map_one, {**options, "max_retries": 0}).remote, shipped)
        self.load: dict[Call, int] = {call: 0}
        self.most_calls = CALLS_PER_WORKER * width
        self.starting: dict[Any, Call] = {}

    def stop(self, unfinished: Iterable[Any]) -> None:
        """Cancel what is still under way."""
        import ray

        for reference in unfinished:
            ray.cancel(reference, force=True)


class _Actors:
    """Workers of `map` that are actors, with the class built once in each.

    An actor gets items only when it is up: maps that share a full cluster go on with the actors that found room.
    """

    def __init__(self, shipped: Any, options: Mapping[str, Any], width: int) -> None:
        kind = remote(_MapWorker, {**options, "max_restarts": 0, "max_task_retries": 0})
        self._actors = [kind.remote() for _ in range(width)]
        self.load: dict[Call, int] = {}
        self.most_calls = CALLS_PER_WORKER
        self.starting: dict[Any, Call] = {actor.build.remote(shipped): actor.call.remote for actor in self._actors}

    def stop(self, unfinished: Iterable[Any]) -> None:
        """Give the actors' places back."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


class _OrderedMap:
    """One `map` under way."""

    def __init__(self, workers: _Tasks | _Actors, cancelled: Callable[[], bool]) -> None:
        self._workers = workers
        self._cancelled = cancelled
        self._running: dict[Any, tuple[int, Call]] = {}
        self._finished: dict[int, Any] = {}

    def results(self, items: Iterable[Any], most_ahead: int) -> Iterator[Any]:
        """Results in item order, with at most `most_ahead` items taken and not yet given back."""
        waiting = enumerate(items)
        taken, given, exhausted = 0, 0, False
        try:
            while given < taken or not exhausted:
                while not exhausted and taken - given < most_ahead and (call := self._idle()):
                    exhausted = (entry := next(waiting, None)) is None
                    if entry is not None:
                        self._start(call, *entry)
                        taken += 1
                if given in self._finished:
                    yield _value(self._finished.pop(given))
                    given += 1
                elif given < taken or not exhausted:
                    self._wait()
        finally:
            self._workers.stop(self._running)

    def _idle(self) -> Call | None:
        """The worker with the fewest calls, if it may have one more."""
        load = self._workers.load
        call = min(load, key=lambda worker: load[worker], default=None)
        return call if call is not None and load[call] < self._workers.most_calls else None

    def _start(self, call: Call, number: int, item: Any) -> None:
        self._running[call(item)] = (number, call)
        self._workers.load[call] += 1

    def _wait(self) -> None:
        """Wait until a call ends or an actor is up, or for a moment."""
        import ray

        if self._cancelled():
            raise CancelledError("the run was cancelled; what is finished is kept")
        starting = self._workers.starting
        done, _ = ray.wait([*self._running, *starting], num_returns=1, timeout=CANCEL_CHECK_SECONDS)
        for reference in done:
            if reference in starting:
                _value(reference)
                self._workers.load[starting.pop(reference)] = 0
            else:
                number, call = self._running.pop(reference)
                self._finished[number] = reference
                self._workers.load[call] -= 1


def _value(reference: Any) -> Any:
    """What a call returned; raises what it raised, as if it had run here."""
    import ray
    from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except (NodeDiedError, WorkerCrashedError) as error:
        raise mark_preemption(error) from None


def _map_one(shipped: Shipped, item: Any) -> Any:
    (function,) = shipped.unpack()
    return function(item)


class _MapWorker:
    """Builds a class once and calls the instance for every item."""

    def build(self, shipped: Shipped) -> None:
        """Build it; not in the constructor, whose errors would look as if the process had died."""
        (build,) = shipped.unpack()
        self._call = build()

    def call(self, item: Any) -> Any:
        """Apply the instance to one item."""
        return self._call(item)


class _Results:
    """Holds what the ranks of a gang returned, with what they reported and the driver does not have yet."""

    def __init__(self) -> None:
        self._results: dict[int, tuple[Any, dict[str, list[Message]]]] = {}

    def put(self, rank: int, result: Any, kept: dict[str, list[Message]]) -> None:
        """Keep a rank's result."""
        self._results[rank] = (result, kept)

    def take(self) -> dict[int, tuple[Any, dict[str, list[Message]]]]:
        """All results, by rank."""
        return self._results


def _train_loop(settings: dict[str, Any]) -> None:
    import ray
    from ray import train

    function, config, task = settings["shipped"].unpack()
    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    channel = Channel(put_on(settings["bus"]), task.attempt)
    with contextlib.ExitStack() as stack:
        stack.callback(channel.close)
        stack.enter_context(_rank_log(task, rank))
        try:
            result = function(config, RayWorker(rank, world_size, channel))
        except (RuntimeError, OSError):
            # When a rank dies, the others fail at their next collective. The cause is to be seen first.
            if world_size > 1 and not channel.cancelled():
                time.sleep(SECONDARY_FAILURE_SECONDS)
            raise
    ray.get(settings["results"].put.remote(rank, result, channel.close()))


@contextlib.contextmanager
def _rank_log(task: Task, rank: int) -> Iterator[None]:
    """Send what this process writes to a log of its own beside the step's."""
    log = Path(task.log_path).with_suffix(f".rank{rank}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output_to(str(log)):
            yield
    finally:
        if not task.store.is_local:
            task.store.objects.write(str(Path(task.log_name).with_suffix(f".rank{rank}.log")), log.read_bytes())


def _first_cause(error: Exception) -> BaseException:
    """Of a failed gang, the failure that brought down the others: a death before an exception."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return getattr(error, "controller_failure", error)
    found = [getattr(failure, "health_check_failure", failure) for failure in failures.values()]
    deaths = [failure for failure in found if type(failure).__module__ == "ray.exceptions"]
    return (deaths or found)[0]
