"""The `ropewalk` command, as a user types it, on a small pipeline file of the user's own."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

PIPELINE = '''
"""A user's own pipeline file, with a stage of its own."""
import json
from pydantic import BaseModel, ConfigDict
from ropewalk.infra.step import Pipeline, Step

NAME, VERSION = "doubling", 1


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    value: int = 2
    rate: float = 0.5


def run(config, inputs, output, context):
    if config.value == 13:
        raise ValueError("value: 13 is not allowed")
    if config.value == 60:
        import time
        time.sleep(60)
    base = json.loads((inputs["before"] / "v.json").read_text()) if "before" in inputs else 1
    (output.data / "v.json").write_text(json.dumps(base * config.value))
    context.log({"value": config.value})


def pipeline(*, start: int = 2) -> Pipeline:
    import sys
    this = sys.modules[__name__]
    first = Step("first", this, Config(value=start))
    second = Step("second", this, Config(value=3), inputs={"before": first})
    return Pipeline("doubling", (first, second))
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "doubling.py").write_text(PIPELINE)
    return folder


def ropewalk(home, *arguments, code=0):
    environment = {**os.environ, "ROPEWALK_STORE": str(home / "store")}
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def last_json(done):
    return json.loads(done.stdout.rstrip("\n").splitlines()[-1])


@pytest.fixture(scope="module")
def first_run(home):
    return last_json(ropewalk(home, "run", "doubling.py", "--executor", "local", "--json"))


def test_run_json_has_the_documented_shape(first_run):
    assert list(first_run) == ["run_id", "pipeline", "status", "mlflow_run_id", "steps"]
    assert first_run["pipeline"] == "doubling" and first_run["status"] == "succeeded"
    for step in first_run["steps"]:
        assert list(step) == ["name", "status", "key", "output", "seconds", "reason"]
        assert step["status"] == "ran" and len(step["key"]) == 64 and set(step["output"]) == {"uri", "digest"}
    assert json.loads((Path(first_run["steps"][1]["output"]["uri"]) / "v.json").read_text()) == 6


def test_a_run_tells_its_id_in_mlflow_if_mlflow_has_it_already_and_sync_tells_it_in_any_case(home, first_run):
    synced = last_json(ropewalk(home, "sync", first_run["run_id"], "--json"))
    assert isinstance(synced["mlflow_run_id"], str)
    assert first_run["mlflow_run_id"] in (None, synced["mlflow_run_id"])


def test_a_second_run_reuses_everything(home, first_run):
    again = last_json(ropewalk(home, "run", "doubling.py", "--executor", "local", "--json"))
    assert [s["status"] for s in again["steps"]] == ["reused", "reused"]
    assert [s["output"] for s in again["steps"]] == [s["output"] for s in first_run["steps"]]


def test_plan_says_what_would_run_and_why(home, first_run):
    plan = last_json(ropewalk(home, "plan", "doubling.py", "--set", "second.value=4", "--json"))
    assert [(s["name"], s["status"]) for s in plan["steps"]] == [("first", "reuse"), ("second", "run")]
    assert plan["steps"][1]["reason"] == "config value 3 -> 4"
    ropewalk(home, "plan", "doubling.py", "--exit-code", code=0)
    ropewalk(home, "plan", "doubling.py", "--set", "first.value=5", "--exit-code", code=2)
    changed = last_json(ropewalk(home, "plan", "doubling.py", "--param", "start=5", "--json"))
    assert changed["steps"][1] == {
        "name": "second",
        "status": "may-run",
        "key": None,
        "reason": "depends on the output of first",
        "reasons": [{"kind": "upstream", "text": "depends on the output of first", "steps": ["first"]}],
        "selected": True,
    }


