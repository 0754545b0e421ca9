"""Shards: resumed, in order, the same for any number of workers, and sound when two workers do the same one."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages import shards
from ropewalk.stages.context import LocalContext, is_class
from ropewalk.stages.shards import map_shards

ITEMS = {f"part-{number}": number for number in range(9)}


class PoolContext(LocalContext):
    """Workers that are processes; results in item order, work in any order."""

    num_workers = 2

    def map(self, function, items, *, resources=None):
        with multiprocessing.get_context("fork").Pool(self.num_workers) as pool:
            call = partial(_build_and_call, function) if is_class(function) else function
            yield from pool.imap(call, list(items))


def _build_and_call(build, item):
    return build()(item)


def square(number, folder):
    (folder / "deep").mkdir()
    (folder / "deep" / f"{number:02d}.txt").write_text(str(number * number))
    with (folder.parents[2] / "runs").open("a") as log:
        log.write(f"{number}\n")
    return {"sum": number}


class Squarer:
    """Built once per worker."""

    built = 0

    def __init__(self, power):
        Squarer.built += 1
        self.power = power

    def __call__(self, number, folder):
        (folder / f"{number:02d}.txt").write_text(str(number**self.power))
        return {"sum": number}


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def finish(context, output, function=square, items=ITEMS):
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for shard in map_shards(context, function, items):
        names.append((shard.name, shard.counts["sum"]))
        shard.link_into(output)
    return names, files_of(output)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(LocalContext(folder / "work"), folder / "data")


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_any_number_of_workers_gives_the_same_files_in_the_same_order(tmp_path, undisturbed, num_workers):
    context = PoolContext(tmp_path / "work")
    context.num_workers = num_workers
    assert finish(context, tmp_path / "data") == undisturbed
    assert undisturbed[0] == list(ITEMS.items())


@settings(max_examples=20, deadline=None)
@given(crashes=st.lists(st.integers(0, len(ITEMS) - 1), max_size=4))
def test_after_any_crashes_only_unfinished_shards_run_and_the_result_is_the_same(
    tmp_path_factory, undisturbed, crashes
):
    folder = tmp_path_factory.mktemp("crashing")
    for number, crash in enumerate(crashes):
        with contextlib.suppress(RuntimeError):
            finish(DyingContext(folder / "work", at=crash), folder / f"attempt{number}")
    assert finish(LocalContext(folder / "work"), folder / "data") == undisturbed
    assert sorted((folder / "work" / "runs").read_text().split(), key=int) == [str(n) for n in ITEMS.values()]


class DyingContext(LocalContext):
    """Its worker dies before it has done its item number `at` of this attempt."""

    def __init__(self, work, at):
        super().__init__(work)
        self.at = at

    def map(self, function, items, *, resources=None):
        for number, item in enumerate(items):
            if number == self.at:
                raise RuntimeError("node lost")
            yield function(item)


def _kill_in_the_middle(number, folder):
    (folder / "half.txt").write_text("half")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "half.txt").unlink()
    return square(number, folder)


def test_a_shard_that_was_cut_off_leaves_nothing_in_the_output(tmp_path, undisturbed):
    process = multiprocessing.get_context("fork").Process(
        target=finish, args=(LocalContext(tmp_path / "work"), tmp_path / "killed", _kill_in_the_middle)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert finish(LocalContext(tmp_path / "work"), tmp_path / "data") == undisturbed


def test_two_workers_with_the_same_shard_make_one_entry_and_leave_one_folder(tmp_path):
    ledger = tmp_path / "work" / "shards"
    (ledger / "files").mkdir(parents=True)
    both = threading.Barrier(2)

    def together(number, folder):
        (folder / "a.txt").write_text("same")
        both.wait()
        return {"sum": number}

    workers = [
        threading.Thread(target=shards._write_shard, args=(together, ledger, (shards._entry_name(0, "x"), 5)))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(list(ledger.glob("*.json"))) == 1 and len(list((ledger / "files").iterdir())) == 1
    assert finish(LocalContext(tmp_path / "work"), tmp_path / "data", items={"x": 5}) == (
        [("x", 5)],
        {"a.txt": b"same"},
    )


def test_a_shard_whose_name_changed_is_made_anew(tmp_path):
    context = LocalContext(tmp_path / "work")
    finish(context, tmp_path / "one", items={"a": 1})
    assert finish(context, tmp_path / "two", items={"b": 2})[1] == {"deep/02.txt": b"4"}


def test_a_class_is_built_once_per_worker_and_only_if_there_is_work(tmp_path):
    Squarer.built = 0
    context = LocalContext(tmp_path / "work")
    first = finish(context, tmp_path / "one", partial(Squarer, 3))
    assert first[1]["02.txt"] == b"8" and Squarer.built == 1
    assert finish(context, tmp_path / "two", partial(Squarer, 3)) == first


def test_progress_begins_with_what_an_earlier_attempt_finished(tmp_path):
    events = []
    with pytest.raises(RuntimeError):
        finish(DyingContext(tmp_path / "work", at=4), tmp_path / "one")
    finish(LocalContext(tmp_path / "work", events.append), tmp_path / "two")
    assert [event["done"] for event in events] == [5, 6, 7, 8, 9]
    assert {(event["total"], event["unit"]) for event in events} == {(9, "shards")}


@pytest.mark.parametrize("counts", [{"x": float("nan")}, {"x": Path()}])
def test_counts_that_are_not_json_are_refused(tmp_path, counts):
    with pytest.raises((TypeError, ValueError), match="JSON"):
        finish(LocalContext(tmp_path / "work"), tmp_path / "data", lambda item, folder: counts)


def test_a_worker_that_does_not_see_the_work_folder_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="on a file system that all of them share"):
        shards._write_shard(square, tmp_path / "elsewhere", ("entry.json", 1))


def test_ledger_entries_are_json(tmp_path):
    finish(LocalContext(tmp_path / "work"), tmp_path / "data")
    entries = sorted((tmp_path / "work" / "shards").glob("*.json"))
    assert [json.loads(entry.read_text())["counts"] for entry in entries] == [{"sum": n} for n in ITEMS.values()]


def fill(number, folder):
    (folder / f"{number:04d}.bin").write_bytes(bytes(2**18))
    return {"sum": number}


def test_memory_does_not_grow_with_what_the_shards_hold(tmp_path):
    items = {f"part-{number}": number for number in range(300)}
    tracemalloc.start()
    try:
        total = sum(shard.counts["sum"] for shard in map_shards(LocalContext(tmp_path), fill, items))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == sum(range(300)) and peak < 3 * 2**20, "75 MiB went through"


def test_a_reader_that_stops_early_holds_the_workers_back(tmp_path):
    shards = map_shards(LocalContext(tmp_path / "work"), square, ITEMS)
    assert [next(shards).name for _ in range(3)] == list(ITEMS)[:3]
    assert (tmp_path / "work" / "runs").read_text().split() == ["0", "1", "2"]
