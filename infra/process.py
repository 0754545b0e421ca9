"""Whether a process of this machine is still the one that was meant: pids are used again, start times are not."""

from __future__ import annotations

from functools import cache
from pathlib import Path


def process_start(pid: int) -> float | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else float(fields[19])


def is_alive(pid: int, started: float | None) -> bool:
    """Whether this machine still has the process with this pid and start time (None: any start time)."""
    now = process_start(pid)
    return now is not None and (started is None or now == started)


@cache
def machine() -> str:
    """Where pids and start times mean something: this boot of this machine, and this container of it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