def test_explain_names_the_changed_fields(home, first_run):
    told = ropewalk(home, "explain", "doubling.py", "second", "--set", "second.rate=0.25").stdout
    assert "changed: config rate 0.5 -> 0.25" in told
    document = last_json(ropewalk(home, "explain", "doubling.py", "first", "--json"))
    assert document["status"] == "reuse" and document["changes"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "doublin"), "no pipeline is called 'doublin'"),
        (("run", "missing.py"), "pipeline file missing.py does not exist"),
        (("run", "doubling.py", "--set", "secnd.value=1"), "no step is called 'secnd'; did you mean 'second'?"),
        (("run", "doubling.py", "--set", "second.valeu=1"), "no field is called 'valeu'; did you mean 'value'?"),
        (("run", "doubling.py", "--set", "second.value=abc"), "second.value: Input should be a valid integer"),
        (("run", "doubling.py", "--set", "value=1"), "write it as step.field=value"),
        (("run", "doubling.py", "--param", "strt=1"), "no parameter is called 'strt'; did you mean 'start'?"),
        (("run", "doubling.py", "--param", "start=x"), "--param start"),
        (("run", "doubling.py", "--only", "thrid"), "no step is called 'thrid'"),
        (("run", "doubling.py", "--executor", "slurm"), "'--executor': 'slurm' is not one of 'ray', 'local'"),
        (("run", "doubling.py", "--force", "first", "--address", "foo"), "--address foo: write it as HOST:PORT"),
        (
            ("run", "doubling.py", "--force", "first", "--address", "127.0.0.1:9"),
            "--address 127.0.0.1:9: no Ray cluster answers there",
        ),
        (("run", "doubling.py", "--force", "first", "--address", "http://head:8265"), "`ropewalk submit`"),
        (("run", "doubling.py", "--run-id", "../x"), "--run-id ../x"),
        (("run", "doubling.py", "--max-parallel", "0"), "'--max-parallel'"),
        (("run", "doubling.py", "--with-upstream"), "--with-upstream goes with --only"),
        (("plan", "doubling.py", "--force", "third"), "no step is called 'third'"),
        (("run", "doubling.py", "--store", "ftp://host"), "--store ftp://host"),
        (("explain", "doubling.py", "third"), "no step is called 'third'"),
        (("show", "20200101-000000-0000"), "no run is called '20200101-000000-0000'"),
    ],
)
def test_bad_input_gets_one_sentence_that_names_it(home, first_run, arguments, message):
    done = ropewalk(home, *arguments, code=1)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "should not happen" not in done.stderr
    assert message in last_json(ropewalk(home, *arguments, "--json", code=1))["error"]


def test_a_failing_stage_is_told_in_one_sentence_with_the_traceback_in_its_log(home, first_run):
    done = ropewalk(home, "run", "doubling.py", "--executor", "local", "--set", "second.value=13", "--json", code=1)
    result = last_json(done)
    assert result["status"] == "failed"
    assert result["steps"][1] | {"key": "", "seconds": 0} == {
        "name": "second",
        "status": "failed",
        "key": "",
        "output": None,
        "seconds": 0,
        "reason": "value: 13 is not allowed",
    }
    logs = list((home / "store/runs" / result["run_id"] / "logs/second").glob("*.log"))
    assert "Traceback" in logs[0].read_text()


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_ctrl_c_cancels_the_run_and_commits_nothing_half_done(home, first_run, executor):
    words = ("run", "doubling.py", "--executor", executor, "--set", "second.value=60", "--json")
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", *words]
    environment = {**os.environ, "ROPEWALK_STORE": str(home / "store"), "ROPEWALK_GRACE_SECONDS": "1"}
    driver = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not any(run["pid"] == driver.pid and run["running"] for run in running_runs(home)):
        assert time.monotonic() - began < 90 and driver.poll() is None
        time.sleep(0.5)
    if executor == "ray":
        time.sleep(3)  # the step is on its way to a worker
    driver.send_signal(signal.SIGINT)
    if executor == "ray":
        driver.send_signal(signal.SIGINT)  # twice: at once, for a stage that does not ask whether it is cancelled
    output, _ = driver.communicate(timeout=60)
    result = json.loads(output.splitlines()[-1])
    assert driver.returncode == 130 and result["status"] == "cancelled"
    assert [step["status"] for step in result["steps"]] == ["reused", "failed"]
    assert not (home / "store/objects" / result["steps"][1]["key"] / "commits").exists()


def running_runs(home):
    runs = last_json(ropewalk(home, "status", "--json"))["runs"]
    return [{**run, **json.loads((home / "store/runs" / run["run_id"] / "run.json").read_text())} for run in runs]


