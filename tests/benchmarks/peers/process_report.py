"""What a process says of itself in `report.json`: seconds of its imports and its work, and its peak memory."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

BEGAN = time.perf_counter()
"""When the interpreter was up: import this first."""


def report(tasks: dict[str, Callable[[Path, Path, Path], object]]) -> None:
    """Run the task of the command line, TASK INPUT OUTPUT TOKENIZER; its modules have been imported by now."""
    imported = time.perf_counter()
    name, *paths = sys.argv[1:]
    source, output, tokenizer = map(Path, paths)
    parts = tasks[name](source, output, tokenizer)
    ended = time.perf_counter()
    # Of this process or the largest of those it started, whichever is more.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peaks = [int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
    told = {"import_seconds": imported - BEGAN, "task_seconds": ended - imported, "peak_mib": max(peaks) / 1024}
    (output / "report.json").write_text(json.dumps(told | {"parts": parts or {}}))
