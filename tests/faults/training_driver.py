"""Trains a tiny model on Ray, two ranks. Started, and killed, by test_training_kill."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import ray_stages
from training_examples import config, counting_rows, write_rows, write_tokenizer

from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.step import External, Pipeline, Resources, Retries, Step
from ropewalk.stages.training import train

NUM_STEPS = 6
"""Checkpoints are after every second one."""
STAGES = {"train": train, "killed": ray_stages.killed_train}


def pipeline(folder: Path, stage: str) -> Pipeline:
    """One training, with its inputs in a folder, made if they are not there."""
    if not (folder / "rows").exists():
        info = write_tokenizer(folder / "tokenizer")
        write_rows(folder / "rows", counting_rows(40, 32), info)
    inputs = {"rows": External(str(folder / "rows")), "tokenizer": External(str(folder / "tokenizer"))}
    settings = config(zero_stage=3, world_size=2, phases=[{"rows": "rows", "num_steps": NUM_STEPS}])
    step = Step(stage, STAGES[stage], settings, inputs, Resources(num_cpus=0), retries=Retries(backoff_seconds=0.1))
    return Pipeline("training", (step,))


if __name__ == "__main__":
    inputs_folder, store = sys.argv[1:]
    trained = pipeline(Path(inputs_folder), "train")
    engine.run(trained, store, executor=RayExecutor(trained))
