"""Reading the logs of a run while it is going on, and afterwards."""

import json

import pytest

from ropewalk.infra.run_logs import RunLogs, print_logs


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


class Run:
    """A run's folder as a driver and its workers fill it."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, step, attempt):
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"type": "step_started", "step": step, "attempt": attempt}) + "\n")

    def write(self, step, name, text):
        path = self.folder / "logs" / step / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    def printed(self, **options):
        lines = []
        print_logs(RunLogs(self.folder, **options), lines.append)
        return lines


@pytest.fixture
def two_attempts(run):
    run.start("train", "aaa")
    run.write("train", "aaa", "one\n")
    for rank in (10, 2):
        run.write("train", f"aaa.rank{rank}", f"rank {rank}\n")
    run.start("pack", "ccc")
    run.write("pack", "ccc", "packed\n")
    run.start("train", "bbb")
    run.write("train", "bbb", "two")
    return run


def test_logs_come_by_step_attempt_and_rank_with_a_title_each(two_attempts):
    assert two_attempts.printed() == [
        "==> train, attempt 1 <==",
        "one",
        "==> train, attempt 1, rank2 <==",
        "rank 2",
        "==> train, attempt 1, rank10 <==",
        "rank 10",
        "==> train, attempt 2 <==",
        "two",
        "==> pack, attempt 1 <==",
        "packed",
    ]


def test_one_step_or_one_attempt_can_be_asked_for(two_attempts):
    assert two_attempts.printed(step="pack") == ["==> pack, attempt 1 <==", "packed"]
    assert two_attempts.printed(step="train", attempt=2) == ["==> train, attempt 2 <==", "two"]
    assert two_attempts.printed(step="pack", attempt=2) == []


def test_a_run_without_logs_prints_nothing(run):
    assert run.printed() == []


def test_following_shows_what_is_added_and_new_attempts_each_line_once(run):
    run.start("train", "aaa")
    run.write("train", "aaa", "one\nhal")
    lines = []

    def second_attempt():
        run.write("train", "aaa", "f\n")
        run.start("train", "bbb")
        run.write("train", "bbb", "again\n")
        return True

    def last_words():
        run.write("train", "bbb", "no end of line")
        return False

    turns = iter([lambda: True, second_attempt, last_words])
    print_logs(RunLogs(run.folder), lines.append, lambda: next(turns)())
    assert lines == ["==> train, attempt 1 <==", "one", "half", "==> train, attempt 2 <==", "again", "no end of line"]


def test_bytes_that_are_no_text_are_shown_as_such(run):
    run.start("train", "aaa")
    run.write("train", "aaa", "")
    (run.folder / "logs/train/aaa.log").write_bytes(b"caf\xe9\xff\n")
    assert run.printed()[1] == "caf��"
