"""Time of a training step while MLflow is well, down, slow, failing or locked, against that without any tracking.

    python tests/benchmarks/tracking_outage.py --rounds 4 --window 2 --output outage.json

One run through the command line, local executor, whose step trains a small network in steps of equal work and reports
each. While it trains, its tracking process is replaced again and again: in every round each state of MLflow has a turn,
in random order, and before and after it is a turn without a tracking process. The ratio of a turn is its median step
time over that of the two turns around it, so that what else the machine does falls on both alike. A turn begins when
the tracking process has met the state. The claim: less than 5 percent. A ratio of turns without tracking among
themselves ("off") shows the noise. Takes less than 4 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from faulty_proxy import FaultyProxy, faulty_mlflow
from measurements import write_measurements
from pydantic import BaseModel, ConfigDict
from run_records import store_with_database

from ropewalk.infra.step import Pipeline, Step
from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking.event_tail import EventTail
from ropewalk.infra.tracking.ids import ids_path, read_ids

FAULTS = {"server down": "refuse", "server slow": "slow answer", "server 403": "403", "server 500": "500"}
FAULTS |= {"server resets": "reset"}
STATES = ("server well", *FAULTS, "sqlite well", "sqlite locked", "off")
SLOW_SECONDS = 30.0
MEETING_SECONDS = 60.0
WARM_UP_SECONDS = 3.0
SETTLE_SECONDS = 0.5
"""From when the tracking process has met a state to when its turn begins: its start is over then."""
Span = tuple[float, float]


class TrainingConfig(BaseModel):
    """A network and the file that ends its training when it is there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: str
    width: int = 512
    rows: int = 512


