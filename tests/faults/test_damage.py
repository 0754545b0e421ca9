"""Committed files are damaged: the damage is reported by file, the output is never used, and only it is made again."""

import json
import os
import shutil
from pathlib import Path

import pytest
from engine import plan, run, statuses
from faults.soak import damage
from toy_stages import diamond, executions

from ropewalk.infra.plan import Planner
from ropewalk.infra.store import Store

SEEN_BY_A_LOOK = ("truncate", "delete file", "delete manifest", "empty commit")
"""Kinds of damage that planning finds: it reads records and manifests, and names and sizes of files."""


@pytest.fixture
def counted(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    return tmp_path


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def committed(result, step):
    return next(s.commit for s in result.steps if s.name == step)


def digests(result):
    return [step.commit.digest for step in result.steps]


@pytest.mark.parametrize("kind", SEEN_BY_A_LOOK)
def test_a_damaged_output_is_reported_by_file_and_made_again_alone(counted, store, kind):
    undisturbed = run(diamond(), store.root)
    commit = committed(undisturbed, "right")
    name = damage(store, commit.key, commit.attempt.name, commit.number, kind)
    planned = plan(diamond(), store.root)
    status, reason = planned["right"]
    assert status == "run" and "corrupt output" in reason and name in reason
    assert planned["first"][0] == planned["left"][0] == "reuse"
    (counted / "executions").write_text("")
    again = run(diamond(), store.root)
    assert statuses(again) == {"first": "reused", "left": "reused", "right": "ran", "last": "reused"}
    assert executions(counted) == ["total"]
    assert digests(again) == digests(undisturbed)
    assert store.numbers(commit.key) == [0, 1] and store.latest(commit.key)[0].number == 1


def test_a_changed_bit_is_found_by_its_content_and_named(store):
    commit = committed(run(diamond(), store.root), "right")
    name = damage(store, commit.key, commit.attempt.name, commit.number, "flip")
    assert store.problems(commit) == []
    assert store.problems(commit, deep=True) == [f"{store.uri}/{name}: content changed since it was committed"]


@pytest.mark.parametrize("same_time", [False, True])
def test_a_changed_bit_is_never_consumed(counted, store, same_time):
    undisturbed = run(diamond(), store.root)
    commit = committed(undisturbed, "first")
    changed = store.root / f"objects/{commit.key}/attempts/{commit.attempt.name}/data/value.json"
    before = changed.stat()
    damage(store, commit.key, commit.attempt.name, commit.number, "flip")
    if same_time:
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.rmtree(store.root / "objects" / committed(undisturbed, "right").key)
    (counted / "executions").write_text("")
    result = run(diamond(), store.root)
    step = next(step for step in result.steps if step.name == "right")
    assert (step.status, executions(counted)) == ("failed", [])
    assert str(changed) in step.reason and "content changed" in step.reason and "verify" in step.reason


def test_a_foreign_version_of_the_format_is_reported_and_not_consumed(counted, store):
    commit = committed(run(diamond(), store.root), "right")
    path = store.root / f"objects/{commit.key}/commits/000000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    status, reason = plan(diamond(), store.root)["right"]
    assert status == "run" and str(path) in reason and "format" in reason
    assert statuses(run(diamond(), store.root))["right"] == "ran"


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"null", b'{"format": 1}', b"{" * 10_000])
def test_commits_that_are_no_commits_never_stop_a_run(store, content):
    commit = committed(run(diamond(), store.root), "right")
    (store.root / f"objects/{commit.key}/commits/000000.json").write_bytes(content)
    assert "corrupt output" in plan(diamond(), store.root)["right"][1]
    assert statuses(run(diamond(), store.root))["right"] == "ran"


@pytest.mark.parametrize(
    "path", ["data/../../../../../../secret.json", "/etc/hostname", "data/../../../secret.json", "work/x", ""]
)
def test_a_manifest_that_points_outside_is_refused(tmp_path, store, path):
    commit = committed(run(diamond(), store.root), "right")
    (tmp_path / "secret.json").write_text("7")
    rewrite_manifest(store, commit, lambda entry: {**entry, "path": path})
    status, reason = plan(diamond(), store.root)["right"]
    assert status == "run" and "corrupt output" in reason and "manifest.json" in reason


@pytest.mark.parametrize("entry", [{}, {"path": 3}, {"path": "data/value.json", "size": "1", "sha256": None}, "x"])
def test_a_manifest_of_another_shape_is_refused(store, entry):
    commit = committed(run(diamond(), store.root), "right")
    rewrite_manifest(store, commit, lambda _: entry)
    assert "corrupt output" in plan(diamond(), store.root)["right"][1]


def test_a_manifest_that_is_not_the_committed_one_is_refused_though_it_is_a_manifest(store):
    commit = committed(run(diamond(), store.root), "right")
    name = f"objects/{commit.key}/attempts/{commit.attempt.name}/manifest.json"
    document = json.loads(store.objects.read(name))
    document["files"][0]["sha256"] = "0" * 64
    store.objects.write(name, json.dumps(document).encode())
    status, reason = plan(diamond(), store.root)["right"]
    assert status == "run" and f"{name}: changed since it was committed" in reason


def test_a_file_replaced_by_a_link_to_another_is_corrupt(tmp_path, store):
    commit = committed(run(diamond(), store.root), "right")
    data = store.root / f"objects/{commit.key}/attempts/{commit.attempt.name}/data/value.json"
    outside = tmp_path / "outside.json"
    shutil.move(data, outside)
    data.symlink_to(outside)
    status, reason = plan(diamond(), store.root)["right"]
    assert status == "run" and "value.json" in reason


def test_a_folder_replaced_by_a_link_to_another_is_corrupt(tmp_path, store):
    commit = committed(run(diamond(), store.root), "right")
    data = store.root / f"objects/{commit.key}/attempts/{commit.attempt.name}/data"
    shutil.move(data, tmp_path / "outside")
    data.symlink_to(tmp_path / "outside")
    assert plan(diamond(), store.root)["right"][0] == "run"


def test_an_output_that_links_elsewhere_is_not_committed(store, tmp_path):
    from ropewalk.infra.store import StoreError, new_attempt_name

    key = Planner(diamond(), store).plan()[0].key
    attempt = store.begin(key, new_attempt_name())
    (tmp_path / "secret").write_text("x")
    (attempt.data / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(StoreError, match="symbolic links cannot be committed"):
        store.commit(attempt, {}, number=0)
    assert store.latest(key) == (None, [])


def rewrite_manifest(store, commit, change):
    """A manifest as an attacker would write it: the commit's digest of it fits."""
    from ropewalk.infra.key import canonical_json, sha256_hex

    folder = store.root / f"objects/{commit.key}"
    manifest = folder / "attempts" / commit.attempt.name / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"] = [change(entry) for entry in document["files"]]
    text = canonical_json(document) + "\n"
    manifest.write_text(text)
    record = folder / "commits" / "000000.json"
    found = json.loads(record.read_text())
    record.write_text(json.dumps({**found, "manifest_sha256": sha256_hex(text)}))
    assert Path(manifest).exists()
