"""What a stage is given by whoever runs it.

A stage never learns whether it runs in a test, on a laptop or on a cluster: it sees the protocols below.
`LocalContext` is the plain implementation, everything in this process (gangs of several ranks in child
processes); `ropewalk.infra` has the one that runs on Ray.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

SECONDARY_FAILURE_SECONDS = 1.0

Report = Callable[[dict[str, Any]], None]
"""Takes one event: `{"type": "metrics", "metrics", "step", "about"}` or `{"type": "progress", "done", "total",
"unit"}`."""


@dataclass(frozen=True)
class Output:
    """Where a stage writes. Both folders exist and are empty."""

    data: Path
    """The artifact: bytes that depend on config and inputs alone. The output digest covers it."""
    observed: Path
    """Measurements (times, throughput, latency): listed in the manifest, left out of the digest."""


class Worker(Protocol):
    """What each rank of a gang is given."""

    rank: int
    world_size: int

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Report metrics; only rank 0's are kept."""
        ...

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report progress; only rank 0's is shown."""
        ...

    def cancelled(self) -> bool:
        """True once the run has been cancelled: save and return."""
        ...


class Context(Protocol):
    """What `run(config, inputs, output, context)` is given."""

    work: Path
    """Scratch folder kept across attempts of the same key: checkpoints, shard ledgers. Gone after the commit. All
    processes of the stage write to it, so on several machines it lies on a file system that they share.

    Each attempt is given it under another name, so one that was given up and still runs cannot reach it by name; but
    that one may have a file open. So a file is made under a new name and renamed when it is whole, never written over.
    """

    def map(self, function: Callable[..., Any], items: Iterable[Any], *, resources: Any = None) -> Iterator[Any]:
        """Apply `function` to every item, in parallel where possible; results come in item order.

        `function` is picklable: a module-level function, a class that is built once per worker and whose instance
        is then called once per item, or a `functools.partial` of either.
        """
        ...

    def gang(
        self, function: Callable[[Any, Worker], Any], config: Any, *, num_workers: int, resources: Any = None
    ) -> list[Any]:
        """Run `function(config, worker)` in `num_workers` processes at once, one per training rank.

        Sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as `torch.distributed` expects them.
        Returns the results by rank; one failing rank fails the gang. A rank whose process dies raises an error of its
        own kind, so that the machine's failures can be told from the function's.
        """
        ...

    def log(self, metrics: Mapping[str, float], *, step: int | None = None, about: str | None = None) -> None:
        """Report metrics. `about` names the input slot that they describe (the checkpoint an evaluation judged)."""
        ...

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report that `done` of `total` units are finished."""
        ...

    def cancelled(self) -> bool:
        """True once the run has been cancelled."""
        ...


def ignore(event: dict[str, Any]) -> None:
    """Report nothing."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass
class LocalWorker:
    """A rank of a local gang."""

    rank: int
    world_size: int
    report: Report = ignore
    stop: Callable[[], bool] = never

    def log(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """See `Worker.log`."""
        if self.rank == 0:
            self.report({"type": "metrics", "metrics": dict(metrics), "step": step, "about": None})

    def progress(self, done: int, total: int, unit: str) -> None:
        """See `Worker.progress`."""
        if self.rank == 0:
            self.report({"type": "progress", "done": done, "total": total, "unit": unit})

    def cancelled(self) -> bool:
        """See `Worker.cancelled`."""
        return self.stop()


@dataclass
class LocalContext:
    """Runs everything here. Gangs of several ranks are child processes (spawn), joined before `gang` returns."""

    work: Path
    report: Report = ignore
    stop: Callable[[], bool] = never

    def map(self, function: Callable[..., Any], items: Iterable[Any], *, resources: Any = None) -> Iterator[Any]:
        """See `Context.map`."""
        return map(function() if is_class(function) else function, items)

    def gang(
        self, function: Callable[[Any, Worker], Any], config: Any, *, num_workers: int, resources: Any = None
    ) -> list[Any]:
        """See `Context.gang`."""
        # A process group can be made once per process, so even a gang of one gets its own.
        import multiprocessing

        spawn = multiprocessing.get_context("spawn")
        events: Any = spawn.SimpleQueue()
        stopped: Any = spawn.Event()
        port = free_port()
        processes = [
            spawn.Process(
                target=_run_rank, args=(function, config, rank, num_workers, port, events, stopped), daemon=False
            )
            for rank in range(num_workers)
        ]
        for process in processes:
            process.start()
        return _collect(processes, events, self.report, self.stop, stopped)

    def log(self, metrics: Mapping[str, float], *, step: int | None = None, about: str | None = None) -> None:
        """See `Context.log`."""
        self.report({"type": "metrics", "metrics": dict(metrics), "step": step, "about": about})

    def progress(self, done: int, total: int, unit: str) -> None:
        """See `Context.progress`."""
        self.report({"type": "progress", "done": done, "total": total, "unit": unit})

    def cancelled(self) -> bool:
        """See `Context.cancelled`."""
        return self.stop()


def is_class(function: Callable[..., Any]) -> bool:
    """True for a class or a `functools.partial` of one: it is to be built before it is called with items."""
    return isinstance(function.func if isinstance(function, partial) else function, type)


def free_port() -> int:
    """A TCP port that nothing on loopback listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(
    function: Callable[..., Any], config: Any, rank: int, world_size: int, port: int, events: Any, stopped: Any
) -> None:
    import traceback

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Spinning OpenMP threads of several ranks on few cores cost several times one thread each.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        worker = LocalWorker(rank, world_size, lambda event: events.put(("event", rank, event)), stopped.is_set)
        result = function(config, worker)
        events.put(("done", rank, result))
    except BaseException:
        events.put(("failed", rank, traceback.format_exc()))
        raise


def _end_with_parent() -> None:
    """Ranks of a driver that was killed must not go on writing beside those of the next attempt."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _collect(processes: list[Any], events: Any, report: Report, stop: Callable[[], bool], stopped: Any) -> list[Any]:
    results: dict[int, Any] = {}
    try:
        while len(results) < len(processes):
            if stop():
                stopped.set()
            if events.empty():
                dead = [rank for rank, p in enumerate(processes) if not p.is_alive() and rank not in results]
                if dead and events.empty():
                    raise _died(dead[0], processes[dead[0]])
                time.sleep(0.02)
                continue
            kind, rank, payload = events.get()
            if kind == "event":
                report(payload)
            elif kind == "failed":
                raise _cause(processes, rank) or RuntimeError(f"rank {rank} failed:\n{payload}")
            else:
                results[rank] = payload
    finally:
        for process in processes:
            if len(results) < len(processes):
                process.kill()
            process.join()
    return [results[rank] for rank in range(len(processes))]


def _cause(processes: list[Any], failed: int) -> BrokenProcessPool | None:
    """The death of another rank, if that is why this one failed: its peers notice at their next collective."""
    deadline = time.monotonic() + SECONDARY_FAILURE_SECONDS
    while time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if rank != failed and process.exitcode not in (None, 0, 1):
                return _died(rank, process)
        if all(process.exitcode is not None for process in processes):
            break
        time.sleep(0.02)
    return None


def _died(rank: int, process: Any) -> BrokenProcessPool:
    return BrokenProcessPool(f"rank {rank} died with exit code {process.exitcode}")
