"""How fast the engine is, and other tools beside it in the same run: tables, and one JSON file with all numbers.

    python tests/benchmarks/engine_speed.py --output measurements.json
    python tests/benchmarks/engine_speed.py --only commands peers --peers dvc --repetitions 5

Parts: overhead (per step, local and Ray), planning (50 steps of 10,000 files), commands (with nothing to do), peers
(DVC, Snakemake, redun, Prefect), digest (against sha256sum). All takes some minutes; a quiet machine gives the
numbers that count. `cpu` beside a wall time tells how much of it the machine spent on others.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine_commands
import engine_digest
import engine_overhead
import engine_peers
import engine_planning
from measurements import write_measurements
from timings import show

PARTS = ("commands", "peers", "overhead", "digest", "planning")
PEERS = ("dvc", "snakemake", "redun", "prefect")
PACKAGES = ("ropewalk", "ray", "mlflow", "pydantic", "typer", "rich")


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="TOOL", help=", ".join(PEERS))
    parser.add_argument("--environments", type=Path, help="keep the tools' environments here, and use what is there")
    parser.add_argument("--steps", type=int, default=50, help="planning: number of steps")
    parser.add_argument("--files", type=int, default=10_000, help="planning: files of each step")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    asked = parser.parse_args()
    numbers = {}
    with tempfile.TemporaryDirectory(prefix="ropewalk-benchmark-") as name:
        for part in asked.only:
            folder = Path(name) / part
            folder.mkdir()
            numbers[part] = found = measures(asked, Path(name))[part](folder)
            show(f"{part}, seconds", found["times"] if part == "peers" else found)
            if asked.output:
                write_measurements(asked.output, numbers, PACKAGES)


def measures(asked: argparse.Namespace, folder: Path) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """What measures each part, given a folder to do it in."""
    repetitions, environments = asked.repetitions, (asked.environments or folder / "environments").absolute()
    return {
        "overhead": lambda where: engine_overhead.measure(where, repetitions),
        "planning": lambda where: engine_planning.measure(where, repetitions, asked.steps, asked.files),
        "commands": lambda where: engine_commands.measure(where, repetitions),
        "peers": lambda where: engine_peers.measure(where, repetitions, list(asked.peers), environments),
        "digest": lambda where: engine_digest.measure(where, repetitions),
    }


if __name__ == "__main__":
    main()
