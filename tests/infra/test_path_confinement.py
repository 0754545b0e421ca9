"""Names that come from a store or from a stage never lead out of the folder that they belong to."""

import json
import os

import boto3
import pytest
from engine import plan, run, statuses
from toy_reader import reading, texts
from toy_stages import NumberConfig, diamond

from ropewalk.infra.remote.work_mirror import WorkMirror
from ropewalk.infra.step import Pipeline, Step, UserError
from ropewalk.infra.store import Store, StoreError


@pytest.fixture
def store(store_uri):
    return Store(store_uri)


@pytest.fixture
def remote(kind_of_store, store):
    if kind_of_store == "folder":
        pytest.skip("a folder has no names that a file system does not allow")
    return store


def files_outside(tmp_path):
    """Everything but scratch folders and the store."""
    kept = ("scratch", "store", "another")
    return {path for path in tmp_path.rglob("*") if path.relative_to(tmp_path).parts[0] not in kept}


@pytest.mark.parametrize("name", ["../../../evil", "a/b", "..", "", "a\\..\\b", None, 7.5])
def test_an_attempt_whose_name_is_a_path_is_no_valid_commit(store, name):
    commit = run(diamond(), store.uri).steps[2].commit
    path = f"objects/{commit.key}/commits/000000.json"
    document = json.loads(store.objects.read(path))
    store.objects.write(path, json.dumps({**document, "attempt": name}).encode())
    assert store.latest(commit.key)[0] is None
    status, reason = plan(diamond(), store.uri)["right"]
    assert status == "run" and "corrupt output" in reason


class linking:  # noqa: N801
    """Makes links in its output that lead out of it."""

    NAME, VERSION = "linking", 1

    @staticmethod
    def run(config, inputs, output, context):
        outside = context.work / "outside"
        outside.mkdir(exist_ok=True)
        (outside / "secret").write_text("secret")
        if config.note == "a file":
            (output.data / "value.json").symlink_to(outside / "secret")
        elif config.note == "a folder":
            (output.data / "deep").symlink_to(outside)
        elif config.note == "the whole output":
            output.data.rmdir()
            output.data.symlink_to(outside)
        else:
            (output.data / "value\n.json").write_text("x")


@pytest.mark.parametrize("what", ["a file", "a folder", "the whole output", "a line break in a name"])
def test_links_and_unusable_names_in_an_output_fail_the_step_with_the_path(store, what):
    result = run(Pipeline("p", (Step("s", linking, NumberConfig(note=what)),)), store.uri)
    expected = {"the whole output": "this must be a folder", "a line break in a name": "control characters"}
    expected = expected.get(what, "symbolic links cannot be committed")
    assert statuses(result) == {"s": "failed"} and expected in result.steps[0].reason
    assert store.numbers(result.steps[0].key) == []


@pytest.mark.parametrize("path", ["../../evil", "/tmp/evil", "a/../../../evil"])
def test_the_copy_of_a_scratch_folder_cannot_be_restored_outside_of_it(remote, tmp_path, monkeypatch, path):
    with pytest.raises(RuntimeError), WorkMirror(remote, "key", remote.work("key", 0)):
        (remote.work("key", 0) / "state").write_text("evil")
        raise RuntimeError("lost")
    index = json.loads(remote.objects.read("work/key/000000/index.json"))
    remote.objects.write("work/key/000000/index.json", json.dumps({path: index["state"]}).encode())
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "another"))
    another, before = Store(remote.uri), files_outside(tmp_path)
    with pytest.raises(OSError, match="leaves the scratch folder"):
        WorkMirror(another, "key", another.work("key", 1)).__enter__()
    assert files_outside(tmp_path) == before


def put(uri, name, content=b"evil"):
    """Make an object of any name, as somebody else could."""
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).put_object(
        Bucket=uri.removeprefix("s3://"), Key=name, Body=content
    )


@pytest.mark.parametrize("name", ["runs/../../evil", "runs/x/../../evil", "runs//evil", "runs/./evil"])
def test_objects_whose_names_are_paths_are_refused_by_name(remote, tmp_path, monkeypatch, name):
    run(diamond(), remote.uri)
    put(remote.uri, name)
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "another"))
    before = files_outside(tmp_path)
    with pytest.raises((OSError, UserError), match="evil") as refused:
        Store(remote.uri).pull_runs(at_once=True)
    assert len(str(refused.value).splitlines()) == 1
    assert files_outside(tmp_path) == before


def test_backslashes_in_names_separate_nothing(remote, tmp_path, monkeypatch):
    put(remote.uri, "runs/a\\..\\..\\..\\evil/run.json", b"{}")
    put(remote.uri, "runs/r1/events.jsonl.d/0000000000000²1", b"no piece of a file")
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "another"))
    there = Store(remote.uri)
    there.pull_runs(at_once=True)
    assert [path.name for path in (there.root / "runs").glob("*/run.json")] == ["run.json"]
    assert {path.name for path in (there.root / "runs").iterdir()} == {"a\\..\\..\\..\\evil", "r1"}
    assert (there.root / "runs/r1/events.jsonl.d/0000000000000²1").is_file()


def test_objects_that_are_inputs_stay_in_their_folder(remote):
    place = f"{remote.uri}/inputs"
    put(remote.uri, "inputs/a\\..\\..\\b.txt", b"B")
    result = run(reading(place), remote.uri)
    assert texts(remote, result) == {"a\\..\\..\\b.txt": "B"}
    put(remote.uri, "inputs/../evil.txt")
    with pytest.raises((UserError, OSError), match=r"evil\.txt"):
        plan(reading(place), remote.uri)


@pytest.mark.parametrize("name", ["../runs", "..", "a/b", "", "a/../b", "books/000000"])
def test_adopted_data_is_named_and_not_reached_by_paths(store, name):
    with pytest.raises(UserError, match="step read, input file: no adopted data is called"):
        plan(reading(f"adopted://{name}"), store.uri)


def test_patterns_never_reach_files_outside_of_the_folder(store, tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a.txt").write_text("A")
    (tmp_path / "secret.txt").write_text("S")
    for pattern in ("../*.txt", "**/../*.txt", "/**/*.txt", str(tmp_path / "secret.txt")):
        with pytest.raises(UserError, match=r"no file in .* matches"):
            plan(reading(str(tmp_path / "inside"), include=(pattern,)), store.uri)


@pytest.mark.parametrize(
    "uri", ["s3:/bucket/x", "s3://bucket/a/../b", "s3://bucket//b", "s3://bucket/./b", "s3://", "ftp://x"]
)
def test_a_store_is_not_guessed_from_a_uri_that_is_none(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        Store(uri)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_not_fetched_by_an_address_with_a_path_in_it(store):
    commit = run(diamond(), store.uri).steps[0].commit
    for address in (f"{store.uri}/objects/../attempts/x/data", commit.uri.replace(commit.attempt.name, "..")):
        with pytest.raises((StoreError, UserError)):
            store.fetch(address)
