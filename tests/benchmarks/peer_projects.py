"""The chain of 20 trivial steps, each adding one to the number before it, as each tool's users would write it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import chain_pipeline

STEPS = [f"s{number:02d}" for number in range(1, 21)]
Command = list[str]


@dataclass(frozen=True)
class Tool:
    """How a tool runs the chain."""

    name: str
    setting: str
    prepare: Callable[[Path], list[Command]]
    """Writes the project and returns commands to run once; not timed."""
    command: Callable[[bool], Command]
    """The command that is timed, given whether the last step has changed."""
    change: Callable[[Path], None] = lambda folder: None
    """Makes the last step add two, where that is done in a file."""
    result: Callable[[Path], int | None] = lambda folder: None
    """The last step's number, where it is in a file."""
    environment: Callable[[Path], Mapping[str, str]] = lambda folder: {}


def _shell(number: int, amount: int = 1) -> str:
    """What a shell step does."""
    before = f"$(cat {STEPS[number - 1]}.txt)" if number else "0"
    return f"echo $(({before} + {amount})) > {STEPS[number]}.txt"


def _last_file(folder: Path) -> int:
    return int((folder / f"{STEPS[-1]}.txt").read_text())


def _replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new))

    return change


def _dvc(folder: Path) -> list[Command]:
    lines = ["stages:"]
    for number, name in enumerate(STEPS):
        lines += [f"  {name}:", f"    cmd: {_shell(number)}", f"    outs: [{name}.txt]"]
        lines += [f"    deps: [{STEPS[number - 1]}.txt]"] if number else []
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n")
    return [["dvc", "init", "--quiet", "--no-scm"], ["dvc", "config", "core.analytics", "false"]]


def _snakemake(folder: Path) -> list[Command]:
    rules = [f'rule all:\n    input: "{STEPS[-1]}.txt"\n']
    for number, name in enumerate(STEPS):
        source = f'    input: "{STEPS[number - 1]}.txt"\n' if number else ""
        rules.append(f'rule {name}:\n{source}    output: "{name}.txt"\n    shell: "{_shell(number)}"\n')
    (folder / "Snakefile").write_text("\n".join(rules))
    return []


REDUN = """
from redun import task

redun_namespace = "chain"

@task()
def count(before: int, amount: int) -> int:
    return before + amount

@task()
def chain(last: int = 1) -> int:
    number = 0
    for _ in range(19):
        number = count(number, 1)
    return count(number, last)
"""

PREFECT = """
import sys
from prefect import flow, task
from prefect.cache_policies import INPUTS, TASK_SOURCE

@task(cache_policy=INPUTS + TASK_SOURCE, persist_result=True)
def count(before: int, amount: int) -> int:
    return before + amount

@flow
def chain(last: int) -> int:
    number = 0
    for _ in range(19):
        number = count(number, 1)
    return count(number, last)

if __name__ == "__main__":
    assert chain(int(sys.argv[1])) == 19 + int(sys.argv[1])
"""


def _script(name: str, text: str) -> Callable[[Path], list[Command]]:
    def prepare(folder: Path) -> list[Command]:
        (folder / name).write_text(text)
        return []

    return prepare


def _prefect_environment(folder: Path) -> dict[str, str]:
    settings = {"HOME": str(folder / "home"), "LOGGING_LEVEL": "ERROR", "SERVER_ANALYTICS_ENABLED": "false"}
    settings["SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    return {**{f"PREFECT_{name}": value for name, value in settings.items()}, "DO_NOT_TRACK": "1"}


def _ropewalk(changed: bool) -> Command:
    change = ["--set", f"{STEPS[-1]}.amount=2"] if changed else []
    return ["ropewalk", "run", chain_pipeline.__file__, "--executor", "local", "--store", "store", *change]


_LAST = len(STEPS) - 1
TOOLS = {
    tool.name: tool
    for tool in (
        Tool("ropewalk", "Python stages, local executor", lambda folder: [], _ropewalk),
        Tool(
            "dvc",
            "shell steps, no git, no analytics",
            _dvc,
            lambda changed: ["dvc", "repro", "--quiet"],
            _replace("dvc.yaml", _shell(_LAST), _shell(_LAST, 2)),
            _last_file,
            lambda folder: {"DVC_NO_ANALYTICS": "1"},
        ),
        Tool(
            "snakemake",
            "shell steps, all cores",
            _snakemake,
            lambda changed: ["snakemake", "--cores", str(os.cpu_count()), "--quiet", "all"],
            _replace("Snakefile", _shell(_LAST), _shell(_LAST, 2)),
            _last_file,
        ),
        Tool(
            "redun",
            "Python tasks that pass numbers, sqlite, default executor",
            _script("workflow.py", REDUN),
            lambda changed: ["redun", "run", "workflow.py", "chain", *(["--last", "2"] if changed else [])],
        ),
        Tool(
            "prefect",
            "Python tasks that pass numbers, cached by inputs and source, temporary server",
            _script("flow.py", PREFECT),
            lambda changed: ["python", "flow.py", "2" if changed else "1"],
            environment=_prefect_environment,
        ),
    )
}
