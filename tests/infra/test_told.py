"""What a stage reports stands in its log: sparingly, and never at the cost of the stage."""

import os

import pytest
from chain_pipeline import pipeline as silent_chain
from engine import run
from toy_stages import diamond

from ropewalk.infra.run_logs import RunLogs, print_logs
from ropewalk.infra.told import INTERVAL_SECONDS, told
from ropewalk.pipelines.logs_command import show_logs


def progress(done):
    return {"type": "progress", "done": done, "total": 2000, "unit": "rows"}


def metrics(step, **values):
    return {"type": "metrics", "metrics": values, "step": step, "about": None}


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def reported():
    return []


@pytest.fixture
def report(clock, reported):
    return told(reported.append, clock=lambda: clock[0])


def lines(capfd):
    return [line.partition(" ")[2] for line in capfd.readouterr().out.splitlines()]


def test_progress_is_told_first_now_and_then_and_last(report, reported, clock, capfd):
    events = [progress(done) for done in range(1, 2001)]
    for event in events:
        report(event)
        clock[0] += INTERVAL_SECONDS / 512
    assert reported == events, "nothing is kept from the driver"
    assert lines(capfd) == [f"{done} of 2,000 rows" for done in ("1", "513", "1,025", "1,537", "2,000")]


def test_each_kind_of_metrics_has_its_own_lines(report, capfd):
    for step in range(3):
        report(metrics(step, loss=2.5, learning_rate=1e-4))
        report(metrics(None, num_rows=12))
    assert lines(capfd) == ["step 0: loss 2.5, learning_rate 0.0001", "num_rows 12"]


def test_what_the_engine_reports_is_no_line(report, reported, capfd):
    report({"type": "running", "node": None, "pid": 1})
    assert len(reported) == 1 and lines(capfd) == []


def test_output_that_nobody_takes_costs_the_stage_nothing(report, reported):
    kept, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
    try:
        os.dup2(full, 1)
        report(progress(1))
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(full)
    assert reported == [progress(1)]


def test_it_stands_in_the_log_of_the_step(tmp_path):
    result = run(diamond(), tmp_path)
    printed = []
    print_logs(RunLogs(tmp_path / "runs" / result.run_id, "first"), printed.append)
    title, line = printed
    assert title == "==> first, attempt 1 <==" and line.endswith(" value 3")


def test_the_command_says_where_metrics_would_be_if_a_log_is_empty(tmp_path, capfd):
    result = run(silent_chain(1), tmp_path)
    assert show_logs(str(tmp_path), result.run_id, "s01", attempt=None, follow=False, as_json=False) == 0
    output = capfd.readouterr()
    assert output.out == "" and f"ropewalk show {result.run_id} s01 --store {tmp_path}" in output.err
