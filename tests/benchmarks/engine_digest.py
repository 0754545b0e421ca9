"""Describing an attempt's files (path, size, sha256) against `sha256sum` on the same files, both on all cores.

The files are in the page cache. `sha256sum` gets them from `xargs -P`, in as few processes as keep all cores busy.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from timings import Sample, summary, timed_call, timed_command

from ropewalk.infra.artifact import describe

TARGET = 1.3
SMALL_FILES, SMALL_BYTES = 20_000, 4096
LARGE_FILES, LARGE_BYTES = 8, 2**27


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds of both, in turns, and the ratio of ours to theirs."""
    numbers: dict[str, Any] = {}
    sizes = {"small": (SMALL_FILES, SMALL_BYTES), "large": (LARGE_FILES, LARGE_BYTES)}
    for name, (num_files, num_bytes) in sizes.items():
        attempt = folder / name
        write_files(attempt, num_files, num_bytes)
        cores = os.cpu_count() or 1
        batch = -(-num_files // cores)
        find = f"find {shlex.quote(str(attempt))} -type f -print0"
        command = ["sh", "-c", f"{find} | xargs -0 -P {cores} -n {batch} sha256sum"]
        pairs: list[tuple[Sample, Sample]] = []
        for number in range(repetitions + 1):
            pair = (timed_call(lambda attempt=attempt: describe(attempt)), timed_command(command, folder))
            pairs += [pair] if number else []  # The first one fills the caches.
        what = f"{num_files} files of {num_bytes} bytes"
        numbers[f"describe, {what}"] = summary([ours for ours, _ in pairs])
        numbers[f"sha256sum, {what}"] = summary([theirs for _, theirs in pairs])
        ratios = [Sample(ours.wall / theirs.wall, ours.cpu / theirs.cpu) for ours, theirs in pairs]
        numbers[f"ratio, {what}"] = summary(ratios, TARGET)
    return numbers


def write_files(attempt: Path, num_files: int, num_bytes: int) -> None:
    """An attempt with files of random bytes."""
    (attempt / "observed").mkdir(parents=True)
    for number in range(num_files):
        folder = attempt / "data" / f"part-{number // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rows-{number:06d}").write_bytes(os.urandom(num_bytes))