def test_status_show_and_rerun_speak_of_runs(home, first_run):
    runs = last_json(ropewalk(home, "status", "--json"))["runs"]
    assert first_run["run_id"] in {run["run_id"] for run in runs}
    shown = last_json(ropewalk(home, "show", first_run["run_id"], "second", "--json"))
    assert shown["config"]["value"] == 3 and shown["metrics"] == {"value": 3} and Path(shown["log"]).exists()
    again = last_json(ropewalk(home, "rerun", first_run["run_id"], "first", "--executor", "local", "--json"))
    assert [s["status"] for s in again["steps"]] == ["ran", "reused"]
    text = ropewalk(home, "status").stdout + ropewalk(home, "show", "last").stdout
    assert "doubling" in text


def test_rerun_asks_for_the_failed_part_or_a_part_from_a_step_on(home, first_run):
    words = ("run", "doubling.py", "--executor", "local", "--json")
    failed = last_json(ropewalk(home, *words, "--set", "second.value=13", code=1))["run_id"]
    again = last_json(ropewalk(home, "rerun", failed, "--failed", "--executor", "local", "--json", code=1))
    assert [s["status"] for s in again["steps"]] == ["reused", "failed"]
    only = last_json(ropewalk(home, *words, "--only", "first"))["run_id"]
    same = last_json(ropewalk(home, "rerun", only, "--executor", "local", "--json"))
    assert [s["status"] for s in same["steps"]] == ["reused", "reused"]
    second = last_json(ropewalk(home, "rerun", only, "--from", "second", "--executor", "local", "--json"))
    assert [(s["status"], s["reason"]) for s in second["steps"]] == [("reused", "up to date"), ("ran", "forced")]
    refused = last_json(ropewalk(home, "rerun", only, "--failed", "--json", code=1))["error"]
    assert refused == f"no step of run {only} failed; `ropewalk rerun {only}` asks for all of it again"
    both = last_json(ropewalk(home, "rerun", only, "second", "--failed", "--json", code=1))["error"]
    assert both == "rerun --failed chooses the steps itself; leave the other choice out"


def test_plan_shows_what_a_selection_would_do(home, first_run):
    plan = last_json(ropewalk(home, "plan", "doubling.py", "--only", "second", "--force", "second", "--json"))
    assert [(s["status"], s["selected"], s["reason"]) for s in plan["steps"]] == [
        ("reuse", False, "up to date"),
        ("run", True, "forced"),
    ]
    ropewalk(home, "plan", "doubling.py", "--set", "second.value=4", "--only", "first", "--exit-code", code=0)
    text = ropewalk(home, "plan", "doubling.py", "--only", "second").stdout
    assert "not selected" in text


def test_show_tells_every_attempt(home, first_run):
    failed = last_json(
        ropewalk(home, "run", "doubling.py", "--executor", "local", "--set", "second.value=13", "--json", code=1)
    )["run_id"]
    (attempt,) = last_json(ropewalk(home, "show", failed, "second", "--json"))["attempts"]
    assert attempt["kind"] == "user" and attempt["error"] == "value: 13 is not allowed"


def test_status_watch_goes_on_until_ctrl_c(home, first_run):
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", "status", "--watch", "--store", str(home / "store")]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(4)
    watching.send_signal(signal.SIGINT)
    shown, _ = watching.communicate(timeout=20)
    assert watching.returncode == 0 and first_run["run_id"] in shown and "Ctrl-C ends this" in shown


def test_logs_show_what_a_step_reported(home, first_run):
    title, line = ropewalk(home, "logs", first_run["run_id"], "second").stdout.splitlines()
    assert title == "==> second, attempt 1 <==" and line.endswith(" value 3")


def test_version_is_that_of_the_installed_package(home):
    assert ropewalk(home, "--version").stdout == f"ropewalk {metadata.version('ropewalk')}\n"


def test_plan_and_help_import_nothing_heavy(home):
    code = (
        "import sys\nfrom ropewalk.pipelines.plan_commands import make_plan\n"
        "make_plan({'pipeline': 'quickstart', 'set': [], 'param': []}, sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'ray', 'mlflow', 'datasets', 'deepspeed', 'pyarrow', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(home / "elsewhere")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
