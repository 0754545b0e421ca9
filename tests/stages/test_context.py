import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gang_ranks
import pytest

from ropewalk.stages.context import LocalContext, LocalWorker, free_port, is_class


@pytest.fixture
def events():
    return []


@pytest.fixture
def context(tmp_path, events):
    return LocalContext(tmp_path, events.append)


def double(value):
    return 2 * value


class Adder:
    built = 0

    def __init__(self, amount=100):
        Adder.built += 1
        self.amount = amount

    def __call__(self, value):
        return value + self.amount


def test_map_gives_results_in_item_order_and_takes_items_one_by_one(context):
    taken = []

    def items():
        for value in range(5):
            taken.append(value)
            yield value

    results = context.map(double, items())
    assert next(results) == 0
    assert taken == [0], "a result is there before the next item is asked for"
    assert list(results) == [2, 4, 6, 8]


@pytest.mark.parametrize(("function", "results"), [(Adder, [100, 101]), (partial(Adder, 5), [5, 6])])
def test_map_builds_a_class_once_and_calls_it_for_every_item(context, function, results):
    Adder.built = 0
    assert list(context.map(function, range(2))) == results
    assert Adder.built == 1


def test_a_partial_of_a_function_is_not_a_class(context):
    assert not is_class(partial(max, 3))
    assert list(context.map(partial(max, 3), [1, 5])) == [3, 5]


def test_events_have_the_shape_that_the_engine_reads(context, events):
    context.log({"loss": 1.5}, step=4, about="model")
    context.progress(1, 3, "rows")
    assert events == [
        {"type": "metrics", "metrics": {"loss": 1.5}, "step": 4, "about": "model"},
        {"type": "progress", "done": 1, "total": 3, "unit": "rows"},
    ]
    assert not context.cancelled()


def test_every_rank_of_a_gang_is_a_process_with_the_environment_of_torch_distributed(context):
    ranks = context.gang(gang_ranks.environment, {"steps": 3}, num_workers=2)
    assert [rank["rank"] for rank in ranks] == [0, 1]
    for number, rank in enumerate(ranks):
        assert (rank["RANK"], rank["LOCAL_RANK"]) == (str(number), str(number))
        assert (rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["world_size"]) == ("2", "2", 2)
        assert rank["MASTER_ADDR"] == "127.0.0.1"
        assert rank["config"] == {"steps": 3}
    assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    assert len({ranks[0]["pid"], ranks[1]["pid"], os.getpid()}) == 3
    assert "RANK" not in os.environ, "the gang's environment is not the caller's"


def test_the_ranks_reach_each_other(context):
    assert context.gang(gang_ranks.all_reduce, 1.5, num_workers=2) == [4.5, 4.5]


def test_a_gang_of_one_runs_in_its_own_process(context):
    assert context.gang(gang_ranks.environment, None, num_workers=1)[0]["pid"] != os.getpid()


def test_only_rank_zero_reports(context, events):
    assert context.gang(gang_ranks.reporting, None, num_workers=2) == [False, False]
    assert events == [
        {"type": "metrics", "metrics": {"rank": 0}, "step": 3, "about": None},
        {"type": "progress", "done": 0, "total": 2, "unit": "ranks"},
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failing_rank_fails_the_gang_at_once_with_its_traceback(context, rank):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"rank {rank} failed:\n(.|\n)*ValueError: rank {rank} has no rope"):
        context.gang(gang_ranks.failing, rank, num_workers=2)
    assert time.monotonic() - started < 30, "the other rank was not waited for"


def test_a_rank_that_dies_fails_the_gang_and_leaves_no_process(context, tmp_path):
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        context.gang(gang_ranks.dying, str(tmp_path), num_workers=2)
    if (tmp_path / "pid").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_ranks_of_a_killed_process_end_with_it(tmp_path):
    script = (
        "import gang_ranks; from pathlib import Path; from ropewalk.stages.context import LocalContext\n"
        "if __name__ == '__main__':\n"
        f"    LocalContext(Path()).gang(gang_ranks.lingering, {str(tmp_path)!r}, num_workers=2)\n"
    )
    paths = os.pathsep.join(filter(None, [str(Path(gang_ranks.__file__).parent), os.environ.get("PYTHONPATH")]))
    driver = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths})
    try:
        wait_for(lambda: all((tmp_path / f"rank{rank}").exists() for rank in range(2)))
    finally:
        driver.kill()
        driver.wait()
    wait_for(lambda: not any(is_running(int((tmp_path / f"rank{rank}").read_text())) for rank in range(2)))


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_may_be_larger_than_a_pipe(context):
    results = context.gang(gang_ranks.large, 300_000, num_workers=2)
    assert results == [bytes(300_000), b"\1" * 300_000]


def test_a_result_that_cannot_be_sent_fails_the_gang(context):
    with pytest.raises(RuntimeError, match="rank 0 failed"):
        context.gang(gang_ranks.unpicklable, None, num_workers=1)


def test_a_free_port_can_be_bound():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))


def test_a_rank_without_a_report_reports_nowhere():
    LocalWorker(0, 1).log({"loss": 1.0})
