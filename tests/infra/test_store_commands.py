"""verify, gc and adopt as commands, on a folder and on an object store: what they say, and their exit status."""

import json
import re
import sys
from pathlib import Path

import pytest
from engine import run, statuses
from faults.soak import damage
from small_hub import COMMIT
from toy_stages import diamond

from ropewalk.infra.store import Store
from ropewalk.infra.upkeep.verify import verify
from ropewalk.pipelines.cli import main

PIPELINE = str(Path(__file__).parents[1] / "toy_pipeline.py")


@pytest.fixture
def command(store_uri, monkeypatch, capsys):
    """Gives a command and returns its exit status, what it printed, and the object at the end."""

    def give(*words):
        monkeypatch.setattr(sys, "argv", ["ropewalk", *words, "--store", store_uri])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        document = json.loads(told.out.splitlines()[-1]) if "--json" in words else {}
        return ended.value.code, told.out + told.err, document

    return give


@pytest.fixture
def store(store_uri):
    return Store(store_uri)


def commit_of(result, step):
    return next(each.commit for each in result.steps if each.name == step)


def damage_one(store, result, step, kind="flip"):
    commit = commit_of(result, step)
    return damage(store, commit.key, commit.attempt.name, commit.number, kind)


def test_a_sound_store_is_verified_with_status_0_and_an_empty_one_as_well(command, store):
    assert command("verify")[0] == 0
    run(diamond(), store.uri)
    status, text, _ = command("verify", "--deep")
    assert status == 0 and re.search(r"4 outputs are sound, 0 corrupt; \d+ B, contents compared", text)
    status, _, told = command("verify", "--json")
    assert status == 0 and (told["sound"], told["corrupt"], told["deep"]) == (4, 0, False)
    assert {(row["step"], row["status"]) for row in told["commits"]} == {
        (name, "SOUND") for name in ("first", "left", "right", "last")
    }


def test_a_changed_bit_is_found_only_by_content_and_a_size_at_once(command, store):
    result = run(diamond(), store.uri)
    name = damage_one(store, result, "right")
    assert command("verify")[0] == 0, "the size is the same"
    status, text, _ = command("verify", "--deep")
    assert status == 1 and "CORRUPT right (commit 0)" in text and f"{store.uri}/{name}: content changed" in text
    assert "--repair lets the next run make the corrupt ones again" in text
    damage_one(store, result, "left", "truncate")
    status, _, told = command("verify", "--json")
    (row,) = [row for row in told["commits"] if row["status"] == "CORRUPT"]
    assert status == 1 and row["step"] == "left" and "was committed with" in row["problems"][0]


def test_repair_ends_with_status_1_and_after_the_next_run_all_is_sound(command, store):
    result = run(diamond(), store.uri)
    damage_one(store, result, "right")
    status, text, _ = command("verify", "--deep", "--repair")
    assert status == 1 and "the next run makes them again" in text
    status, _, told = command("verify", "--deep", "--json")
    assert status == 0 and {row["step"] for row in told["commits"] if row["status"] == "WITHDRAWN"} == {"right"}
    assert statuses(run(diamond(), store.uri)) == {
        "first": "reused",
        "left": "reused",
        "right": "ran",
        "last": "reused",
    }
    status, _, told = command("verify", "--deep", "--json")
    assert status == 0 and (told["sound"], told["corrupt"]) == (4, 0)


def test_what_is_verified_can_be_chosen_by_pipeline_run_and_key(command, store):
    three = run(diamond(3), store.uri)
    run(diamond(4), store.uri)
    steps = {"first": 2, "left": 2, "right": 2, "last": 2}
    assert sum(steps.values()) == command("verify", "--json")[2]["sound"]
    keys = {step.key for step in three.steps}
    for choice in ((PIPELINE,), ("--run", three.run_id)):
        told = command("verify", *choice, "--json")[2]
        assert {row["key"] for row in told["commits"]} == keys
    key = three.steps[0].key
    assert [row["key"] for row in command("verify", "--key", key[:10], "--json")[2]["commits"]] == [key]
    assert "no key is called" in command("verify", "--key", "zz")[1]
    assert "give more of its digits" in command("verify", "--key", "")[1]
    assert "not several" in command("verify", PIPELINE, "--key", key)[1]
    assert "no run is called" in command("verify", "--run", "20200101-000000-abcd")[1]


def test_progress_is_told_in_commits_and_in_bytes(store):
    run(diamond(), store.uri)
    commits, read = [], []
    verify(
        store,
        store.known_keys(),
        deep=True,
        repair=False,
        on_commit=lambda done, total: commits.append((done, total)),
        on_read=read.append,
    )
    assert commits == [(number, 4) for number in (1, 2, 3, 4)]
    assert sum(read) == sum(size for name, size in store.objects.sizes("objects").items() if is_content(name))


def is_content(name):
    return "/data/" in name or "/observed/" in name


