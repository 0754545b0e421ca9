"""What a batch pays for its attention plan before any attention: the plan, its move, and its tiles for three kernels.

    python tests/benchmarks/kernels_plan_cost.py --output plan_cost.json
    python tests/benchmarks/kernels_plan_cost.py --device cuda

Milliseconds are medians. Block lists are given, on the device; they are of one plan head, and cost as many times as
much for more. On a GPU `host_syncs` counts where the host waits for it, the move to it left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernels_in_place  # noqa: F401  # isort: skip  Makes `ropewalk.kernels` importable where it is not installed.
import kernels_patterns
from kernels_patterns import Case, Shape
from kernels_speed import synchronize
from measurements import write_measurements

TILE_SIZES = ((128, 128), (64, 128), (128, 64))
"""Of the forward, dK/dV and dQ."""
LENGTHS = [8192, 65536, 131072, 262144, 1048576]
PATTERNS = ["causal", "document", "anchor", "sliding_window", "block_lists"]


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    rows = []
    print(f"{'tokens':>8} {'pattern':<16} {'plan ms':>9} {'tiles ms':>9} {'syncs':>6}")
    for tokens in asked.lengths:
        for case in wanted(tokens, asked.device):
            row = costs(case, asked.device, asked.repeats)
            rows.append({"tokens": tokens, "pattern": case.pattern, "setting": case.setting} | row)
            syncs = row.get("host_syncs", "")
            print(f"{tokens:>8} {case.pattern:<16} {row['plan_ms']:9.2f} {row['tiles_ms']:9.2f} {syncs:>6}", flush=True)
    if asked.output:
        write_measurements(asked.output, {"threads": torch.get_num_threads(), "costs": rows}, ("torch",))


def wanted(tokens: int, device: str) -> list[Case]:
    """Each pattern at one density."""
    settings = {"all", "64 documents", f"window {min(4096, tokens // 4)}, 4 sinks", "10% listed"}
    found = kernels_patterns.cases(PATTERNS, tokens, Shape(1, 1, 128, torch.bfloat16, device))
    return [case for case in found if case.setting in settings]


def costs(case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` plans, after one that is not counted."""
    plan_ms, tiles_ms = [], []
    syncs = 0
    for _ in range(1 + repeats):
        began = time.perf_counter()
        plan = case.build()
        synchronize(device)
        built = time.perf_counter()

        def tiles(plan: Any = plan) -> None:
            for query_tile, key_tile in TILE_SIZES:
                plan.tiles(query_tile, key_tile)

        syncs = host_syncs(tiles, device)
        synchronize(device)
        plan_ms.append(1000 * (built - began))
        tiles_ms.append(1000 * (time.perf_counter() - built))
    found: dict[str, Any] = {} if device == "cpu" else {"host_syncs": syncs}
    for name, samples in (("plan", plan_ms[1:]), ("tiles", tiles_ms[1:])):
        found |= {f"{name}_ms": statistics.median(samples), f"{name}_range_ms": [min(samples), max(samples)]}
    return found


def host_syncs(call: Callable[[], None], device: str) -> int:
    """Makes the call; how often it made the host wait for the GPU."""
    if device == "cpu":
        call()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
