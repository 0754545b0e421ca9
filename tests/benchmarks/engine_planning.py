"""Plan and reused run of a pipeline whose outputs have very many files, through the command line.

The store is made by the engine itself, one real commit a step, with the syncs of its files left out: it need not
outlive a loss of power, and half a million of them would take most of the benchmark's time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import engine
import wide_pipeline
from timings import progress, summary, timed_command

PLAN_TARGET, RUN_TARGET = 2.0, 3.0


def measure(folder: Path, repetitions: int, num_steps: int, num_files: int) -> dict[str, Any]:
    """Seconds of `plan` and of a reused `run`, in turns."""
    store = folder / "store"
    progress(f"  making {num_steps * num_files} files")
    with mock.patch("ropewalk.infra.store.make_durable"):
        engine.run(wide_pipeline.pipeline(num_steps, num_files), store)
    options = ["--param", f"num_steps={num_steps}", "--param", f"num_files={num_files}", "--store", str(store)]
    program = str(Path(sys.executable).with_name("ropewalk"))
    plan = [program, "plan", wide_pipeline.__file__, "--exit-code", *options]
    run = [program, "run", wide_pipeline.__file__, *options]
    timed_command(plan, folder)
    pairs = [(timed_command(plan, folder), timed_command(run, folder)) for _ in range(repetitions)]
    size = f"{num_steps} steps of {num_files} files"
    return {
        f"plan, {size}": summary([planned for planned, _ in pairs], PLAN_TARGET),
        f"reused run, {size}": summary([reused for _, reused in pairs], RUN_TARGET),
    }
