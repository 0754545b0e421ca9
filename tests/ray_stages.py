"""Stages that are disturbed on purpose: their first attempt says where it is and waits for its end."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ropewalk.stages.shards import map_shards
from ropewalk.stages.training import train

BEGUN = "begun.json"
"""In the work folder: written by the first attempt, so the second knows that it is the second."""


class Nothing(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(Nothing):
    value: int = 0


def place() -> dict[str, Any]:
    """Process and Ray node of the caller."""
    import ray

    return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}


class waiting:  # noqa: N801
    """Reports ten points; the first attempt then waits to be killed."""

    NAME, VERSION = "waiting", 1

    @staticmethod
    def run(config, inputs, output, context):
        begun = context.work / BEGUN
        again = begun.exists()
        for number in range(10):
            context.log({"point": number}, step=number)
        if not again:
            begun.write_text(json.dumps(place()))
            time.sleep(300)
        (output.data / "value.json").write_text(json.dumps(config.value))


class reporting:  # noqa: N801
    """Reports sixty points in six seconds."""

    NAME, VERSION = "reporting", 1

    @staticmethod
    def run(config, inputs, output, context):
        (context.work / BEGUN).write_text(json.dumps(place()))
        for number in range(60):
            context.log({"point": number}, step=number)
            time.sleep(0.1)
        (output.data / "value.json").write_text("1")


class Squares:
    """Built once per worker. The worker of item 5 dies once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built_in = os.getpid()

    def __call__(self, number: int, folder: Path) -> dict[str, int]:
        assert os.getpid() == self.built_in
        begun = self.folder / BEGUN
        if number == 5 and not begun.exists():
            begun.write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
        with (self.folder.parents[2] / "squared").open("a") as log:
            log.write(f"{number}\n")
        (folder / f"{number:02d}.txt").write_text(str(number * number))
        return {"square": number * number}


class squares:  # noqa: N801
    """Squares twelve numbers as shards."""

    NAME, VERSION = "squares", 1

    @staticmethod
    def run(config, inputs, output, context):
        found = []
        for shard in map_shards(context, partial(Squares, context.work), {str(n): n for n in range(12)}):
            shard.link_into(output.data)
            found.append(shard.counts["square"])
        (output.data / "squares.json").write_text(json.dumps(found))


class Cube:
    """Built once per worker; leaves a trace of that, and of each number."""

    def __init__(self, traces: Path) -> None:
        self.traces = traces
        self.built_in = os.getpid()
        trace(traces, "built", os.getpid())

    def __call__(self, number: int, folder: Path) -> dict[str, int]:
        assert os.getpid() == self.built_in
        time.sleep(0.1)
        (folder / f"{number:02d}.txt").write_text(str(number**3))
        trace(self.traces, "cubed", number)
        return {"cube": number**3}


def trace(folder: Path, name: str, value: int) -> None:
    """Leave a line."""
    with (folder / name).open("a") as file:
        file.write(f"{value}\n")


class cubes:  # noqa: N801
    """Cubes thirty numbers as shards; traces are beside the store's scratch folders, where they outlive the commit."""

    NAME, VERSION = "cubes", 1

    @staticmethod
    def run(config, inputs, output, context):
        if not (context.work / BEGUN).exists():
            (context.work / BEGUN).write_text(json.dumps(place()))
        found = []
        for shard in map_shards(context, partial(Cube, context.work.parents[1]), {str(n): n for n in range(30)}):
            shard.link_into(output.data)
            found.append(shard.counts["cube"])
        (output.data / "cubes.json").write_text(json.dumps(found))


def _slow(number: int) -> int:
    time.sleep(0.01 * (5 - number % 5))
    return number


