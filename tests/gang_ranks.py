"""What the ranks of a gang do in the tests: a child process can only run functions that it can import."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from ropewalk.stages.context import Worker


def environment(config: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """What this rank sees."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    found = {name: os.environ[name] for name in names}
    return {**found, "pid": os.getpid(), "rank": worker.rank, "world_size": worker.world_size, "config": config}


def reporting(config: Any, worker: Worker) -> bool:
    """Reports from every rank; only rank 0's may arrive."""
    worker.log({"rank": worker.rank}, step=3)
    worker.progress(worker.rank, 2, "ranks")
    return worker.cancelled()


def failing(rank: int, worker: Worker) -> None:
    """One rank fails; the others would go on for a minute."""
    if worker.rank == rank:
        raise ValueError(f"rank {rank} has no rope")
    time.sleep(60)


def dying(folder: str, worker: Worker) -> None:
    """Rank 1 dies without a word; rank 0 leaves its process id and would go on."""
    if worker.rank == 1:
        sys.stdout.flush()
        os._exit(7)
    (Path(folder) / "pid").write_text(str(os.getpid()))
    time.sleep(60)


def lingering(folder: str, worker: Worker) -> None:
    """Every rank leaves its process id and would go on."""
    (Path(folder) / f"rank{worker.rank}").write_text(str(os.getpid()))
    time.sleep(60)


def large(num_bytes: int, worker: Worker) -> bytes:
    """More than a pipe holds."""
    return bytes([worker.rank]) * num_bytes


def unpicklable(config: Any, worker: Worker) -> Any:
    """A result that cannot be sent."""
    return lambda: None


def all_reduce(value: float, worker: Worker) -> float:
    """Adds `value * (rank + 1)` over the ranks, through torch.distributed."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(value * (worker.rank + 1))
    dist.all_reduce(total)
    dist.destroy_process_group()
    return total.item()
