"""What stages are given on Ray: `map` as Ray actors, `gang` as Ray Train workers."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ropewalk.infra.on_ray.bus import Channel, Message, put_on
from ropewalk.infra.on_ray.errors import died
from ropewalk.infra.on_ray.map import OrderedMap, built
from ropewalk.infra.on_ray.resources import in_words, ray_needs, require_room
from ropewalk.infra.on_ray.shipping import Shipped, remote
from ropewalk.infra.step import Resources, UserError
from ropewalk.infra.task import Report, Stop, Task, output_to
from ropewalk.infra.told import told

SECONDARY_FAILURE_SECONDS = 5.0


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
        """Apply a function, or a class that each worker builds once, to every item; results in item order.

        No more than twice as many items as the cluster has workers for are ahead of the result that is asked for: a
        slow reader slows the workers, and memory stays bounded. Raises what the function raised, WorkerDiedError if a
        worker died, and CancelledError once the run is cancelled.

        A single item is worked on here if a worker would need what this process has: it would take seconds to start,
        and this process would wait for it.
        """
        wanted: Resources = resources or self._task.worker_resources
        waiting = iter(items)
        first = list(itertools.islice(waiting, 2))
        if len(first) < 2 and wanted == self._task.resources:
            return map(built(function), first) if first else iter(())
        items = itertools.chain(first, waiting)
        require_room(f"step {self._task.step}", wanted, 1, self._wait_seconds, self.cancelled)
        shipped = Shipped.pack(self._task.import_paths, function)
        return OrderedMap(shipped, wanted, self._report, self.cancelled).results(items)

    def gang(
        self, function: Callable[[Any, Any], Any], config: Any, *, num_workers: int, resources: Any = None
    ) -> list[Any]:
        """Run `function(config, worker)` on `num_workers` Ray Train workers; results by rank.

        The workers start together or not at all: a gang waits until the cluster has room for all of it.
        """
        wanted: Resources = resources or self._task.worker_resources
        self._report({"type": "workers_queued", "workers": in_words(wanted, num_workers)})
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        require_room(f"step {self._task.step}", wanted, num_workers, self._wait_seconds, self.cancelled)
        name = f"{self._task.attempt}-{next(self._gangs)}"
        results = remote(_Results, {"num_cpus": 0}).remote()
        shipped = Shipped.pack(self._task.import_paths, function, config, self._task, self.work)
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
        except Exception as error:  # noqa: BLE001 - raised again as its cause
            cause = _first_cause(error)
            raise cause from cause.__cause__ or error
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
        self._report = told(channel.report)

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Report metrics; only rank 0's are kept."""
        if self.rank == 0:
            self._report({"type": "metrics", "metrics": dict(metrics), "step": step, "about": None})

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress; only rank 0's is shown."""
        if self.rank == 0:
            self._report({"type": "progress", "done": done, "total": total, "unit": unit})


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

    function, config, task, work = settings["shipped"].unpack()
    rank, world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
    channel = Channel(put_on(settings["bus"]), task.attempt)
    with contextlib.ExitStack() as stack:
        stack.callback(channel.close)
        stack.enter_context(_rank_log(task, rank))
        channel.report({"type": "worker_started", "node": ray.get_runtime_context().get_node_id()})
        check_work_is_shared(work)
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


def check_work_is_shared(work: Path) -> None:
    """Raise UserError unless this process sees the scratch folder, which only this attempt has."""
    if not work.is_dir():
        raise UserError(
            f"the workers of this step run on several machines, and its scratch folder {work} is not the same on all:"
            " put the store, or for an object store ROPEWALK_SCRATCH, on a file system that they share,"
            " or ask for workers that fit on one machine"
        )


def _first_cause(error: Exception) -> BaseException:
    """Of a failed gang, the failure that brought down the others: a death before an exception."""
    failures = getattr(error, "worker_failures", None)
    if not failures:
        return getattr(error, "controller_failure", error)
    found = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}
    deaths = [
        died(failure, f"rank {rank}") for rank, failure in found.items() if type(failure).__module__ == "ray.exceptions"
    ]
    return (deaths or list(found.values()))[0]