class lazy_reader:  # noqa: N801
    """Maps over forty numbers that it makes when they are asked for, and reads results slowly."""

    NAME, VERSION = "lazy_reader", 1

    @staticmethod
    def run(config, inputs, output, context):
        taken, results, ahead = 0, [], []

        def numbers():
            nonlocal taken
            for number in range(40):
                taken += 1
                yield number

        for result in context.map(_slow, numbers()):
            time.sleep(0.05)
            results.append(result)
            ahead.append(taken - len(results))
        (output.data / "value.json").write_text(json.dumps(results))
        (output.observed / "ahead.json").write_text(json.dumps(max(ahead)))


class Sleeper:
    """Leaves its process id and sleeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, number: int) -> None:
        (self.folder / f"pid-{os.getpid()}").touch()
        (self.folder / BEGUN).write_text(json.dumps(place()))
        time.sleep(300)


class sleepers:  # noqa: N801
    """A map that would take minutes."""

    NAME, VERSION = "sleepers", 1

    @staticmethod
    def run(config, inputs, output, context):
        list(context.map(partial(Sleeper, context.work), range(8)))


def _together(folder: Path, worker: Any) -> list[float]:
    import torch.distributed as dist

    started = time.time()
    dist.barrier()
    for second in range(12):
        worker.progress(second, 12, "seconds")
        time.sleep(1)
    return [started, time.time()]


class gang_of_two:  # noqa: N801
    """Two ranks that meet, and when each of them began and ended."""

    NAME, VERSION = "gang_of_two", 1

    @staticmethod
    def run(config, inputs, output, context):
        times = context.gang(_together, context.work, num_workers=2)
        (output.data / "value.json").write_text(str(config.value))
        (output.observed / "times.json").write_text(json.dumps(times))


def _wait_once(settings: tuple[Path, bool], worker: Any) -> int:
    folder, again = settings
    if not again:
        if worker.rank == 1:
            (folder / BEGUN).write_text(json.dumps(place()))
        time.sleep(300)
    return worker.rank


class waiting_gang:  # noqa: N801
    """Two ranks that wait to lose one of their nodes, once."""

    NAME, VERSION = "waiting_gang", 1

    @staticmethod
    def run(config, inputs, output, context):
        again = (context.work / BEGUN).exists()
        ranks = context.gang(_wait_once, (context.work, again), num_workers=2)
        (output.data / "value.json").write_text(json.dumps(ranks))


class deaf:  # noqa: N801
    """Says where it is, then sleeps and never asks whether to stop."""

    NAME, VERSION = "deaf", 1

    @staticmethod
    def run(config, inputs, output, context):
        (context.work / BEGUN).write_text(json.dumps(place()))
        time.sleep(300)


class Killed:
    """A worker whose rank 1 is killed (SIGKILL) before its step number `at_step`, once."""

    def __init__(self, worker: Any, at_step: int, begun: Path) -> None:
        self.rank, self.world_size = worker.rank, worker.world_size
        self.log, self.progress = worker.log, worker.progress
        self._worker, self._at_step, self._begun, self._seen = worker, at_step, begun, 0

    def cancelled(self) -> bool:
        """Asked once at the start of each step."""
        self._seen += 1
        if self.rank == 1 and self._seen > self._at_step and not self._begun.exists():
            self._begun.write_text(json.dumps(place()))
            os.kill(os.getpid(), signal.SIGKILL)
        return self._worker.cancelled()


def _killed_once(function: Any, at_step: int, begun: Path, config: Any, worker: Any) -> Any:
    return function(config, Killed(worker, at_step, begun))


class killed_train:  # noqa: N801
    """The training stage; one rank is killed once, after as many steps as the file `kill_at` in the store says."""

    NAME, VERSION = "killed_train", 1
    gang_size = staticmethod(train.gang_size)

    @staticmethod
    def run(config, inputs, output, context):
        gang = context.gang
        at_step = int((context.work.parents[2] / "kill_at").read_text())

        def disturbed_gang(function, settings, *, num_workers, resources=None):
            killed = partial(_killed_once, function, at_step, context.work / BEGUN)
            return gang(killed, settings, num_workers=num_workers, resources=resources)

        context.gang = disturbed_gang
        train.run(config, inputs, output, context)
