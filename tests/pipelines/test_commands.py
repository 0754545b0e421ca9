"""What holds for every command, asked of the registry itself, so that a new command cannot forget it."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
from typer.main import get_command

from ropewalk.pipelines.cli import app
from ropewalk.pipelines.options import (
    PipelineOptions,
    PolicyOptions,
    SelectionOptions,
    as_arguments,
)

COMMANDS = get_command(app).commands
ROPEWALK = [sys.executable, "-m", "ropewalk.pipelines.cli"]
NAMED = {"pipeline", "step", "set_", "param", "only", "from_", "until", "force", "run_id", "store", "pin", "unpin"}
"""Parameters that name something which the shell can complete."""
CHOOSES_ITSELF = {("run", "run_id")}
"""A new name, of which there are none to offer."""


def names(group):
    return {each.name for each in fields(group)}


def taken_by(command):
    return {parameter.name for parameter in COMMANDS[command].params}


def ropewalk(folder, *words, **variables):
    environment = {**os.environ, "ROPEWALK_STORE": str(folder / "store"), "HOME": str(folder), **variables}
    return subprocess.run([*ROPEWALK, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def words_that_fail(command):
    """A call of a command that cannot succeed: every argument names nothing."""
    required = [each for each in COMMANDS[command].params if each.required]
    arguments = ["nothing" for each in required if each.param_type_name == "argument"]
    options = [word for each in required if each.param_type_name == "option" for word in (each.opts[0], "nothing")]
    return [command, *arguments, *options]


def test_the_commands_are_these():
    assert sorted(COMMANDS) == sorted(
        [
            "run",
            "plan",
            "explain",
            "graph",
            "submit",
            "status",
            "show",
            "logs",
            "rerun",
            "cancel",
            "sync",
            "ui",
            "verify",
            "gc",
            "adopt",
            "doctor",
        ]
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_debug_and_a_store_and_shows_an_example(name):
    assert {"as_json", "debug", "store"} <= taken_by(name)
    command = COMMANDS[name]
    assert f"Example: ropewalk {name}" in command.help
    assert command.help.split("\n\n")[0].endswith(".")
    for parameter in command.params:
        assert parameter.help or parameter.name == "help", f"{name} does not say what {parameter.name} is"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_completes_what_has_a_name(name):
    for parameter in COMMANDS[name].params:
        if parameter.name in NAMED and (name, parameter.name) not in CHOOSES_ITSELF:
            assert parameter._custom_shell_complete is not None, f"{name} does not complete {parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_fails_says_so_in_one_sentence_and_in_json(name, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = ropewalk(tmp_path, *words_that_fail(name), "--json", "--store", str(tmp_path / "file"))
    assert done.returncode == 1, done.stdout + done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    if name == "doctor":
        assert [check["name"] for check in last["checks"] if check["ok"] is False] == ["store"]
        return
    assert done.stderr.splitlines()[-1] == f"ropewalk: {last['error']}" and "Traceback" not in done.stderr
    assert "should not happen" not in last["error"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_word_that_a_command_does_not_know_is_refused_in_one_sentence_and_in_json(name, tmp_path):
    done = ropewalk(tmp_path, name, "--no-such-option", "--json")
    message = json.loads(done.stdout.splitlines()[-1])["error"]
    assert done.returncode == 1 and "--no-such-option" in message and f"`ropewalk {name} --help`" in message
    assert done.stderr.splitlines() == [f"ropewalk: {message}"]


@pytest.mark.parametrize("name", ["run", "submit", "rerun"])
def test_whatever_starts_a_run_takes_all_that_chooses_and_steers_one(name):
    assert names(SelectionOptions) | names(PolicyOptions) <= taken_by(name)


@pytest.mark.parametrize("name", ["run", "plan", "explain", "graph", "submit", "verify"])
def test_whatever_takes_a_pipeline_takes_its_settings(name):
    assert names(PipelineOptions) <= taken_by(name)


def test_what_submit_sends_to_the_cluster_asks_for_the_same():
    what = PipelineOptions(pipeline="mine.py", set_=["a.b=-1", "a.c=x y"], param=["p=1"])
    which = SelectionOptions(
        only=["a", "b"],
        from_=["c"],
        until=["d"],
        force=["a"],
        with_upstream=True,
        rerun_failed=True,
        rerun_drifted=True,
    )
    how = PolicyOptions(on_locked="skip", fail_fast=True, max_parallel=3, wait_for_resources=60.0)
    for group in (what, which, how):
        unset = [each.name for each in fields(group) if not getattr(group, each.name)]
        assert unset == [], "every option is tried"
    words = ["mine.py", *as_arguments(what), *as_arguments(which), *as_arguments(how)]
    with COMMANDS["run"].make_context("run", words) as context:
        got = SimpleNamespace(**context.params)
    for group in (what, which, how):
        for each in fields(group):
            value = getattr(got, each.name)
            assert (list(value) if isinstance(value, tuple) else value) == getattr(group, each.name), each.name


def test_what_is_left_at_its_default_is_not_sent():
    assert as_arguments(SelectionOptions()) == [] and as_arguments(PolicyOptions()) == []


def test_help_lists_the_commands_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom ropewalk.pipelines.cli import main\nsys.argv = ['ropewalk', '-h']\n"
        "try: main()\n"
        "finally: print({'ray', 'torch', 'mlflow', 'obstore', 'pyarrow', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n" and all(f" {name} " in done.stdout for name in COMMANDS)
