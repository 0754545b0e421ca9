"""A pipeline file as a user would submit it: two steps, the second on the cluster's second node only."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from submitted_library import times

from ropewalk.infra import step as engine
from ropewalk.infra.step import Pipeline, Resources, Step

NAME, VERSION = "submitted", 1


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    value: int
    fails: bool = False


def run(config, inputs, output, context):
    """Multiplies; waits as long as the file GATE exists, and says in which world it runs."""
    print("greeting:", os.environ.get("GREETING"), flush=True)
    before = json.loads((inputs["before"] / "value.json").read_text()) if "before" in inputs else 1
    gate = os.environ.get("GATE")
    while gate and "before" in inputs and Path(gate).exists():
        time.sleep(0.1)
        if context.cancelled():
            raise RuntimeError("cancelled at the gate")
    if config.fails:
        raise ValueError("value: this step fails")
    (output.data / "value.json").write_text(json.dumps(times(before, config.value)))
    (output.observed / "world.json").write_text(json.dumps(world()))


def world() -> dict[str, object]:
    """Where the code of this process comes from."""
    import ray

    kernels = importlib.util.find_spec("kernels")
    return {
        "ropewalk": engine.__file__,
        "library": sys.modules["submitted_library"].__file__,
        "kernels": kernels and [kernels.origin, *(kernels.submodule_search_locations or ())],
        "node": ray.get_runtime_context().get_node_id(),
    }


def pipeline(*, fails: bool = False) -> Pipeline:
    """first, then second."""
    this = sys.modules[__name__]
    first = Step("first", this, Config(value=3))
    on_second = Resources(custom={"second": 1})
    second = Step("second", this, Config(value=5, fails=fails), inputs={"before": first}, resources=on_second)
    return Pipeline("submitted", (first, second))
