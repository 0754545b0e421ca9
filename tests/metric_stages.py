"""A stage that reports a curve as training does: in steps, with checkpoints, all its history again after a resume."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ropewalk.infra.step import Pipeline, Retries, Step


class CurveConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_steps: int = 30
    step_seconds: float = 0.0
    checkpoint_every: int = 5
    fail_at: tuple[int, ...] = ()
    """The n-th attempt loses its network at the n-th of these steps."""


class curve:  # noqa: N801
    """Writes and reports loss = 1 / step, as a checkpoint with a sample and a plot."""

    NAME, VERSION = "curve", 1

    @staticmethod
    def run(config, inputs, output, context):
        saved = context.work / "checkpoint.json"
        history = json.loads(saved.read_text()) if saved.exists() else []
        for number, loss in enumerate(history, start=1):
            context.log({"loss": loss}, step=number)
        attempts = context.work / "attempts"
        attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
        fails = dict(enumerate(config.fail_at, start=1)).get(len(attempts.read_text()))
        for step in range(len(history) + 1, config.num_steps + 1):
            time.sleep(config.step_seconds)
            history.append(1 / step)
            context.log({"loss": history[-1]}, step=step)
            if step % config.checkpoint_every == 0:
                saved.write_text(json.dumps(history))
            if step == fails:
                raise ConnectionResetError("the network is gone")
        context.log({"num_steps": config.num_steps})
        (output.data / "artifact.json").write_text(
            json.dumps({"kind": "checkpoint", "counts": {"steps": len(history)}})
        )
        (output.data / "training.json").write_text(json.dumps(history))
        (output.data / "weights.bin").write_bytes(bytes(1000))


class judge:  # noqa: N801
    """Reports a score of the checkpoint that it is given, and writes a report."""

    NAME, VERSION = "judge", 1

    @staticmethod
    def run(config, inputs, output, context):
        score = len(json.loads((Path(inputs["model"]) / "training.json").read_text()))
        context.log({"score": score}, step=1024, about="model")
        (output.data / "artifact.json").write_text('{"kind": "report"}')
        (output.data / "report.html").write_text(f"<h1>{score}</h1>")


def pipeline(num_steps: int = 30, step_seconds: float = 0.0, fail_at: tuple[int, ...] = ()) -> Pipeline:
    """train -> evaluate"""
    config = CurveConfig(num_steps=num_steps, step_seconds=step_seconds, fail_at=fail_at)
    train = Step("train", curve, config, retries=Retries(max_attempts=5, backoff_seconds=0.01))
    return Pipeline("curves", (train, Step("evaluate", judge, CurveConfig(), inputs={"model": train})))
