"""What tracking shows of artifacts is read from the store, wherever that is; what is missing is empty, not an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store_server import new_bucket, object_store_server

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import artifacts as mlflow_artifacts
from ropewalk.infra.tracking.artifacts import Artifacts


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with object_store_server():
        yield new_bucket()


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        return Store(tmp_path / "store")
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path))
    return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def write(store: Store, name: str, content: str) -> None:
    store.objects.write(name, content.encode())


def attempt(store: Store, files: dict[str, str]) -> str:
    """A committed attempt's data, as its address."""
    for name, content in files.items():
        write(store, f"objects/k/attempts/a/{name}", content)
    entries = [{"path": name, "size": len(content)} for name, content in files.items()]
    write(store, "objects/k/attempts/a/manifest.json", json.dumps({"files": entries}))
    return f"{store.uri}/objects/k/attempts/a/data"


def test_small_files_have_their_content_and_folder(store: Store) -> None:
    uri = attempt(store, {"data/report.html": "<h1>", "data/plots/a.png": "png", "data/rows.parquet": "rows"})
    with Artifacts(store).small_files(uri) as (files, left_out):
        shown = {(path.name, folder): path.read_text() for path, folder in files}
    manifest = shown.pop(("manifest.json", ""))
    assert json.loads(manifest)["files"]
    assert (shown, left_out) == ({("report.html", "data"): "<h1>", ("a.png", "data/plots"): "png"}, 0)


def test_an_artifact_says_what_it_is_and_a_bare_model_folder_is_a_checkpoint(store: Store, tmp_path: Path) -> None:
    artifacts = Artifacts(store)
    assert artifacts.facts(attempt(store, {"data/artifact.json": '{"kind": "rows"}'})) == {"kind": "rows"}
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, content in ((model, {"model_type": "llama"}), (other, {"a": 1})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    assert artifacts.facts(str(model)) == {"kind": "checkpoint"}
    for nothing in (str(other), str(tmp_path / "missing"), str(model / "config.json"), "s3://other/bucket"):
        assert artifacts.facts(nothing) == {}


def test_an_attempt_that_is_gone_shows_no_files(store: Store) -> None:
    with Artifacts(store).small_files(f"{store.uri}/objects/k/attempts/gone/data") as shown:
        assert shown == ([], 0)


def test_the_end_of_a_log_is_shown_without_secrets(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_artifacts, "MAX_LOG_BYTES", 30)
    write(store, "runs/r/logs/train/a1.log", "x" * 100 + "\nHF_TOKEN=hf_1 end")
    assert Artifacts(store).log("r", "train", "a1") == "x" * 12 + "\nHF_TOKEN=*** end"
    assert Artifacts(store).log("r", "train", "a2") == ""


def test_links_are_not_followed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    uri = attempt(store, {"data/a.txt": "own"})
    (tmp_path / "secret.txt").write_text("secret")
    (Path(uri) / "a.txt").unlink()
    (Path(uri) / "a.txt").symlink_to(tmp_path / "secret.txt")
    with Artifacts(store).small_files(uri) as (files, _):
        assert [path.name for path, _ in files] == ["manifest.json"]
