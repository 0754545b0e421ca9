"""What the shell offers on TAB, asked as the shells ask: through environment variables, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from ropewalk.pipelines.cli import app

ROPEWALK = str(Path(sys.executable).with_name("ropewalk"))
COMPLETED = {"pipeline", "step", "set_", "param", "only", "from_", "until", "force"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a pipeline file and a store that holds two runs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.py").write_text(
        "from pydantic import BaseModel\n"
        "from ropewalk.infra.step import Pipeline, Step\n"
        "class Config(BaseModel):\n    learning_rate: float = 1.0\n    seed: int = 0\n"
        "class stage:\n    NAME, VERSION = 'stage', 1\n"
        "def pipeline(*, corpus: str = 'a'):\n"
        "    first = Step('first', stage, Config())\n"
        "    return Pipeline('mine', (first, Step('second', stage, Config(), inputs={'a': first})))\n"
    )
    (folder / "notes.txt").write_text("")
    (folder / "broken.py").write_text("raise RuntimeError('half written')\n")
    for run_id in ("20260101-000000-aaaa", "20260102-000000-bbbb"):
        run = folder / ".ropewalk" / "runs" / run_id
        run.mkdir(parents=True)
        (run / "run.json").write_text("{}")
        steps = [{"name": "extend"}, {"name": "evaluate"}]
        (run / "events.jsonl").write_text(json.dumps({"type": "run_started", "steps": steps}) + "\n")
    return folder


def offered(home, line):
    """What bash would offer for the last word of the line."""
    words = line.split(" ")
    protocol = {"_ROPEWALK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [ROPEWALK], cwd=home, env={**os.environ, **protocol}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ropewalk gr", ["graph"]),
        ("ropewalk run qui", ["quickstart"]),
        ("ropewalk plan m", ["mine.py"]),
        ("ropewalk run mine.py --only s", ["second"]),
        ("ropewalk explain mine.py ", ["first", "second"]),
        ("ropewalk run mine.py --set second.", ["second.learning_rate=", "second.seed="]),
        ("ropewalk graph mine.py --param co", ["corpus="]),
        ("ropewalk show la", ["last"]),
        ("ropewalk sync 202", ["20260102-000000-bbbb", "20260101-000000-aaaa"]),
        ("ropewalk show last ex", ["extend"]),
        ("ropewalk rerun 20260101-000000-aaaa ev", ["evaluate"]),
        ("ropewalk run broken.py --only ", []),
        ("ropewalk show nothing ", []),
    ],
)
def test_the_word_under_the_cursor_is_completed(home, line, expected):
    assert offered(home, line) == expected


def test_every_command_completes_pipelines_runs_and_steps():
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            named = parameter.name in COMPLETED or (
                parameter.name == "run_id" and parameter.param_type_name == "argument"
            )
            if named:
                assert parameter._custom_shell_complete is not None, f"{name} does not complete {parameter.name}"


def test_the_installed_script_completes_in_bash(home, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(ROPEWALK).parent}:{os.environ['PATH']}"}
    install = ["bash", "-c", "ropewalk --install-completion; true"]
    done = subprocess.run(install, env=environment, capture_output=True, text=True, check=True)
    assert "completion installed" in done.stdout, done.stdout + done.stderr
    script = next((tmp_path / ".bash_completions").iterdir())
    assert script.name in (tmp_path / ".bashrc").read_text()
    ask = (
        f"source {script}; COMP_WORDS=(ropewalk explain mine.py f); COMP_CWORD=3;"
        " _ropewalk_completion ropewalk; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], cwd=home, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["first"], done.stderr
