"""What is handed to MLflow is within its limits, and what is left out is left out visibly."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from ropewalk.infra.tracking.values import (
    MAX_PARAM_CHARACTERS,
    MAX_UPLOAD_BYTES,
    MAX_UPLOADS,
    name_for_mlflow,
    params_of,
    shown_files,
)


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


def test_only_small_readable_files_of_the_attempt_itself_are_shown() -> None:
    def entry(path: str, size: int = 1) -> dict[str, object]:
        return {"path": path, "size": size}

    files = [
        entry("observed/times.csv"),
        entry("data/rows-00000.parquet"),
        entry("data/plots/a.PNG"),
        entry("data/large.json", MAX_UPLOAD_BYTES + 1),
        entry("data/../../secret.txt"),
        entry("/etc/motd.txt"),
    ]
    assert shown_files(files) == (["data/plots/a.PNG", "observed/times.csv", "manifest.json"], 3)
    files += [entry(f"data/{number:02d}.txt") for number in range(60)]
    shown, left_out = shown_files(files)
    assert len(shown) == MAX_UPLOADS + 1
    assert left_out == 3 + 60 + 2 - MAX_UPLOADS
    assert shown_files([]) == ([], 0)
