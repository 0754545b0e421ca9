"""Wall and processor time of commands and calls, repeated; and tables of them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = f"{'':<44} {'median':>8} {'lowest':>8} {'highest':>8} {'cpu':>8}   {'target':>8}"


@dataclass(frozen=True)
class Sample:
    """One measurement, in seconds."""

    wall: float
    cpu: float
    """User and system time, with that of child processes that were waited for."""


def timed_call(function: Callable[[], Any]) -> Sample:
    """Time of a call in this process."""
    began, cpu = time.perf_counter(), time.process_time()
    function()
    return Sample(time.perf_counter() - began, time.process_time() - cpu)


def timed_command(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> Sample:
    """Time of a command, interpreter included; what it prints goes to a file. Raises AssertionError if it fails."""
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(environment or {})}, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        assert process.returncode == 0, f"{command}: {output.read()[-3000:].decode(errors='replace')}"
    return Sample(wall, usage.ru_utime + usage.ru_stime)


def progress(text: str) -> None:
    """One line about how far a measurement is."""
    print(text, file=sys.stderr, flush=True)


def summary(samples: Sequence[Sample], target: float | None = None) -> dict[str, Any]:
    """Median and range of the wall time in seconds, median of the processor time, and what is aimed at."""
    walls = [sample.wall for sample in samples]
    return {
        "median": round(statistics.median(walls), 4),
        "lowest": round(min(walls), 4),
        "highest": round(max(walls), 4),
        "cpu": round(statistics.median(sample.cpu for sample in samples), 4),
        "repetitions": len(walls),
        "target": target,
    }


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print summaries as a table."""
    print(f"\n{title}\n{HEADER}")
    for name, row in rows.items():
        numbers = " ".join(f"{row[column]:8.3f}" for column in ("median", "lowest", "highest", "cpu"))
        target = "" if row["target"] is None else f"{row['target']:8.2f}"
        print(f"{name:<44} {numbers}   {target}", flush=True)
