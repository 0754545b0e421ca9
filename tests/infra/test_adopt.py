"""Outside data gets a name and versions; what a pipeline reads is what was adopted, or it is told that it is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine import plan, run, statuses
from object_store_server import new_bucket, object_store_server
from toy_reader import reading, texts

from ropewalk.infra.adopt import adopt
from ropewalk.infra.key import canonical_json
from ropewalk.infra.local import LocalExecutor
from ropewalk.infra.plan import Planner
from ropewalk.infra.record import RunRecord
from ropewalk.infra.runner import Runner
from ropewalk.infra.step import External, UserError
from ropewalk.infra.store import Store
from ropewalk.stages.context import LocalContext

TESTS = Path(__file__).parents[1]


@pytest.fixture
def root(store_uri):
    return store_uri


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("A")
    (folder / "deep" / "b.txt").write_text("B")
    (folder / "notes.md").write_text("N")
    return folder


def register(root, books, *, copy=False, name="books"):
    external = External(str(books), include=("**/*.txt",))
    return adopt(Store(root), str(books), name, external, copy=copy)


@pytest.mark.parametrize("copy", [False, True])
def test_a_pipeline_reads_what_was_adopted_under_the_key_that_the_files_have(root, books, copy):
    register(root, books, copy=copy)
    result = run(reading("adopted://books"), root)
    assert statuses(result) == {"read": "ran"}
    found = texts(Store(root), result)
    assert {name: found[name] for name in ("a.txt", "deep/b.txt")} == {"a.txt": "A", "deep/b.txt": "B"}
    assert ("notes.md" in found) is not copy, "files that stay where they are have their neighbours"
    by_path = plan(reading(str(books), include=("**/*.txt",)), root)
    assert by_path["read"][0] == "reuse"


def test_the_same_data_again_is_no_new_version_and_other_data_is(root, books):
    assert register(root, books)["number"] == 0
    assert register(root, books)["number"] == 0
    (books / "a.txt").write_text("changed")
    assert register(root, books)["number"] == 1
    assert register(root, books, copy=True)["number"] == 2
    assert Store(root).objects.names("adopted/books") == ["000000.json", "000001.json", "000002.json", "files"]


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_files_that_are_not_what_was_adopted_are_named_when_the_run_is_planned(root, books, change):
    register(root, books)
    run(reading("adopted://books"), root)
    (books / "deep" / "b.txt").write_text("another") if change == "changed" else (books / "deep" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"step read, input file: .*deep/b.txt (has changed since|was adopted and)"):
        plan(reading("adopted://books"), root)
    os.utime(books / "a.txt", (1, 1))
    (books / "deep" / "b.txt").write_text("B")
    assert plan(reading("adopted://books"), root)["read"][0] == "reuse", (
        "the same content with another time is the same"
    )


def test_a_copy_outlives_its_source(root, books, tmp_path, monkeypatch):
    register(root, books, copy=True)
    for path in books.rglob("*.txt"):
        path.unlink()
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "another machine"))
    store = Store(root)
    assert texts(store, run(reading("adopted://books"), root)) == {"a.txt": "A", "deep/b.txt": "B"}


def test_a_single_file_is_given_as_a_file(root, books):
    for copy in (False, True):
        adopt(Store(root), str(books / "a.txt"), "one", External(str(books / "a.txt")), copy=copy)
        assert texts(Store(root), run(reading("adopted://one"), root)) == {"a.txt": "A"}


def test_unknown_and_unusable_names_are_refused(root, books):
    register(root, books)
    with pytest.raises(
        UserError, match=r"step read, input file: no adopted data is called 'boks'; did you mean 'books'"
    ):
        plan(reading("adopted://boks"), root)
    for name in ("../x", "", "..", "a/b", "a\\b", "a b", ".hidden"):
        with pytest.raises(UserError, match="--name"):
            adopt(Store(root), str(books), name, External(str(books)), copy=False)
    with pytest.raises(UserError, match="40 hex digits"):
        adopt(Store(root), "hf://datasets/o/r@main", "r", External("hf://datasets/o/r@main"), copy=False)
    with pytest.raises(UserError, match="step read, input file: ftp://x is neither"):
        plan(reading("ftp://x"), root)


@pytest.fixture
def server():
    with object_store_server():
        yield


def test_objects_of_an_object_store_are_inputs_and_their_change_is_seen(root, server):
    place = new_bucket() + "/in put"
    source = Store(place).objects
    for name, text in (("a.txt", "A"), ("deep/b.txt", "B"), ("c.md", "C")):
        source.write(name, text.encode())
    pipeline = reading(place, include=("**/*.txt",))
    assert texts(Store(root), run(pipeline, root)) == {"a.txt": "A", "deep/b.txt": "B"}
    assert plan(pipeline, root)["read"][0] == "reuse"
    source.write("deep/b.txt", b"X")
    assert plan(pipeline, root)["read"][0] == "run"
    assert texts(Store(root), run(pipeline, root)) == {"a.txt": "A", "deep/b.txt": "X"}
    with pytest.raises(UserError, match=r"no object in .* matches"):
        plan(reading(place, include=("*.parquet",)), root)


def test_a_manifest_of_adopted_data_cannot_lead_out_of_its_folder(root, books):
    document = register(root, books, copy=True)
    store = Store(root)
    document["files"][0]["path"] = "../../../evil"
    store.objects.write("adopted/books/000000.json", canonical_json(document).encode())
    result = run(reading("adopted://books"), root)
    assert result.steps[0].status == "failed" and "leaves its folder" in result.steps[0].reason


def test_a_repository_of_the_hub_is_planned_without_it_and_fetched_for_the_step(tmp_path):
    script = TESTS / "hub_pipeline.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["planned"] == {"read": "run"} and facts["requests_of_planning"] == 0
    assert facts["statuses"] == {"read": "ran"} and list(facts["value"]) == ["train.jsonl"]
    assert facts["again"] == {"read": "reused"}, "named or not, it is the same repository at the same commit"
    assert facts["copied"] == {"read": "reused"} and facts["files_of_copy"] == ["train.jsonl"]


@pytest.mark.parametrize("kind", ["path", "adopted", "objects"])
def test_data_that_changes_before_its_step_starts_is_never_read_under_the_old_key(root, books, server, kind):
    """The step was decided, waits for its turn, and meanwhile its input becomes another."""
    place = {"path": str(books), "adopted": "adopted://books", "objects": f"{new_bucket()}/books"}[kind]
    source = Store(place).objects if kind == "objects" else None

    def write(text):
        (books / "a.txt").write_text(text)
        register(root, books, copy=True)
        if source is not None:
            source.write("a.txt", text.encode())

    write("A")
    pipeline = reading(place, include=("a.txt",) if kind == "path" else ("**/*.txt",))
    store, changed = Store(root), []

    class Number(Store):
        """Asked for right before the step starts."""

        def next_number(self, key):
            if not changed:
                changed.append(write("changed"))
            return super().next_number(key)

    planner = Planner(pipeline, store)
    planner.plan()
    planner.store = Number(root)
    executor = LocalExecutor(lambda task, work, report, stop: LocalContext(work, report, stop))
    result = Runner(planner, executor, RunRecord(store, "p"), lambda event: None, (str(TESTS),)).execute()
    assert changed and statuses(result) == {"read": "ran"}
    assert texts(store, result)["a.txt"] == "changed"
    assert result.steps[0].key == plan_key(pipeline, root), "the key is that of what was read"


def plan_key(pipeline, root):
    return Planner(pipeline, Store(root)).plan()[0].key


def test_a_copy_that_was_damaged_is_refused(root, books):
    register(root, books, copy=True)
    store = Store(root)
    document = json.loads(store.objects.read("adopted/books/000000.json"))
    store.objects.write(f"{document['folder']}/a.txt", b"X")
    result = run(reading("adopted://books"), root)
    assert result.steps[0].status == "failed" and "a.txt: content changed" in result.steps[0].reason
