"""The same graphs on Ray: steps as tasks, map and gang as Ray workers."""

import time

import pytest
from engine import run, statuses, value_of
from toy_stages import Config, NumberConfig, diamond, executions, failing, number, parallel, total

from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.record import read_events
from ropewalk.infra.step import Pipeline, Resources, Step, UserError
from ropewalk.infra.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("counter")]


def test_a_pipeline_on_ray_gives_the_digests_of_a_local_run(tmp_path):
    switch = tmp_path / "switch"
    switch.touch()
    # One Ray session for many behaviours: starting one costs seconds.
    base = diamond()
    both = [Step(f"slow{i}", number, NumberConfig(value=i, sleep_seconds=2.0)) for i in range(2)]
    bad = Step("bad", failing, NumberConfig(note=str(switch)))
    after = Step("after", total, NumberConfig(), inputs={"x": bad})
    workers = Step("workers", parallel, Config(), resources=Resources(num_cpus=0))
    pipeline = Pipeline("diamond", (*base.steps, *both, bad, after, workers))
    result = run(pipeline, tmp_path / "ray", executor=RayExecutor(pipeline))
    local = run(base, tmp_path / "local")
    assert statuses(result) == {
        **dict.fromkeys(("first", "left", "right", "last", "slow0", "slow1", "workers"), "ran"),
        "bad": "failed",
        "after": "skipped",
    }, result
    assert [s.commit.digest for s in result.steps[:4]] == [s.commit.digest for s in local.steps]
    assert value_of(result, "workers") == {
        "map": [0, 1, 4, 9, 16],
        "actors": [100, 101, 102, 103, 104],
        "gang": [2, 12],
        "work": True,
    }
    assert executions(tmp_path).count("number") == 4  # two here, one base, one local
    events = list(read_events(Store(tmp_path / "ray"), result.run_id))
    started = {e["step"]: e["time"] for e in events if e["type"] == "step_started"}
    ended = {e["step"]: e["time"] for e in events if e["type"] == "step_succeeded"}
    assert started["slow1"] < ended["slow0"] and started["slow0"] < ended["slow1"], "independent steps overlap"
    assert any(e["type"] == "metrics" and e["metrics"] == {"rank": 0} for e in events)
    logs = tmp_path / "ray/runs" / result.run_id / "logs"
    assert "hello from rank 1" in next((logs / "workers").glob("*.rank1.log")).read_text()
    assert " rank 0\n" in next((logs / "workers").glob("*.rank0.log")).read_text(), "what was reported"
    assert "the switch is on" in next((logs / "bad").glob("*.log")).read_text()


def test_a_step_that_no_cluster_can_hold_is_refused_at_once(tmp_path):
    greedy = Step("greedy", number, NumberConfig(), resources=Resources(num_gpus=64))
    pipeline = Pipeline("p", (greedy,))
    began = time.monotonic()
    with pytest.raises(UserError, match="step greedy needs 64 GPU; the cluster has 0"):
        run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline))
    assert time.monotonic() - began < 60
