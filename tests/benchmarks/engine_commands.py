"""Wall time of commands that find nothing to do, interpreter included, on a chain of 20 trivial steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chain_pipeline
import command_probe
from timings import Sample, summary, timed_command
from tracking_process import await_tracking

TARGET = 0.6
HEAVY = {"torch", "ray", "mlflow", "obstore", "transformers", "pandas", "pyarrow", "numpy", "datasets", "deepspeed"}


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds of each command, in turns; asserts that none of them imports anything heavy."""
    store = ["--store", str(folder / "store")]
    commands = {
        "run, all reused": ["run", chain_pipeline.__file__, *store],
        "plan": ["plan", chain_pipeline.__file__, *store],
        "status": ["status", *store],
        "--help": ["--help"],
    }
    program = str(Path(sys.executable).with_name("ropewalk"))
    timed_command([program, *commands["run, all reused"], "--executor", "local"], folder)
    await_tracking(folder / "store")
    for arguments in commands.values():
        assert not imported(folder, arguments) & HEAVY
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, arguments in commands.items():
            samples[name].append(timed_command([program, *arguments], folder))
    return {name: summary(found, TARGET) for name, found in samples.items()}


def imported(folder: Path, arguments: list[str]) -> set[str]:
    """Names of the packages that a command imports."""
    result = folder / "probe.json"
    timed_command([sys.executable, command_probe.__file__, str(result), *arguments], folder)
    return {name.partition(".")[0] for name in json.loads(result.read_text())["modules"]}
