"""A step's scratch folder follows it to another machine, whatever the stage did when the machine was lost."""

import json
import os
import random
import threading
import time
from pathlib import Path

import pytest
from object_store_server import new_bucket, object_store_server

from ropewalk.infra.remote.run_mirror import PIECE_BYTES, RunMirror
from ropewalk.infra.remote.work_mirror import WorkMirror
from ropewalk.infra.store import Store


@pytest.fixture(scope="module", autouse=True)
def server():
    with object_store_server() as endpoint:
        yield endpoint


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The store as a named machine sees it."""
    bucket = new_bucket()

    def store(name):
        monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / name))
        return Store(bucket)

    return store


def lost(store, key="key", **options):
    """A mirror as a machine leaves it that is lost: without a last upload."""
    mirror = WorkMirror(store, key, store.work(key, 0), interval=3600, **options)
    return mirror.__enter__()


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def uploads(store):
    return sum(len(name.split("/")[-1]) == 32 for name in store.objects.sizes("work/key"))


def test_what_an_attempt_left_is_there_for_the_next_on_another_machine(machine):
    store = machine("a")
    with pytest.raises(RuntimeError), WorkMirror(store, "key", store.work("key", 0)):
        (store.work("key", 0) / "deep").mkdir()
        (store.work("key", 0) / "deep" / "state").write_text("7")
        raise RuntimeError("stopped")
    other = machine("b")
    with WorkMirror(other, "key", other.work("key", 0)):
        assert content(other.work("key", 0)) == {"deep/state": "7"}


def test_unchanged_files_are_not_uploaded_again_and_replaced_ones_are_removed(machine):
    store = machine("a")
    mirror = lost(store)
    work = store.work("key", 0)
    (work / "constant").write_text("x" * 1000)
    (work / "changing").write_text("1")
    mirror.sync(final=True)
    first = set(store.objects.sizes("work/key"))
    for value in ("2", "3"):
        (work / "changing").write_text(value)
        mirror.sync(final=True)
    mirror.sync(final=True)
    later = set(store.objects.sizes("work/key"))
    assert len(first & later) == 3, "the index, the begin mark and the constant file"
    assert uploads(store) == 2
    (work / "constant").rename(work / "renamed")
    mirror.sync(final=True)
    assert len(set(store.objects.sizes("work/key")) & first) == 3
    other = machine("b")
    lost(other)
    assert content(other.work("key", 0)) == {"changing": "3", "renamed": "x" * 1000}


def test_a_machine_that_goes_on_itself_keeps_what_it_has_and_uploads_nothing_again(machine):
    store = machine("a")
    mirror = lost(store)
    (store.work("key", 0) / "a").write_text("1")
    mirror.sync(final=True)
    (store.work("key", 0) / "b").write_text("not uploaded when the process died")
    before = set(store.objects.sizes("work/key"))
    again = lost(store)
    assert content(store.work("key", 0)) == {"a": "1", "b": "not uploaded when the process died"}
    again.sync(final=True)
    assert uploads(store) == 2
    assert before - set(store.objects.sizes("work/key")) <= {"000000/index.json", "000000/begun.json"}


def test_a_machine_that_comes_back_late_takes_the_newer_state(machine):
    a = machine("a")
    first = lost(a)
    (a.work("key", 0) / "step").write_text("1")
    first.sync(final=True)
    b = machine("b")
    second = lost(b)
    (b.work("key", 0) / "step").write_text("2")
    second.sync(final=True)
    (a.work("key", 0) / "step").write_text("1, and more that nobody will use")
    a = machine("a")
    lost(a)
    assert content(a.work("key", 0)) == {"step": "2"}


def test_a_predecessor_that_goes_on_takes_nothing_from_its_successor(machine):
    a = machine("a")
    first = lost(a)
    (a.work("key", 0) / "step").write_text("1")
    first.sync(final=True)
    b = machine("b")
    second = lost(b)
    (a.work("key", 0) / "step").unlink()
    (a.work("key", 0) / "other").write_text("written by the predecessor")
    first.sync(final=True)
    (b.work("key", 0) / "more").write_text("2")
    second.sync(final=True)
    c = machine("c")
    lost(c)
    assert content(c.work("key", 0)) == {"step": "1", "more": "2"}


def test_the_copy_shows_the_folder_as_it_was_at_one_moment(machine):
    """A pointer in the copy always names a state that is in the copy, although states come and go all the time."""
    store = machine("a")
    mirror = WorkMirror(store, "key", store.work("key", 0), interval=0.05)
    work, ended = store.work("key", 0), threading.Event()

    def checkpoints():
        number, previous = 0, None
        while not ended.is_set():
            (work / f"state{number}").write_text(str(number) * random.randint(1, 50_000))
            (work / "latest.new").write_text(f"state{number}")
            (work / "latest.new").replace(work / "latest")
            if previous is not None:
                (work / f"state{previous}").unlink()
            previous, number = number, number + 1
            time.sleep(random.uniform(0.0, 0.6))

    stage = threading.Thread(target=checkpoints)
    seen = set()
    with mirror:
        stage.start()
        for reader in range(12):
            time.sleep(0.4)
            names = store.objects.sizes("work/key")
            if "000000/index.json" in names:
                index = json.loads(store.objects.read("work/key/000000/index.json"))
                if "latest" in index:
                    pointer = store.objects.read(index["latest"]["object"]).decode() if reader else None
                    if pointer:
                        assert pointer in index, (pointer, sorted(index))
                        seen.add(pointer)
        ended.set()
        stage.join()
    assert len(seen) > 1, "several moments were seen"


def test_events_of_a_long_run_are_sent_once_and_read_whole_while_the_run_goes_on(machine):
    store = machine("a")
    folder = store.root / "runs" / "r1"
    folder.mkdir(parents=True)
    (folder / ".origin").touch()
    store.objects.write("runs/r1/run.json", b"{}")
    sent = []
    real, store.objects.write = store.objects.write, lambda name, data: (sent.append(len(data)), real(name, data))
    mirror, written = RunMirror(store, "runs/r1"), b""
    try:
        with (folder / "events.jsonl").open("ab") as file:
            for size in [10, 500, PIECE_BYTES * 3, *[2000] * 40]:
                line = os.urandom(size // 2).hex().encode() + b"\n"
                file.write(line)
                file.flush()
                written += line
                mirror.sync()
                mirror.sync()
    finally:
        store.objects.write = real
    assert sum(sent) < len(written) + 44 * 2 * PIECE_BYTES
    assert len(store.objects.names("runs/r1/events.jsonl.d")) <= len(written) / PIECE_BYTES + 1
    there = machine("b")
    there.pull_runs()
    assert (there.root / "runs" / "r1" / "events.jsonl").read_bytes() == written


def test_records_are_brought_again_only_where_they_have_grown(machine, monkeypatch):
    from ropewalk.infra.remote import run_mirror

    monkeypatch.setattr(run_mirror, "PULL_SECONDS", 0.0)
    store = machine("a")
    folder = store.root / "runs" / "r1"
    folder.mkdir(parents=True)
    (folder / ".origin").touch()
    (folder / "events.jsonl").write_text("1\n")
    mirror = RunMirror(store, "runs/r1")
    mirror.sync()
    store.objects.write("runs/r1/run.json", b"{}")
    there = machine("b")
    there.pull_runs()
    with (folder / "events.jsonl").open("a") as file:
        file.write("2\n")
    mirror.sync()
    brought = []
    real, there.objects.read = there.objects.read, lambda name: (brought.append(name), real(name))[1]
    try:
        there.pull_runs()
        there.pull_runs()
    finally:
        there.objects.read = real
    assert brought == ["runs/r1/events.jsonl.d/000000000000000"]
    assert (there.root / "runs" / "r1" / "events.jsonl").read_text() == "1\n2\n"
    store.pull_runs()
    assert not (Path(folder) / "run.json").exists() or (folder / "events.jsonl").read_text() == "1\n2\n"


def test_a_record_that_is_brought_has_the_time_at_which_it_was_written(machine):
    store = machine("a")
    store.objects.write("runs/r1/run.json", b"{}")
    store.objects.write("runs/r1/events.jsonl.d/000000000000000", b"1\n")
    written = store.objects.entries("runs")["r1/events.jsonl.d/000000000000000"].changed_at
    time.sleep(1.1)
    there = machine("b")
    there.pull_runs(at_once=True)
    assert (there.root / "runs/r1/events.jsonl").stat().st_mtime == written < time.time() - 1


def test_logs_are_brought_only_of_the_run_that_is_asked_for(machine):
    store = machine("a")
    for run_id in ("r1", "r2"):
        store.objects.write(f"runs/{run_id}/run.json", b"{}")
        store.objects.write(f"runs/{run_id}/logs/step/a.log.d/000000000000000", b"line\n")
    there = machine("b")
    there.pull_runs(at_once=True)
    assert list(there.root.rglob("*.log")) == []
    there.pull_runs(logs_of="r2")
    assert [path.read_text() for path in there.root.rglob("*.log")] == ["line\n"]
    there.pull_runs(at_once=True)
    assert sorted(path.name for path in (there.root / "runs").iterdir()) == ["r1", "r2"]
