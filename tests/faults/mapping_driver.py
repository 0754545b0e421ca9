"""Runs the cubes on a Ray cluster. Started, and killed, by test_ray_maps."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import ray_stages

from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.step import Pipeline, Resources, Step


def pipeline(num_workers: int) -> Pipeline:
    """The cubes on a cluster with two seats."""
    seat = Resources(num_cpus=0, custom={"seat": 2 / num_workers})
    waits = Resources(num_cpus=0)
    return Pipeline("p", (Step("s", ray_stages.cubes, ray_stages.Nothing(), resources=waits, worker_resources=seat),))


if __name__ == "__main__":
    address, store = sys.argv[1:]
    mapped = pipeline(2)
    engine.run(mapped, store, executor=RayExecutor(mapped, address))
