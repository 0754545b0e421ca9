"""Memory and processor time of the tracking process over a long record: while MLflow is down, and catching up.

    python tests/benchmarks/tracking_spool.py --events 500000 --output spool.json

Writes a record of so many metric events and lets the real tracking process at it, first with a server that refuses,
then with sqlite, and the same for a short record. Memory must not grow with the record.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements import write_measurements
from run_records import RecordBuilder, store_with_database

DOWN = "http://127.0.0.1:9"
OUTAGE_SECONDS = 30.0


def write_record(root: Path, num_events: int) -> RecordBuilder:
    """A training run with one metric event a step that has not ended."""
    record = RecordBuilder(root, "run", "spool")
    record.start(train={})
    record.begin("train")
    event = {"type": "metrics", "step": "train", "attempt": "a1", "about": None}
    with record.path.open("a") as file:
        for number in range(1, num_events + 1):
            values = {"loss": 1 / number, "learning_rate": 1e-4, "tokens_per_second": 1000.0 + number}
            stamp = {"seq": record.seq, "time": record.clock + number, "metric_step": number, "metrics": values}
            file.write(json.dumps({**event, **stamp}) + "\n")
            record.seq += 1
    return record


def measured(root: Path, uri: str, seconds: float | None) -> tuple[float, float, float]:
    """Peak memory in MiB, processor and wall seconds of the tracking process; it is stopped after `seconds`."""
    command = [
        sys.executable,
        "-m",
        "ropewalk.infra.tracking.sync",
        str(root),
        "run",
        *(["--follow"] if seconds else []),
    ]
    process = subprocess.Popen(command, env={**os.environ, "MLFLOW_TRACKING_URI": uri}, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    if seconds:
        time.sleep(seconds)
        process.terminate()
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime, time.monotonic() - began


def cases(root: Path) -> dict[str, tuple[str, float | None]]:
    """MLflow's address and for how long, by what it stands for."""
    return {"server down (30 s)": (DOWN, OUTAGE_SECONDS), "catching up (sqlite)": (f"sqlite:///{root}/mlflow.db", None)}


def main() -> None:
    """Print a table, and write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=500_000)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    asked = parser.parse_args()
    numbers: list[dict[str, float | str]] = []
    print("events   record MiB   case                       peak MiB   CPU s   wall s")
    for num_events in (1_000, asked.events):
        with tempfile.TemporaryDirectory() as folder:
            root = store_with_database(Path(folder))
            size = write_record(root, num_events).path.stat().st_size / 2**20
            for case, (uri, seconds) in cases(root).items():
                mib, cpu, wall = measured(root, uri, seconds)
                print(f"{num_events:<8} {size:10.0f}   {case:<26} {mib:8.0f} {cpu:7.1f} {wall:8.1f}", flush=True)
                row = {"events": num_events, "record_mib": size, "case": case}
                numbers.append({**row, "peak_mib": mib, "cpu_seconds": cpu, "wall_seconds": wall})
            with closing(sqlite3.connect(root / "mlflow.db")) as database:
                rows = database.execute("select count(*), count(distinct step), count(distinct key) from metrics")
                assert rows.fetchone() == (3 * num_events, num_events, 3), "MLflow does not have the record's points"
    if asked.output:
        write_measurements(asked.output, {"cases": numbers}, ("ropewalk", "mlflow"))


if __name__ == "__main__":
    main()
