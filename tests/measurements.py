"""The file that a benchmark writes its numbers to, with what is needed to judge and repeat them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def write_measurements(path: Path, numbers: Mapping[str, Any], packages: tuple[str, ...]) -> None:
    """Write `numbers` with date, machine (without its name), versions of `packages`, commit and command."""
    document = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
        "numbers": dict(numbers),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the processor is, how many cores this process may use, and how much memory there is."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = models[0] if models else platform.machine()
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30)}


def commit() -> str:
    """The checked-out commit, with `-dirty` if files differ from it; "unknown" outside a checkout or without git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
