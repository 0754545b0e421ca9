"""What a commit names is on the disk before the commit is: a machine that loses power has all of it or no commit."""

import os
from pathlib import Path

import pytest
from engine import run
from toy_stages import Config

from ropewalk.infra.step import Pipeline, Step


class many:  # noqa: N801
    """Writes files in folders of its own."""

    NAME, VERSION = "many", 1

    @staticmethod
    def run(config, inputs, output, context):
        for name in ("a.bin", "deep/b.bin", "deep/deeper/c.bin"):
            path = output.data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"content")
        (output.observed / "time.json").write_text("1")


@pytest.fixture
def traced(monkeypatch):
    """What was synced or linked, in order: (call, path)."""
    calls, sync, link, replace = [], os.fsync, os.link, Path.replace

    def fsync(handle):
        calls.append(("sync", str(Path(f"/proc/self/fd/{handle}").readlink())))
        sync(handle)

    def linked(source, target, **options):
        calls.append(("link", str(target)))
        link(source, target, **options)

    def replaced(source, target):
        calls.append(("replace", f"{source} -> {target}"))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", linked)
    monkeypatch.setattr(Path, "replace", replaced)
    return calls


def test_all_files_and_folders_of_a_commit_are_synced_before_it_and_its_own_name_after_it(tmp_path, traced):
    result = run(Pipeline("p", (Step("s", many, Config()),)), tmp_path)
    commit = result.steps[0].commit
    folder = commit.attempt.folder
    name = folder.parents[1] / "commits" / "000000.json"
    (at,) = [place for place, call in enumerate(traced) if call == ("link", str(name))]
    before, after = traced[:at], traced[at:]
    parts = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert len(parts) == 4
    folders = {parent for path in folder.rglob("*") for parent in path.parents if parent.is_relative_to(folder)}
    above = {folder.parent, folder.parents[1], folder.parents[2]}
    for path in {*parts, *folders, *above}:
        assert ("sync", str(path)) in before, f"{path} may be lost though the commit is there"
    # The manifest appears by its content being synced under another name, which then is replaced, then its folder.
    (manifest,) = [place for place, (call, path) in enumerate(before) if path.endswith(f"-> {folder}/manifest.json")]
    temporary = before[manifest][1].partition(" -> ")[0]
    assert ("sync", temporary) in before[:manifest] and ("sync", str(folder)) in before[manifest:]
    # So does the commit; and whoever is told of it can rely on its name being there.
    assert any(call == "sync" and path.startswith(f"{name.parent}/.{name.name}.") for call, path in before)
    assert ("sync", str(name.parent)) in after


def test_events_are_synced_when_the_run_ends(tmp_path, traced):
    result = run(Pipeline("p", (Step("s", many, Config()),)), tmp_path)
    assert ("sync", str(tmp_path / "runs" / result.run_id / "events.jsonl")) in traced
