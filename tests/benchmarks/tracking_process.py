"""Waits for the processes that bring runs to MLflow after their drivers have ended."""

from __future__ import annotations

import time
from pathlib import Path

import psutil


def await_tracking(store: Path) -> float:
    """Seconds until no process brings runs of the store to MLflow any more."""
    began = time.perf_counter()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "ropewalk.infra.tracking.sync" in words and str(store) in words:
            process.wait()
    return time.perf_counter() - began
