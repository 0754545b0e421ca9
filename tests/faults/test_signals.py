"""Ctrl-C, SIGTERM and `ropewalk cancel`: the run ends as cancelled, in time, with no lease and no process left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ropewalk.infra.lease import look
from ropewalk.infra.process import process_start
from ropewalk.infra.store import Store

TESTS = Path(__file__).parents[1]
PIPELINE = """
import sys
sys.path.insert(0, {tests!r})
import unruly_stages
from ropewalk.infra.step import Pipeline, Step

def pipeline(*, stage: str) -> Pipeline:
    config = unruly_stages.Config(folder={folder!r}, num_failures=1)
    first = Step("s", getattr(unruly_stages, stage), config)
    return Pipeline("waiting", (first, Step("after", unruly_stages.flaky, config, inputs={{"x": first}})))
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "waiting.py").write_text(PIPELINE.format(tests=str(TESTS), folder=str(tmp_path)))
    monkeypatch.setenv("ROPEWALK_STORE", str(tmp_path / "store"))
    return tmp_path


def start(home, stage, *trace):
    words = ["run", "waiting.py", "--param", f"stage={stage}", "--executor", "local", "--json"]
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", *words]
    driver = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not all((home / name).exists() for name in trace or (stage,)):
        assert driver.poll() is None and time.monotonic() - began < 60, driver.communicate()
        time.sleep(0.05)
    return driver


def children(pid):
    return [int(text) for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]


def end(driver):
    output, told = driver.communicate(timeout=60)
    result = json.loads(output.splitlines()[-1])
    assert driver.returncode == 130 and result["status"] == "cancelled", told
    return result, told


def check_nothing_is_left(home, result):
    assert [step["status"] for step in result["steps"]] == ["failed", "skipped"]
    assert "cancelled" in result["steps"][0]["reason"]
    store, key = Store(home / "store"), result["steps"][0]["key"]
    assert look(store.objects, key).released and not store.commits()
    last = (home / "store/runs" / result["run_id"] / "events.jsonl").read_text().splitlines()[-1]
    assert {"type": "run_finished", "status": "cancelled"}.items() <= json.loads(last).items()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_lets_the_stage_save_and_stop(home, monkeypatch, number):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "600")
    driver = start(home, "patient")
    driver.send_signal(number)
    result, told = end(driver)
    check_nothing_is_left(home, result)
    assert (home / "stopped").exists() and "cancelling: steps save and stop" in told


def test_a_stage_that_does_not_stop_is_interrupted_after_the_grace_period(home, monkeypatch):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "1")
    driver = start(home, "stubborn")
    driver.send_signal(signal.SIGINT)
    check_nothing_is_left(home, end(driver)[0])


def test_a_second_signal_does_not_wait_for_the_grace_period(home, monkeypatch):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "600")
    driver = start(home, "stubborn")
    driver.send_signal(signal.SIGINT)
    time.sleep(0.5)
    driver.send_signal(signal.SIGINT)
    result, told = end(driver)
    check_nothing_is_left(home, result)
    assert "cancelling: at once" in told


def test_the_ranks_of_a_gang_end_with_it(home, monkeypatch):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "1")
    driver = start(home, "gang", "rank0", "rank1")
    ranks = [(pid, process_start(pid)) for pid in children(driver.pid) if "spawn_main" in command_of(pid)]
    assert len(ranks) == 2
    driver.send_signal(signal.SIGTERM)
    check_nothing_is_left(home, end(driver)[0])
    assert not [pid for pid, started in ranks if process_start(pid) == started]


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_the_cancel_command_stops_a_run_of_this_machine(home, monkeypatch):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "600")
    driver = start(home, "patient")
    asked = cancel(home, "last")
    assert asked["driver"] == "alive" and not asked["now"]
    result, _ = end(driver)
    check_nothing_is_left(home, result)
    refused = cancel(home, "last", code=1)
    assert refused["error"] == f"run {result['run_id']} has ended (cancelled); there is nothing to cancel"


def test_the_cancel_command_stops_a_stubborn_run_of_another_machine_at_once(home, monkeypatch):
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "600")
    driver = start(home, "stubborn")
    (record,) = (home / "store/runs").glob("*/run.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "host": "another"}))
    assert cancel(home, "last", "--now")["driver"] == "elsewhere"
    check_nothing_is_left(home, end(driver)[0])


def test_a_killed_run_cannot_be_cancelled(home):
    driver = start(home, "stubborn")
    driver.kill()
    driver.communicate()
    assert "was killed; there is nothing to cancel" in cancel(home, "last", code=1)["error"]


def cancel(home, *words, code=0):
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", "cancel", *words, "--json"]
    done = subprocess.run(command, cwd=home, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
