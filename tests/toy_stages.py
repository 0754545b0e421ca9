"""Small stages and pipelines that the engine's tests run. Every execution leaves a line in a counter file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ropewalk.infra.step import External, Pipeline, Resources, Step


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NumberConfig(Config):
    value: int = 1
    sleep_seconds: float = 0.0
    note: str = ""


def executions(folder: Path) -> list[str]:
    """Names of the steps that really ran, in order."""
    path = folder / "executions"
    return path.read_text().split() if path.exists() else []


def _count(name: str) -> None:
    counter = os.environ.get("TOY_COUNTER")
    if counter:
        with (Path(counter) / "executions").open("a") as file:
            file.write(name + "\n")


class number:  # noqa: N801
    """Writes its value."""

    NAME, VERSION = "number", 1

    @staticmethod
    def run(config, inputs, output, context):
        _count("number")
        time.sleep(config.sleep_seconds)
        (output.data / "value.json").write_text(json.dumps(config.value))
        (output.observed / "time.json").write_text(json.dumps(time.time()))
        context.log({"value": config.value})


class parity:  # noqa: N801
    """Writes its input's value modulo two: an upstream change may leave its output as it was."""

    NAME, VERSION = "parity", 1

    @staticmethod
    def run(config, inputs, output, context):
        _count("parity")
        value = json.loads((inputs["number"] / "value.json").read_text())
        (output.data / "value.json").write_text(json.dumps(value % 2))


class total:  # noqa: N801
    """Adds the values of all inputs, and the bytes of external files."""

    NAME, VERSION = "total", 1

    @staticmethod
    def run(config, inputs, output, context):
        _count("total")
        values = []
        for slot, path in sorted(inputs.items()):
            if path.is_file():
                values.append(path.stat().st_size)
            else:
                values.append(json.loads((path / "value.json").read_text()))
            context.progress(len(values), len(inputs), slot)
        (output.data / "value.json").write_text(json.dumps(sum(values) + config.value))


class failing:  # noqa: N801
    """Writes something, then fails as long as the switch file exists."""

    NAME, VERSION = "failing", 1

    @staticmethod
    def run(config, inputs, output, context):
        _count("failing")
        (output.data / "half.txt").write_text("half")
        if Path(config.note).exists():
            raise ValueError("value: the switch is on")
        (output.data / "value.json").write_text("7")


def _square(value: int) -> int:
    return value * value


class Adder:
    """Built once per worker; remembers the process it was built in."""

    def __init__(self) -> None:
        self.built_in = os.getpid()

    def __call__(self, value: int) -> int:
        assert os.getpid() == self.built_in
        return value + 100


def _rank(config, worker):
    worker.log({"rank": worker.rank}, step=0)
    print("hello from rank", worker.rank)
    return worker.rank * 10 + int(os.environ["WORLD_SIZE"])


class parallel:  # noqa: N801
    """Uses map with a function and a class, and a gang of two."""

    NAME, VERSION = "parallel", 1

    @staticmethod
    def run(config, inputs, output, context):
        _count("parallel")
        result = {
            "map": list(context.map(_square, range(5))),
            "actors": list(context.map(Adder, range(5))),
            "gang": context.gang(_rank, config, num_workers=2),
            "work": context.work.is_dir(),
        }
        (output.data / "value.json").write_text(json.dumps(result))


def diamond(value: int = 3, *, external: Path | None = None) -> Pipeline:
    """number -> (parity, double) -> total"""
    first = Step("first", number, NumberConfig(value=value))
    left = Step("left", parity, Config(), inputs={"number": first})
    right = Step("right", total, NumberConfig(value=0), inputs={"a": first})
    inputs = {"left": left, "right": right}
    if external is not None:
        inputs["file"] = External(str(external))
    last = Step("last", total, NumberConfig(value=10), inputs=inputs, resources=Resources(num_cpus=0.5))
    return Pipeline("diamond", (first, left, right, last))
