"""Checkpoints are models, everything else is datasets, and each is linked to what made it and what used it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_records import RecordBuilder, small_record, write_quickstart_run
from shown_runs import files_of, history, models_of, runs_of

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking

pytestmark = pytest.mark.usefixtures("no_server")


def sync(root: Path, run_id: str, **how: Any) -> None:
    tracking.sync(Store(root), run_id, **how)


def test_inputs_and_outputs_are_datasets_with_digest_and_source(shown_store: Path) -> None:
    run = runs_of(shown_store, "run-1")["rows"]
    found = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    assert set(found) == {"documents/documents", "rows/rows"}
    given = found["documents/documents"]
    tags = {tag.key: tag.value for tag in given.tags}
    source = runs_of(shown_store, "run-1")["documents"].data.tags
    assert tags == {"mlflow.data.context": "input", "ropewalk.digest": source["ropewalk.output_digest"]}
    assert given.dataset.digest == source["ropewalk.output_digest"][:32]
    assert json.loads(given.dataset.source) == {"uri": source["ropewalk.output_uri"]}
    assert {tag.value for tag in found["rows/rows"].tags} >= {"output"}


def test_checkpoints_are_models_linked_to_what_made_and_what_judged_them(shown_store: Path) -> None:
    runs, models = runs_of(shown_store, "run-1"), models_of(shown_store)
    assert set(models) == {"base", "extend"}
    for name, window in (("base", "1024"), ("extend", "4096")):
        model = models[name]
        assert str(model.status) == "READY"
        assert model.params == {"window_tokens": window}
        assert model.tags["ropewalk.digest"] == runs[name].data.tags["ropewalk.output_digest"]
        assert [(out.model_id, out.step) for out in runs[name].outputs.model_outputs] == [(model.model_id, 30)]
    judged = {model.model_id for model in runs["evaluate"].inputs.model_inputs}
    assert judged == {models["base"].model_id, models["extend"].model_id}
    assert [m.model_id for m in runs["extend"].inputs.model_inputs] == [models["base"].model_id]


def test_evaluations_are_attached_to_their_model_by_length(shown_store: Path) -> None:
    models = models_of(shown_store)
    for name, window in (("base", 1024), ("extend", 4096)):
        scores = {m.step: m.value for m in models[name].metrics if m.key == "passkey/score"}
        assert scores == {length: 0.9 if length <= window else 0.1 for length in (512, 1024, 2048, 4096)}
        assert {m.dataset_name for m in models[name].metrics} == {"documents/heldout"}


def test_several_models_in_one_step_do_not_mix_their_curves(shown_store: Path) -> None:
    runs = runs_of(shown_store, "run-1")
    lengths = (512, 1024, 2048, 4096)
    assert history(shown_store, runs["evaluate"], "base/passkey/score") == list(
        zip(lengths, (0.9, 0.9, 0.1, 0.1), strict=True)
    )
    assert history(shown_store, runs["evaluate/extended"], "passkey/score") == [(length, 0.9) for length in lengths]
    assert "passkey/score" not in runs["evaluate"].data.metrics
    assert runs["evaluate/base"].data.tags["mlflow.parentRunId"] == runs["evaluate"].info.run_id
    assert runs["evaluate/base"].info.status == "FINISHED"


def test_metrics_about_the_only_model_keep_their_names(shown_store: Path) -> None:
    small_record(shown_store, "run-single")
    sync(shown_store, "run-single")
    runs = runs_of(shown_store, "run-single")
    assert set(runs) == {"run-single", "train", "evaluate"}
    assert history(shown_store, runs["evaluate"], "score") == [(1024, 0.5)]
    model = models_of(shown_store, runs["train"].info.experiment_id)["train"]
    assert [(m.key, m.step, m.value, m.dataset_name) for m in model.metrics] == [
        ("score", 1024, 0.5, "external/heldout")
    ]


def test_a_reused_step_is_a_short_child_and_its_model_is_the_same(shown_store: Path) -> None:
    first = write_quickstart_run(shown_store, "run-0")
    sync(shown_store, "run-0")
    before = {name: model.model_id for name, model in models_of(shown_store).items()}
    record = RecordBuilder(shown_store, "run-2", "quickstart")
    record.start(base={"config": {"learning_rate": 1e-3}}, report={})
    record.reuse("base", first, rows="/rows")
    record.reuse("report", first)
    record.finish()
    sync(shown_store, "run-2")
    runs = runs_of(shown_store, "run-2")
    assert runs["base"].data.tags["ropewalk.cache"] == "hit"
    assert runs["base"].data.tags["ropewalk.source"] == first.outputs["base"]["uri"]
    assert runs["base"].info.status == "FINISHED"
    assert [out.model_id for out in runs["base"].outputs.model_outputs] == [before["base"]]
    assert {name: model.model_id for name, model in models_of(shown_store).items()} == before
    assert "report/data/report.html" in files_of(shown_store, runs["run-2"])


def test_values_that_are_no_numbers_are_nan_and_stay_away_from_models(shown_store: Path) -> None:
    record = RecordBuilder(shown_store, "run-nan", "numbers")
    record.start(train={}, evaluate={})
    record.begin("train")
    record.metrics("train", {"loss": math.nan, "norm": math.inf, "fine": 1.0}, at=1)
    record.succeed("train", "checkpoint")
    record.begin("evaluate", model="train")
    record.metrics("evaluate", {"loss": math.nan, "score": 1.0}, at=1, about="model")
    record.succeed("evaluate", "predictions")
    record.finish()
    sync(shown_store, "run-nan")
    runs = runs_of(shown_store, "run-nan")
    assert math.isnan(runs["train"].data.metrics["loss"]) and math.isnan(runs["train"].data.metrics["norm"])
    assert runs["train"].data.metrics["fine"] == 1.0
    model = models_of(shown_store, runs["train"].info.experiment_id)["train"]
    assert [m.key for m in model.metrics] == ["score"]
