"""Time of a training step while MLflow is down, slow, failing or locked, against that while it is well.

    python tests/benchmarks/tracking_outage.py --pairs 5 --window 5

For each kind of outage one run through the command line, local executor, whose step trains a small network in steps of
equal work and reports each. While it trains, MLflow is made well and ill in turns, so that what else the machine does
falls on both alike; the first turn is an ill one, so that it is ill when the run begins. Printed is the median over
pairs of neighbouring turns of the ratio of their median step times. The claim: less than 5 percent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from faulty_proxy import FaultyProxy, faulty_mlflow
from pydantic import BaseModel, ConfigDict
from run_records import store_with_database

from ropewalk.infra.step import Pipeline, Step

CASES = ("refuse", "slow request", "slow answer", "500", "403", "401", "locked")
SLOW_SECONDS = 30.0
Switch = Callable[[bool], None]


class TrainingConfig(BaseModel):
    """A network and how long it trains."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    width: int = 384
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
        steps, end = [], time.time() + config.seconds
        while (when := time.time()) < end:
            began = time.perf_counter()
            loss = (model(batch) - batch.flip(0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            context.log({"loss": loss.item(), "learning_rate": 1e-3}, step=len(steps) + 1)
            steps.append((when, time.perf_counter() - began))
        (output.data / "steps.json").write_text(json.dumps(steps))


def pipeline(seconds: float = 30.0) -> Pipeline:
    """One training step."""
    return Pipeline("training", (Step("train", training, TrainingConfig(seconds=seconds)),))


@contextlib.contextmanager
def tracked(case: str, proxy: FaultyProxy, folder: Path) -> Iterator[tuple[str, Switch]]:
    """Where to track, and what makes it ill (True) or well."""
    if case != "locked":
        yield proxy.url, lambda ill: setattr(proxy, "fault", case if ill else "none")
        return
    path = store_with_database(folder / "locked") / "mlflow.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=60)) as database:
        yield f"sqlite:///{path}", lambda ill: database.execute("begin exclusive" if ill else "rollback") and None


def ratios(uri: str, switch: Switch, pairs: int, window: float) -> tuple[list[float], float]:
    """The ratio of each pair of turns, and the share of a core that the tracking process took while MLflow was ill."""
    cpu, turns = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ropewalk.pipelines.cli", "run", __file__, "--executor", "local", "--json"]
        options = ["--store", folder, "--param", f"seconds={2 * pairs * window + 1}"]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
        switch(True)
        driver = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
        while not any('"metrics"' in path.read_text() for path in Path(folder).glob("runs/*/events.jsonl")):
            assert driver.poll() is None
            time.sleep(0.05)
        tracker = next(child for child in psutil.Process(driver.pid).children() if "--follow" in child.cmdline())
        for number in range(2 * pairs):
            ill = number % 2 == 0
            if number:
                switch(ill)
            before, began = sum(tracker.cpu_times()[:2]), time.time()
            time.sleep(window)
            turns.append((began, time.time()))
            cpu += sum(tracker.cpu_times()[:2]) - before if ill else 0.0
        result = json.loads(driver.communicate()[0].splitlines()[-1])
        assert result["status"] == "succeeded"
        steps = json.loads((Path(result["steps"][0]["output"]["uri"]) / "steps.json").read_text())
    medians = [statistics.median(s for when, s in steps if began <= when and when + s <= end) for began, end in turns]
    return [medians[i] / medians[i + 1] for i in range(0, len(medians), 2)], cpu / (pairs * window)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--window", type=float, default=5.0, help="seconds of a turn")
    asked = parser.parse_args()
    print("MLflow          step time, ill / well: median   (lowest to highest)   tracking process, cores while ill")
    with tempfile.TemporaryDirectory() as name:
        root = store_with_database(Path(name) / "served")
        with faulty_mlflow(root, SLOW_SECONDS) as proxy:
            for case in random.sample(CASES, len(CASES)):
                with tracked(case, proxy, Path(name)) as (uri, switch):
                    found, cores = ratios(uri, switch, asked.pairs, asked.window)
                median, low, high = statistics.median(found), min(found), max(found)
                print(f"{case:<15} {median:28.3f}   ({low:.3f} to {high:.3f}) {cores:28.3f}", flush=True)


if __name__ == "__main__":
    main()
