"""The quickstart with our attention and with torch's own: time from end to end, and whether the losses are the same.

    python tests/benchmarks/attention_in_chain.py --output attention_in_chain.json

Three runs of the command line, in new stores under a temporary folder: all on `ropewalk`, all on `sdpa`, and the first
once more with `extend` alone on `sdpa`, which starts from the same base model. Losses of two trainings drift apart by
rounding as steps add up, so they are compared step by step. A quarter of an hour and more on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from measurements import write_measurements

COMMAND = Path(sys.executable).with_name("ropewalk")
STEPS = ("base", "extend", "evaluate")
PACKAGES = ("torch", "transformers", "deepspeed", "ray")


def main() -> None:
    """Run, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="write the numbers to this JSON file")
    parser.add_argument("--pipeline", default="quickstart", help="one with the steps base, extend and evaluate")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = run(asked.pipeline, Path(folder) / "ropewalk", {})
        torchs = run(asked.pipeline, Path(folder) / "sdpa", dict.fromkeys(STEPS, "sdpa"))
        extended = run(asked.pipeline, Path(folder) / "ropewalk", {"extend": "sdpa"})
        numbers = {
            "seconds": {"ropewalk": ours["seconds"], "sdpa": torchs["seconds"]},
            "extend_from_the_same_base": compare(losses(ours, "extend"), losses(extended, "extend")),
            "base": compare(losses(ours, "base"), losses(torchs, "base")),
            "evaluation": {"ropewalk": evaluation(ours), "sdpa": evaluation(torchs)},
        }
    write_measurements(asked.output, numbers, PACKAGES)
    print(json.dumps(numbers, indent=1))


def run(pipeline: str, store: Path, implementations: dict[str, str]) -> dict[str, Any]:
    """What `ropewalk run --json` says, and under `seconds` those of the whole and of the steps that ran."""
    settings = [f"{step}.attention_implementation={name}" for step, name in implementations.items()]
    command = [str(COMMAND), "run", pipeline, "--store", str(store), "--json"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *(part for setting in settings for part in ("--set", setting))], stdout=subprocess.PIPE, check=True
    )
    whole = time.monotonic() - began
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seconds = {step["name"]: step["seconds"] for step in report["steps"] if step["status"] == "ran"}
    report["seconds"] = {"whole": whole, **{name: seconds[name] for name in STEPS if name in seconds}}
    return report


def folder_of(report: dict[str, Any], name: str) -> Path:
    """The output of a step."""
    uri = next(step["output"]["uri"] for step in report["steps"] if step["name"] == name)
    return Path(uri.removeprefix("file://"))


def losses(report: dict[str, Any], name: str) -> list[float]:
    """Of each optimiser step of a training."""
    lines = (folder_of(report, name) / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def compare(ours: list[float], torchs: list[float]) -> dict[str, float]:
    """Relative differences: of the first step, the largest of the first ten and of all, of the last."""
    differences = [abs(a - b) / b for a, b in zip(ours, torchs, strict=True)]
    return {
        "first": differences[0],
        "largest_of_first_ten": max(differences[:10]),
        "largest": max(differences),
        "last": differences[-1],
        "last_loss_ropewalk": ours[-1],
        "last_loss_sdpa": torchs[-1],
    }


def evaluation(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The share of facts found, by model and length."""
    summary = json.loads((folder_of(report, "evaluate") / "summary.json").read_text(encoding="utf-8"))
    return [row for row in summary["scores"] if row["task"] == "all"]


if __name__ == "__main__":
    main()