class training:  # noqa: N801
    """Trains a small network; writes when each step began and its seconds."""

    NAME, VERSION = "training", 1

    @staticmethod
    def run(config, inputs, output, context):
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(config.width, config.width), torch.nn.GELU())]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters())
        batch = torch.randn(config.rows, config.width)
        steps = []
        while not Path(config.until).exists():
            when, began = time.time(), time.perf_counter()
            loss = (model(batch) - batch.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            context.log({"loss": loss.item(), "learning_rate": 1e-3}, step=len(steps) + 1)
            steps.append((when, time.perf_counter() - began))
        (output.data / "steps.json").write_text(json.dumps(steps))


def pipeline(until: str) -> Pipeline:
    """One training step."""
    return Pipeline("training", (Step("train", training, TrainingConfig(until=until)),))


class Training:
    """The run that goes on through all turns, and the one tracking process that it has at a time."""

    def __init__(self, folder: Path, proxy: FaultyProxy) -> None:
        self.root = folder / "store"
        self._proxy = proxy
        self._until = folder / "until"
        self._database = store_with_database(folder / "beside") / "mlflow.db"
        self._tracker: subprocess.Popen[bytes] | None = None
        self.run_id = ""
        self.tracker_cores: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Start the run, and end the tracking process that it starts by itself."""
        command = [sys.executable, "-m", "ropewalk.pipelines.cli", "run", __file__, "--executor", "local", "--json"]
        options = ["--store", str(self.root), "--param", f"until={self._until}"]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self._proxy.url, "OMP_NUM_THREADS": "1"}
        self._driver = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
        records = (self.root / "runs").glob
        await_that(lambda: any('"metrics"' in path.read_text() for path in records("*/events.jsonl")))
        self.run_id = next(records("*")).name
        for child in psutil.Process(self._driver.pid).children():
            if "--follow" in child.cmdline():
                child.kill()
        time.sleep(WARM_UP_SECONDS)

    def __enter__(self) -> Training:
        self.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._driver.kill()
        self._driver.wait()

    def turn(self, state: str, seconds: float) -> Span:
        """Let the run go on in a state for so long; returns when that was."""
        if state == "off":
            return self._span(seconds)
        with self._ill(state), self._tracking(state):
            time.sleep(SETTLE_SECONDS)
            tracker = psutil.Process(self._tracker.pid)
            before = sum(tracker.cpu_times()[:2])
            span = self._span(seconds)
            self.tracker_cores[state].append((sum(tracker.cpu_times()[:2]) - before) / seconds)
        return span

    def finish(self) -> list[tuple[float, float]]:
        """End the run; returns when each step began, and its seconds."""
        self._until.touch()
        result = json.loads(self._driver.communicate()[0].splitlines()[-1])
        assert result["status"] == "succeeded"
        return json.loads((Path(result["steps"][0]["output"]["uri"]) / "steps.json").read_text())

    def _span(self, seconds: float) -> Span:
        began = time.time()
        time.sleep(seconds)
        return began, time.time()

    @contextlib.contextmanager
    def _ill(self, state: str) -> Iterator[None]:
        self._proxy.fault = FAULTS.get(state, "none")
        if state != "sqlite locked":
            yield
            return
        with contextlib.closing(sqlite3.connect(self._database, isolation_level=None, timeout=60)) as database:
            database.execute("begin exclusive")
            yield

    @contextlib.contextmanager
    def _tracking(self, state: str) -> Iterator[None]:
        """The real tracking process; it goes on from where the last one on the same MLflow got to."""
        place = "sqlite" if state.startswith("sqlite") else "server"
        ids, kept = ids_path(self.root, self.run_id), self.root / f"{place}.json"
        if kept.exists():
            shutil.copy(kept, ids)
        uri = f"sqlite:///{self._database}" if place == "sqlite" else self._proxy.url
        met = self._proxy.met[self._proxy.fault]
        with environment(MLFLOW_TRACKING_URI=uri):
            self._tracker = tracking.start(Store(self.root), self.run_id)
        try:
            if state in FAULTS:
                await_that(lambda: self._proxy.met[self._proxy.fault] > met)
            elif state == "sqlite locked":
                await_that(lambda: self._has_open(self._database))
            else:
                recorded = EventTail(self.root / "runs" / self.run_id / "events.jsonl").last()
                await_that(lambda: read_ids(ids).seq > recorded["seq"])
            yield
        finally:
            self._tracker.kill()
            self._tracker.wait()
            if ids.exists():
                shutil.copy(ids, kept)

    def _has_open(self, path: Path) -> bool:
        return any(file.path == str(path) for file in psutil.Process(self._tracker.pid).open_files())


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set variables of this process for a while."""
    saved = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def await_that(condition: Callable[[], bool]) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + MEETING_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def measure(rounds: int, window: float) -> dict[str, dict[str, float | list[float]]]:
    """The ratios of all turns by state, their median, and the cores that the tracking process took."""
    turns: list[tuple[str, Span]] = []
    with tempfile.TemporaryDirectory() as name:
        root = store_with_database(Path(name) / "served")
        with faulty_mlflow(root, SLOW_SECONDS) as proxy, Training(Path(name), proxy) as run:
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                for state in random.sample(STATES, len(STATES)):
                    turns += [("between", run.turn("off", window)), (state, run.turn(state, window))]
            turns.append(("between", run.turn("off", window)))
            steps = run.finish()
    medians = [
        statistics.median(s for when, s in steps if began <= when and when + s <= end) for _, (began, end) in turns
    ]
    found: dict[str, list[float]] = defaultdict(list)
    for i in range(1, len(turns), 2):
        found[turns[i][0]].append(2 * medians[i] / (medians[i - 1] + medians[i + 1]))
    step_ms = 1000 * statistics.median(medians[::2])
    return {
        state: {
            "ratio": statistics.median(found[state]),
            "ratios": sorted(found[state]),
            "tracker_cores": statistics.mean(run.tracker_cores[state] or [0.0]),
            "step_ms_without_tracking": step_ms,
        }
        for state in STATES
    }


def main() -> None:
    """Print a table, and write the numbers to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--window", type=float, default=2.0, help="seconds of a turn")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    numbers = measure(asked.rounds, asked.window)
    step_ms = numbers["off"]["step_ms_without_tracking"]
    print(f"step time over that without tracking ({step_ms:.1f} ms), {asked.rounds} turns of {asked.window:g} s each")
    print("MLflow           median    lowest   highest   cores of the tracking process")
    for state, each in numbers.items():
        low, high = each["ratios"][0], each["ratios"][-1]
        print(f"{state:<14} {each['ratio']:8.3f} {low:9.3f} {high:9.3f} {each['tracker_cores']:12.3f}")
    if asked.output:
        write_measurements(asked.output, numbers, ("ropewalk", "torch", "mlflow"))


if __name__ == "__main__":
    main()
