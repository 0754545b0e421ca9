"""A training rank on Ray is killed between two checkpoints: weights, history and curves are those of a calm run."""

import pytest
from engine import run
from ray_stages import killed_train
from training_examples import config, counting_rows, write_rows, write_tokenizer

from ropewalk.infra.on_ray import RayExecutor
from ropewalk.infra.record import read_events
from ropewalk.infra.step import External, Pipeline, Resources, Retries, Step
from ropewalk.infra.store import Store
from ropewalk.stages.training import train

pytestmark = [pytest.mark.slow, pytest.mark.faults]
NUM_STEPS = 6


@pytest.fixture
def pipeline(tmp_path):
    """The same training twice, once with a rank that dies before step 4; checkpoints are after 2 and 4."""
    info = write_tokenizer(tmp_path / "tokenizer")
    inputs = {
        "rows": External(str(write_rows(tmp_path / "rows", counting_rows(40, 32), info))),
        "tokenizer": External(str(tmp_path / "tokenizer")),
    }
    settings = config(zero_stage=3, phases=[{"rows": "rows", "num_steps": NUM_STEPS}])
    execution = {"resources": Resources(num_cpus=0), "retries": Retries(backoff_seconds=0.1)}
    calm = Step("calm", train, settings, inputs, **execution)
    killed = Step("killed", killed_train, settings, inputs, **execution)
    return Pipeline("training", (calm, killed))


def test_a_killed_rank_costs_nothing_but_time(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    result = run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline))
    assert result.status == "succeeded", result
    calm, killed = (step.commit for step in result.steps)
    assert calm.digest == killed.digest
    for name in ("model.safetensors", "training.jsonl"):
        assert (calm.attempt.data / name).read_bytes() == (killed.attempt.data / name).read_bytes()

    events = list(read_events(Store(tmp_path / "store"), result.run_id))
    failed = [event for event in events if event["type"] == "attempt_failed"]
    assert [(event["step"], event["kind"]) for event in failed] == [("killed", "infrastructure")], failed
    for name in ("loss", "grad_norm", "learning_rate"):
        assert curve(events, "killed", name) == curve(events, "calm", name)
    assert [step for step, _ in curve(events, "killed", "loss")] == list(range(1, NUM_STEPS + 1))
    logs = tmp_path / "store" / "runs" / result.run_id / "logs" / "killed"
    assert any("resuming after step 2" in path.read_text() for path in logs.glob("*.rank0.log"))


def curve(events, step, name):
    """Points of a step's metric over all of its attempts."""
    metrics = [event for event in events if event["type"] == "metrics" and event["step"] == step]
    return [(event["metric_step"], event["metrics"][name]) for event in metrics if name in event["metrics"]]
