"""Steps that each want the only GPU of a cluster run one after the other, beside those that want none."""

import json
import os
import time
from itertools import pairwise

import pytest
from engine import run
from ray_nodes import nodes
from toy_stages import NumberConfig

from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.step import Pipeline, Resources, Step, UserError

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def cluster():
    """A head, and a node that says it has one GPU."""
    with nodes() as cluster:
        cluster.add_node(num_cpus=4, num_gpus=1)
        yield cluster


class timed:  # noqa: N801
    """Tells when it ran and which GPU it was given."""

    NAME, VERSION = "timed", 1

    @staticmethod
    def run(config, inputs, output, context):
        began = time.time()
        time.sleep(1)
        (output.data / "value.json").write_text(str(config.value))
        told = {"began": began, "ended": time.time(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
        (output.observed / "told.json").write_text(json.dumps(told))


def told(result):
    return [json.loads((step.commit.attempt.observed / "told.json").read_text()) for step in result.steps]


def test_steps_with_a_gpu_each_take_turns_on_the_only_one(cluster, tmp_path):
    gpu = Resources(num_cpus=1, num_gpus=1)
    steps = [Step(f"gpu{number}", timed, NumberConfig(value=number), resources=gpu) for number in range(3)]
    pipeline = Pipeline("p", (*steps, Step("cpu", timed, NumberConfig(value=9))))
    result = run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline, cluster.address))
    assert result.status == "succeeded", result
    *turns, free = told(result)
    assert [turn["gpu"] for turn in turns] == ["0"] * 3 and free["gpu"] == ""
    turns.sort(key=lambda turn: turn["began"])
    assert all(first["ended"] <= second["began"] for first, second in pairwise(turns))


def test_more_gpus_than_a_node_has_are_refused_before_anything_runs(cluster, tmp_path):
    pipeline = Pipeline("p", (Step("s", timed, NumberConfig(), resources=Resources(num_gpus=2)),))
    with pytest.raises(UserError, match="step s needs 2 GPU; the cluster has 1 GPU on its largest node"):
        run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline, cluster.address))