def test_garbage_is_only_shown_until_yes_is_said_and_then_goes_in_two_calls(command, store):
    old, new = run(diamond(3), store.uri), run(diamond(4), store.uri)
    gone = {each.commit.attempt.name for each in old.steps} - {each.commit.attempt.name for each in new.steps}
    before = store.objects.sizes("")
    status, text, _ = command("gc", "--keep-runs", "1")
    assert status == 0 and "add --yes. Nothing was changed." in text and store.objects.sizes("") == before
    now = ("gc", "--keep-runs", "1", "--grace-hours", "0", "--yes")
    told = command(*now, "--json")[2]
    assert {row["attempt"] for row in told["garbage"]} == gone and told["freed_bytes"] == 0
    assert {row["state"] for row in told["garbage"]} == {"found"}
    assert {row["state"] for row in command("gc", "--keep-runs", "1", "--yes", "--json")[2]["garbage"]} == {"waiting"}
    status, text, _ = command(*now)
    assert status == 0 and re.search(r"\d+(\.\d)? K?i?B freed", text)
    left = {name.split("/")[3] for name in store.objects.sizes("") if "/attempts/" in name}
    assert left == {each.commit.attempt.name for each in new.steps}
    assert command(*now, "--json")[2]["garbage"] == []
    assert set(statuses(run(diamond(4), store.uri)).values()) == {"reused"}


def test_the_sizes_that_are_told_are_those_that_are_freed(command, store):
    old, _ = run(diamond(3), store.uri), run(diamond(4), store.uri)
    now = ("gc", "--keep-runs", "1", "--grace-hours", "0", "--yes", "--json")
    found = command(*now)[2]["garbage"]

    def used():
        return sum(size for name, size in store.objects.sizes("objects").items() if "/attempts/" in name)

    before = used()
    freed = command(*now)[2]["freed_bytes"]
    assert freed == before - used() == sum(row["num_bytes"] for row in found) > 0
    assert old.steps


def test_a_pinned_run_is_kept_and_an_unknown_one_refused(command, store):
    old = run(diamond(3), store.uri)
    run(diamond(4), store.uri)
    assert command("gc", "--pin", old.run_id, "--json")[2]["pinned"] == {old.run_id: True}
    now = ("gc", "--keep-runs", "1", "--grace-hours", "0", "--yes", "--json")
    assert command(*now)[2]["garbage"] == []
    assert "no longer pinned" in command("gc", "--unpin", old.run_id)[1]
    assert len(command(*now)[2]["garbage"]) > 0
    status, text, _ = command("gc", "--pin", "20200101-000000-abcd")
    assert status == 1 and "no run is called" in text


def test_a_record_that_cannot_be_read_stops_the_collection_and_is_named(command, store):
    old = run(diamond(3), store.uri)
    run(diamond(4), store.uri)
    name = f"runs/{old.run_id}/steps/first.json"
    for content in (b"", b"[]", b'{"torn'):
        (store.root / name).write_bytes(content)
        before = store.objects.sizes("objects")
        status, text, _ = command("gc", "--keep-runs", "9", "--grace-hours", "0", "--yes")
        assert status == 1 and "first.json cannot be read" in text and "nothing was removed" in text
        assert store.objects.sizes("objects") == before


def test_records_of_runs_go_with_their_outputs_if_that_is_asked_for(command, store, tmp_path, monkeypatch):
    old, new = run(diamond(3), store.uri), run(diamond(4), store.uri)
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "elsewhere"))
    there = Store(store.uri)
    there.pull_runs(at_once=True)
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "scratch"))
    assert command("gc", "--keep-runs", "1", "--runs", "--json")[2]["runs"] == [old.run_id]
    assert command("gc", "--keep-runs", "1", "--runs", "--yes", "--json")[2]["runs"] == [old.run_id]
    assert [name for name in store.objects.sizes("runs") if name.startswith(old.run_id)] == []
    there.pull_runs(at_once=True)
    assert [path.name for path in (there.root / "runs").iterdir()] == [new.run_id], "another machine forgets it, too"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gc", "--keep-runs", "-1"), "--keep-runs"),
        (("gc", "--grace-hours", "nan"), "--grace-hours"),
        (("adopt", "/no/such/place", "--name", "x"), "/no/such/place does not exist"),
        (("adopt", "hf://datasets/o/r@main", "--name", "x"), "40 hex digits"),
        (("adopt", f"hf://datasets/o/r@{COMMIT[:39]}", "--name", "x"), "40 hex digits"),
        (("adopt", "s3://bucket/x", "--name", "x"), 'External("s3://bucket/x")'),
        (("adopt", "ftp://x/y", "--name", "x"), "ftp://x/y"),
    ],
)
def test_bad_input_is_one_sentence(command, words, message):
    status, text, told = command(*words, "--json")
    assert status == 1 and message in told["error"] and "Traceback" not in text


def test_adopted_files_that_have_changed_are_refused_by_name_until_they_are_adopted_anew(command, store, tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    (books / "one.txt").write_text("1")
    (books / "notes.md").write_text("n")
    adopt = ("adopt", str(books), "--name", "books", "--include", "*.txt")
    status, text, _ = command(*adopt)
    assert status == 0 and "adopted books, version 0, 1 files, 1 B" in text and 'External("adopted://books")' in text
    assert command(*adopt, "--json")[2]["number"] == 0, "the same data is the same version"
    plan = ("plan", PIPELINE, "--param", "kind=books")
    assert command(*plan)[0] == 0
    (books / "one.txt").write_text("two")
    status, _, told = command(*plan, "--json")
    assert status == 1 and f"{books}/one.txt has changed since it was adopted; adopt it anew" in told["error"]
    assert command(*adopt, "--json")[2]["number"] == 1
    assert command(*plan)[0] == 0


def test_a_source_whose_files_do_not_match_is_refused(command, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "secret.txt").write_text("s")
    for pattern in ("*.txt", "../*.txt", "/etc/*"):
        status, _, told = command("adopt", str(tmp_path / "books"), "--name", "x", "--include", pattern, "--json")
        assert status == 1 and f"matches {pattern}" in told["error"]
