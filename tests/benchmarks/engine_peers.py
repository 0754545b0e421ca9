"""The same chain of 20 trivial steps in Ropewalk and in other tools: cold, fully cached, and its last step changed.

Every tool runs its most natural form of the chain with its fastest ordinary setting (`Tool.setting`), from its command
line, interpreter included, on local disk, in an environment of its own with the versions in `peers/`. The tools take
turns, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_projects import TOOLS, Tool
from timings import Sample, progress, summary, timed_command
from tracking_process import await_tracking

CASES = ("cold", "cached", "one changed")
REQUIREMENTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Installed:
    """A tool and where its programs are."""

    tool: Tool
    programs: Path

    def version(self) -> str:
        """As pip tells it."""
        code = f"from importlib.metadata import version; print(version({self.tool.name!r}))"
        python = str(self.programs / "python")
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def install(names: list[str], environments: Path) -> Iterator[Installed]:
    """Make an environment for each tool that has none yet; one that cannot be made is told of and left out."""
    for name in names:
        folder = environments / name
        if not (folder / "complete").exists():
            progress(f"  installing {name}")
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*pip, "-r", str(REQUIREMENTS / f"{name}.txt")], capture_output=True, text=True)
            if done.returncode:
                print(f"{name} is left out, it does not install: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            (folder / "complete").touch()
        yield Installed(TOOLS[name], folder / "bin")


def measure(folder: Path, repetitions: int, names: list[str], environments: Path) -> dict[str, Any]:
    """Seconds of each case for each tool, and of what Ropewalk's tracking process takes after the cold run."""
    installed = [*install(names, environments), Installed(TOOLS["ropewalk"], Path(sys.executable).parent)]
    samples = {(each.tool.name, case): [] for case in CASES for each in installed}
    tracking: list[Sample] = []
    for repetition in range(repetitions + 1):
        for each in installed[repetition % len(installed) :] + installed[: repetition % len(installed)]:
            where = folder / f"{each.tool.name}-{repetition}"
            where.mkdir()
            for case, sample in _one_round(each, where, tracking):
                # The first round compiles every tool's modules and fills the caches.
                samples[each.tool.name, case] += [sample] if repetition else []
                progress(f"  round {repetition} of {repetitions}, {each.tool.name}, {case}: {sample.wall:.2f} s")
            shutil.rmtree(where)
    best = {case: min(_median(samples[name, case]) for name in names if samples[name, case]) for case in CASES}
    numbers = {
        f"{case}: {name}": summary(found, best[case] if name == "ropewalk" else None)
        for (name, case), found in samples.items()
        if found
    }
    numbers["afterwards in the background: ropewalk's tracking"] = summary(tracking)
    return {"times": numbers, "tools": {i.tool.name: f"{i.version()}, {i.tool.setting}" for i in installed}}


def _one_round(each: Installed, where: Path, tracking: list[Sample]) -> Iterator[tuple[str, Sample]]:
    tool = each.tool
    for command in tool.prepare(where):
        timed_command([str(each.programs / command[0]), *command[1:]], where, tool.environment(where))
    for case in CASES:
        changed = case == "one changed"
        if changed:
            tool.change(where)
        command = tool.command(changed)
        yield case, timed_command([str(each.programs / command[0]), *command[1:]], where, tool.environment(where))
        result = tool.result(where)
        assert result in (None, 21 if changed else 20), f"{tool.name}, {case}: the chain ended with {result}"
        if tool.name == "ropewalk":
            seconds = await_tracking(where / "store")
            if case == "cold":
                tracking.append(Sample(seconds, 0.0))


def _median(samples: list[Sample]) -> float:
    return summary(samples)["median"]
