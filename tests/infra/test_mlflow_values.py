"""What is handed to MLflow is within its limits, and what is left out is left out visibly."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from ropewalk.infra import mlflow_values
from ropewalk.infra.mlflow_values import MAX_PARAM_CHARACTERS, artifact_facts, name_for_mlflow, params_of, small_files


@given(st.text(min_size=1, max_size=300))
@example("score@128k")
@example("../../x")
@example("a//b")
@example("/a/")
@example(".")
def test_any_name_becomes_one_that_mlflow_takes(name: str) -> None:
    _validate_metric_name(name_for_mlflow(name))


def test_names_that_mlflow_takes_stay_as_they_are() -> None:
    for name in ("loss", "passkey/effective_length_tokens", "a.b-c d:e", "counts.in"):
        assert name_for_mlflow(name) == name


def test_params_are_flat_exact_and_visibly_cut() -> None:
    config = {"a": {"b": 1, "c": {}}, "list": [{"d": 0.1}], "on": True, "none": None, "text": "x" * 9000, "e": 1e-5}
    params = params_of(config)
    cut = params.pop("text")
    assert len(cut) == MAX_PARAM_CHARACTERS and cut.endswith("x ... [cut; see config.json]")
    assert params == {"a.b": "1", "a.c": "{}", "list": '[{"d": 0.1}]', "on": "true", "none": "null", "e": "1e-05"}
    assert params_of({}) == {}


def test_only_small_readable_files_of_the_artifact_itself_are_uploaded(tmp_path: Path) -> None:
    data = tmp_path / "attempt" / "data"
    (data / "plots").mkdir(parents=True)
    (tmp_path / "attempt" / "observed").mkdir()
    (tmp_path / "secret.txt").write_text("outside")
    (data / "link.txt").symlink_to(tmp_path / "secret.txt")
    (data / "rows-00000.parquet").write_bytes(b"")
    (data / "plots" / "a.PNG").write_bytes(b"")
    with (data / "large.json").open("wb") as file:
        file.truncate(mlflow_values.MAX_UPLOAD_BYTES + 1)
    (tmp_path / "attempt" / "observed" / "times.csv").write_text("")
    (tmp_path / "attempt" / "manifest.json").write_text("[]")
    files, left_out = small_files(str(data))
    assert [(path.name, folder) for path, folder in files] == [
        ("a.PNG", "data/plots"),
        ("times.csv", "observed"),
        ("manifest.json", ""),
    ]
    assert left_out == 1
    for number in range(60):
        (data / f"{number:02d}.txt").write_text("")
    files, left_out = small_files(str(data))
    assert len(files) == mlflow_values.MAX_UPLOADS + 1
    assert left_out == 1 + 60 + 2 - mlflow_values.MAX_UPLOADS


def test_a_bare_model_folder_counts_as_a_checkpoint_and_anything_else_as_unknown(tmp_path: Path) -> None:
    assert artifact_facts(str(tmp_path)) == {}
    assert artifact_facts(str(tmp_path / "missing")) == {}
    assert artifact_facts("s3://bucket/model") == {}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert artifact_facts(str(tmp_path)) == {"kind": "checkpoint"}
    (tmp_path / "artifact.json").write_text(json.dumps({"kind": "report"}))
    assert artifact_facts(str(tmp_path)) == {"kind": "report"}
