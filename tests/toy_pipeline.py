"""A pipeline file for commands in tests: the toys' diamond, and a step that goes on from its scratch folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

from toy_stages import Config, diamond

from ropewalk.infra.step import External, Pipeline, Step

NUM_ROUNDS = 6
GATE_AT = 3


class rounds:  # noqa: N801
    """Does some rounds and remembers them in its scratch folder; after some it waits while the file GATE exists."""

    NAME, VERSION = "rounds", 1

    @staticmethod
    def run(config, inputs, output, context):
        remembered, gate = context.work / "round", os.environ.get("GATE", "")
        done = int(remembered.read_text()) if remembered.exists() else 0
        print("begins after round", done, flush=True)
        for number in range(done + 1, NUM_ROUNDS + 1):
            (context.work / "new").write_text(str(number))
            (context.work / "new").replace(remembered)
            print("round", number, flush=True)
            while number == GATE_AT and gate and Path(gate).exists():
                if context.cancelled():
                    return
                time.sleep(0.05)
        (output.data / "value.json").write_text(str(NUM_ROUNDS))
        (output.observed / "begun.json").write_text(str(done))


class listing:  # noqa: N801
    """Writes the names of the files that it is given."""

    NAME, VERSION = "listing", 1

    @staticmethod
    def run(config, inputs, output, context):
        names = sorted(path.name for path in inputs["books"].rglob("*") if path.is_file())
        (output.data / "value.json").write_text(repr(names))


def pipeline(*, value: int = 3, kind: str = "diamond") -> Pipeline:
    """diamond: four steps; rounds: one that takes as long as the gate is closed; books: one that reads adopted data."""
    if kind == "rounds":
        return Pipeline("rounds", (Step("rounds", rounds, Config()),))
    if kind == "books":
        return Pipeline("books", (Step("list", listing, Config(), inputs={"books": External("adopted://books")}),))
    return diamond(value)
