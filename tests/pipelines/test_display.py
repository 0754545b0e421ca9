"""The live table and the plain lines tell what happens, at a bearable pace."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from ropewalk.pipelines.display import Display, duration

START = {"type": "step_started", "step": "train", "key": "k", "attempt": "a", "inputs": {}, "time": 0.0}


def progress(at: float, done: int, total: int = 1000) -> dict:
    return {"type": "progress", "step": "train", "done": done, "total": total, "unit": "rows", "time": at}


def plain(*events: dict) -> list[str]:
    text = io.StringIO()
    with Display(["train", "report"], Console(file=text, width=40)) as display:
        for event in events:
            display(event)
    return text.getvalue().splitlines()


def table(*events: dict, now: float = 100.0) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    display = Display(["train", "report"], console, clock=lambda: now)
    for event in events:
        display(event)
    with console.capture() as capture:
        console.print(display.table())
    return capture.get()


def test_each_event_of_a_step_is_one_line_however_narrow_the_console() -> None:
    lines = plain(
        START,
        {"type": "step_succeeded", "step": "train", "seconds": 65.0, "reason": "new", "output": {}, "time": 65.0},
        {"type": "step_skipped", "step": "report", "reason": "depends on something with a very long name indeed"},
        {"type": "run_finished", "status": "failed", "seconds": 66.0, "time": 66.0},
    )
    assert [line.split(" ", 1)[1] for line in lines] == [
        "train: started",
        "train: done in 1 min 05 s",
        "report: skipped (depends on something with a very long name indeed)",
        "run failed after 1 min 06 s",
    ]


def test_a_failure_says_why_and_square_brackets_are_no_markup() -> None:
    error = "ValueError: rows[3] has [bold] no segments"
    lines = plain(START, {"type": "step_failed", "step": "train", "seconds": 1.0, "error": error, "time": 1.0})
    assert lines[-1].endswith(f"train: failed after 1.0 s: {error}")


def test_waits_and_other_attempts_are_told_and_shown() -> None:
    failed = {"type": "attempt_failed", "step": "train", "seconds": 3.0, "kind": "infrastructure", "time": 3.0}
    failed |= {"error": "ConnectionError: reset", "retry_in_seconds": 2.0}
    locked = {"type": "step_waiting", "step": "report", "reason": "locked by run r (process 7 on far)", "time": 4.0}
    lines = plain(START, failed, locked)
    assert lines[1].endswith(
        "train: attempt failed (infrastructure), the next one follows in 2.0 s: ConnectionError: reset"
    )
    assert lines[2].endswith("report: waiting, locked by run r (process 7 on far)")
    shown = table(START, failed, locked)
    assert "retrying" in shown and "ConnectionError: reset" in shown
    assert "locked" in shown and "locked by run r" in shown


def test_trouble_is_told_beside_the_live_table() -> None:
    text = io.StringIO()
    with Display(["train"], Console(file=text, force_terminal=True, width=120)) as display:
        display({"type": "warning", "step": "train", "text": "the lease could not be renewed: no answer"})
    assert "train: warning: the lease could not be renewed: no answer" in text.getvalue()


def test_progress_is_told_every_tenth_or_every_ten_seconds() -> None:
    quick = plain(START, *[progress(i / 1000, i) for i in range(1, 1001)])
    assert [line.split()[2] for line in quick[1:]] == [f"{tenth}0%," for tenth in range(1, 11)]
    slow = plain(START, *[progress(float(second), second) for second in range(1, 100)])
    assert len(slow) - 1 == 9


def test_rate_and_time_left_count_from_where_a_resumed_step_began() -> None:
    lines = plain(START, progress(10.0, 500), progress(20.0, 600))
    assert lines[-1].endswith("train: 60%, 600/1000 rows, 10/s, 40.0 s left")


def test_a_second_attempt_starts_its_progress_anew() -> None:
    shown = table(START, progress(10.0, 500), {**START, "time": 90.0})
    assert "500/1000" not in shown
    assert "10.0 s" in shown


def test_the_table_shows_every_step_with_its_state_and_metrics() -> None:
    metrics = {"type": "metrics", "step": "train", "metrics": {"loss": 2.34567}, "metric_step": 1, "about": None}
    shown = table(START, metrics, progress(10.0, 100), progress(20.0, 200))
    assert "running" in shown and "200/1000 rows, 10/s, 1 min 20 s left" in shown and "loss 2.346" in shown
    assert "1 min 40 s" in shown
    assert "report" in shown and "waiting" in shown


def test_a_note_appears_in_either_form() -> None:
    assert plain({"type": "note", "text": "Ray dashboard: http://127.0.0.1:8265"}) == [
        "Ray dashboard: http://127.0.0.1:8265"
    ]


def test_a_terminal_gets_a_live_table_that_ends_with_the_final_state() -> None:
    text = io.StringIO()
    with Display(["train"], Console(file=text, force_terminal=True, width=120)) as display:
        display(START)
        display({"type": "step_reused", "step": "train", "reason": "nothing changed"})
    assert "reused" in text.getvalue().rsplit("waiting", 1)[-1]
    assert "train: reused" not in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.0, "59.0 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_display_imports_nothing_heavy() -> None:
    code = "import sys, ropewalk.pipelines.display; print({'torch', 'ray', 'mlflow', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_step_that_waits_for_its_workers_is_queued_until_they_start() -> None:
    queued = {"type": "workers_queued", "step": "train", "workers": "2 workers with 1 GPU each", "time": 2.0}
    begun = {"type": "running", "step": "train", "node": "n", "pid": 1, "time": 1.0}
    started = {"type": "workers_started", "step": "train", "time": 50.0}
    waiting = table(START, begun, queued).splitlines()[1]
    assert "queued" in waiting and "waits for room for 2 workers with 1 GPU each" in waiting
    assert "running" in table(START, begun, queued, started).splitlines()[1]
    assert [line.split(" ", 1)[1] for line in plain(START, begun, queued, started)] == [
        "train: started",
        "train: waits for room for 2 workers with 1 GPU each",
        "train: its workers have started",
    ]
