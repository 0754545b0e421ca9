"""A chain of trivial steps: each adds one to the number of the step before it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ropewalk.infra.step import Pipeline, Step


class CountConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: int = 1


class count:  # noqa: N801
    """Writes its input's number plus its amount."""

    NAME, VERSION = "count", 1

    @staticmethod
    def run(config, inputs, output, context):
        before = int((inputs["before"] / "number.txt").read_text()) if inputs else 0
        (output.data / "number.txt").write_text(str(before + config.amount))


def pipeline(num_steps: int = 20) -> Pipeline:
    """s01 -> s02 -> ... -> s20"""
    steps: list[Step] = []
    for number in range(1, num_steps + 1):
        inputs = {"before": steps[-1]} if steps else {}
        steps.append(Step(f"s{number:02d}", count, CountConfig(), inputs))
    return Pipeline("chain", tuple(steps))
