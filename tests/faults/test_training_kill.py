"""Training on Ray is killed at a random step: weights, history and curves are those of a calm run."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine import run
from faults.training_driver import NUM_STEPS, pipeline
from shown_runs import client_of, shown_points, shown_runs

from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.record import read_events
from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking

pytestmark = [pytest.mark.slow, pytest.mark.faults]
DRIVER = Path(__file__).with_name("training_driver.py")
CURVES = ("loss", "grad_norm", "learning_rate")


@pytest.fixture(autouse=True)
def _own_cluster(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The undisturbed run, on other hardware as it were: in this process's children."""
    folder = tmp_path_factory.mktemp("calm")
    result = run(pipeline(folder, "train"), folder / "store")
    return folder, result.steps[0].commit


def curve(root, run_id, step, name):
    """What MLflow shows, by step; a point that is there twice would be here twice."""
    client = client_of(root)
    points = client.get_metric_history(shown_runs(client, run_id)[step].info.run_id, name)
    return [(point.step, point.value) for point in points]


def check_it_is_as_if_nothing_had_happened(calm, result, root, step):
    folder, commit = calm
    mine = result.steps[0].commit
    assert mine.digest == commit.digest
    for name in ("model.safetensors", "training.jsonl"):
        assert (mine.attempt.data / name).read_bytes() == (commit.attempt.data / name).read_bytes()
    (calm_run,) = (path.name for path in (folder / "store" / "runs").iterdir())
    for store in (folder / "store", root):
        tracking.sync(Store(store), result.run_id if store == root else calm_run)
    for name in CURVES:
        assert curve(root, result.run_id, step, name) == curve(folder / "store", calm_run, "train", name)
    assert [number for number, _ in curve(root, result.run_id, step, "loss")] == list(range(1, NUM_STEPS + 1))
    assert shown_points(client_of(root), result.run_id)


def test_a_rank_killed_at_a_random_step_costs_nothing_but_time(calm, tmp_path):
    at_step, root = random.randrange(NUM_STEPS), tmp_path / "store"
    root.mkdir()
    (root / "kill_at").write_text(str(at_step))
    killed = pipeline(calm[0], "killed")
    result = run(killed, root, executor=RayExecutor(killed))
    assert result.status == "succeeded", (at_step, result)
    failed = [event for event in read_events(Store(root), result.run_id) if event["type"] == "attempt_failed"]
    assert [(event["step"], event["kind"]) for event in failed] == [("killed", "infrastructure")], (at_step, failed)
    assert failed[0]["error"].startswith("rank 1 died (process "), failed
    assert len(failed[0]["error"]) < 200
    check_it_is_as_if_nothing_had_happened(calm, result, root, "killed")
    if at_step >= 2:
        logs = (root / "runs" / result.run_id / "logs" / "killed").glob("*.rank0.log")
        assert any(f"resuming after step {at_step // 2 * 2}" in path.read_text() for path in logs), at_step


def test_a_driver_killed_in_the_middle_of_training_costs_nothing_but_time(calm, tmp_path):
    root = tmp_path / "store"
    driver = subprocess.Popen([sys.executable, str(DRIVER), str(calm[0]), str(root)], env=os.environ)
    wanted = random.choice([2, 4])
    while not list(root.glob(f"work/*/*/checkpoints/step-{wanted:06d}")):
        assert driver.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    driver.kill()
    driver.wait()
    again = pipeline(calm[0], "train")
    result = run(again, root, executor=RayExecutor(again))
    assert result.status == "succeeded" and result.steps[0].status == "ran", result
    logs = (root / "runs" / result.run_id / "logs" / "train").glob("*.rank0.log")
    assert any("resuming after step" in path.read_text() for path in logs)
    check_it_is_as_if_nothing_had_happened(calm, result, root, "train")
