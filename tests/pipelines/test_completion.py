"""What the shell offers on TAB, asked as the shells ask: through environment variables, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROPEWALK = str(Path(sys.executable).with_name("ropewalk"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a pipeline file and a store that holds two runs."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.py").write_text(
        "from pydantic import BaseModel\n"
        "from ropewalk.infra.step import Pipeline, Step\n"
        "class Inner(BaseModel):\n    factor: float = 1.0\n"
        "class Config(BaseModel):\n    learning_rate: float = 1.0\n    rope: Inner = Inner()\n"
        "class stage:\n    NAME, VERSION = 'stage', 1\n"
        "def pipeline(*, corpus: str = 'a'):\n"
        "    first = Step('first', stage, Config())\n"
        "    return Pipeline('mine', (first, Step('second', stage, Config(), inputs={'a': first})))\n"
    )
    (folder / "notes.txt").write_text("")
    (folder / "broken.py").write_text("raise RuntimeError('half written')\n")
    (folder / "ending.py").write_text("print('loading')\nraise SystemExit('not like this')\n")
    (folder / "talking.py").write_text(
        "import sys\nprint('hello')\nprint('hello', file=sys.stderr)\nfrom mine import pipeline\n"
    )
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
        ("ropewalk run mine.py --set second.", ["second.learning_rate=", "second.rope.factor="]),
        ("ropewalk graph mine.py --param co", ["corpus="]),
        ("ropewalk show la", ["last"]),
        ("ropewalk status --store .rope", [".ropewalk/"]),
        ("ropewalk adopt not", ["notes.txt"]),
        ("ropewalk run mine.py --executor l", ["local"]),
        ("ropewalk sync 202", ["20260102-000000-bbbb", "20260101-000000-aaaa"]),
        ("ropewalk show last ex", ["extend"]),
        ("ropewalk rerun 20260101-000000-aaaa ev", ["evaluate"]),
        ("ropewalk run broken.py --only ", []),
        ("ropewalk run ending.py --only ", []),
        ("ropewalk run talking.py --only ", ["first", "second"]),
        ("ropewalk show --store s3://nowhere/at-all ", ["last"]),
        ("ropewalk show nothing ", []),
    ],
)
def test_the_word_under_the_cursor_is_completed(home, line, expected):
    assert offered(home, line) == expected


def asked(home, shell, line):
    """What a shell other than bash is told."""
    protocol = {"_ROPEWALK_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    if shell == "fish":
        protocol["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    done = subprocess.run(
        [ROPEWALK], cwd=home, env={**os.environ, **protocol}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_zsh_and_fish_are_told_the_same(home, shell):
    told = asked(home, shell, "ropewalk explain mine.py ")
    assert "first" in told and "second" in told
    assert "second" not in asked(home, shell, "ropewalk explain mine.py f")
    assert "first" not in asked(home, shell, "ropewalk run broken.py --only ")


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


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_the_installed_script_completes_in_fish(home, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(ROPEWALK).parent}:{os.environ['PATH']}"}
    environment.pop("XDG_CONFIG_HOME", None)

    def fish(command):
        return subprocess.run(
            ["fish", "-c", command], cwd=home, env=environment, capture_output=True, text=True, check=True
        )

    assert "completion installed" in fish("ropewalk --install-completion; true").stdout
    for line, expected in (("ropewalk explain mine.py f", ["first"]), ("ropewalk run mine.py --set second.l", None)):
        done = fish(f"complete -C '{line}'")
        assert done.stdout.split() == (expected or ["second.learning_rate="]), done.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_the_installed_script_is_loaded_by_zsh(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(ROPEWALK).parent}:{os.environ['PATH']}"}
    environment.pop("ZDOTDIR", None)

    def zsh(command):
        return subprocess.run(["zsh", "-ic", command], env=environment, capture_output=True, text=True, check=True)

    assert "completion installed" in zsh("ropewalk --install-completion; true").stdout
    assert zsh("print -r -- $_comps[ropewalk]").stdout.split()[-1] == "_ropewalk"
