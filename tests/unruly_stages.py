"""Stages that fail, hang, stop early or promise too much: what an engine has to live with."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import uuid
from pathlib import Path

from pydantic import BaseModel, ConfigDict

ERRORS = {
    "network": ConnectionError("the server does not answer"),
    "value": ValueError("value: cannot be used"),
    "library": RuntimeError("something else"),
}


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    folder: str
    """Where the stage leaves traces and finds switches. (Real stages know no paths.)"""
    error: str = "network"
    num_failures: int = 0


def count(config: Config, name: str) -> int:
    """Leave a trace; returns how many there are."""
    path = Path(config.folder) / name
    with path.open("a") as file:
        file.write("x")
    return path.stat().st_size


class flaky:  # noqa: N801
    """Fails the first `num_failures` times."""

    NAME, VERSION = "flaky", 1

    @staticmethod
    def run(config, inputs, output, context):
        if count(config, "flaky") <= config.num_failures:
            raise ERRORS[config.error]
        (output.data / "value.json").write_text("1")


class patient:  # noqa: N801
    """Reports and waits until the file `go` is there, or it is asked to stop; then it returns, half done."""

    NAME, VERSION = "patient", 1

    @staticmethod
    def run(config, inputs, output, context):
        count(config, "patient")
        (output.data / "value.json").write_text("1")
        while not (Path(config.folder) / "go").exists():
            context.progress(1, 2, "waits")
            if context.cancelled():
                count(config, "stopped")
                return
            time.sleep(0.05)


class stubborn:  # noqa: N801
    """Reports nothing and never asks whether to stop; the second attempt at it is quick."""

    NAME, VERSION = "stubborn", 1

    @staticmethod
    def run(config, inputs, output, context):
        if count(config, "stubborn") <= config.num_failures:
            time.sleep(600)
        (output.data / "value.json").write_text("1")


class checked:  # noqa: N801
    """Its output breaks its own promise until the file `go` is there."""

    NAME, VERSION = "checked", 1

    @staticmethod
    def run(config, inputs, output, context):
        (output.data / "value.json").write_text("2" if (Path(config.folder) / "go").exists() else "")

    @staticmethod
    def check(config, output):
        if not (output / "value.json").read_text():
            raise ValueError("value.json: is empty")


class drawing:  # noqa: N801
    """Writes something else each time."""

    NAME, VERSION = "drawing", 1

    @staticmethod
    def run(config, inputs, output, context):
        (output.data / "value.json").write_text(str(uuid.uuid4().int % 10**9))


def rank_that_waits(config, worker):
    """A rank of a gang that never ends by itself."""
    count(config, f"rank{worker.rank}")
    while True:
        time.sleep(0.1)


class gang:  # noqa: N801
    """Waits for two ranks that never end."""

    NAME, VERSION = "gang", 1

    @staticmethod
    def run(config, inputs, output, context):
        context.gang(rank_that_waits, config, num_workers=2)


class resuming:  # noqa: N801
    """Counts to six and saves each count, whole, in its scratch folder. The first attempt is stopped before its third.

    When that one goes on, it writes its third; the others wait for that at their fifth.
    """

    NAME, VERSION = "resuming", 1

    @staticmethod
    def run(config, inputs, output, context):
        folder, saved = Path(config.folder), context.work / "count"
        count = int(saved.read_text()) if saved.exists() else 0
        while count < 6:
            count += 1
            if count == 3 and not (folder / "late").exists():
                (folder / "late").touch()
                os.kill(os.getpid(), signal.SIGSTOP)
                try:
                    save(saved, count)
                finally:
                    (folder / "woken").touch()
            while count == 5 and not (folder / "woken").exists():
                time.sleep(0.02)
            save(saved, count)
            with (folder / "counts").open("a") as file:
                file.write(f"{count} ")
            if count == 5 and saved.read_text() != "5":
                raise AssertionError("somebody else writes here")
        (output.data / "value.json").write_text("6")


def save(path: Path, count: int) -> None:
    """Write a count, whole or not at all."""
    temporary = path.with_name(uuid.uuid4().hex)
    temporary.write_text(str(count))
    temporary.replace(path)


class holding:  # noqa: N801
    """Once holds the interpreter's lock for some seconds, so that no other thread of its process runs."""

    NAME, VERSION = "holding", 1

    @staticmethod
    def run(config, inputs, output, context):
        if count(config, "holding") <= config.num_failures:
            ctypes.PyDLL(None).sleep(4)
        (output.data / "value.json").write_text("1")
