"""MLflow shows what the run record says, exactly once, whatever is killed, deleted or down in between."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import engine
import pytest
import toy_stages
from run_records import RecordBuilder, store_with_database, write_quickstart_run

from ropewalk.infra import tracker, tracking
from ropewalk.infra.mlflow_database import default_tracking_uri, open_client
from ropewalk.infra.process import process_start
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracker import TrackingError


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def sync(root: Path, run_id: str, **how: Any) -> None:
    tracking.sync(Store(root), run_id, **how)


def mlflow_run_id(root: Path, run_id: str) -> str | None:
    return tracking.mlflow_run_id(Store(root), run_id)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return store_with_database(tmp_path / "store")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one finished run, `run-1`, in MLflow. Tests add runs but leave this one alone."""
    root = store_with_database(tmp_path_factory.mktemp("shared"))
    write_quickstart_run(root, "run-1")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sync(root, "run-1")
    return root


def client_of(root: Path) -> Any:
    return open_client(default_tracking_uri(root))


def runs_of(root: Path, run_id: str) -> dict[str, Any]:
    """MLflow's runs of a run by name, with inputs and outputs; a doubled one fails here."""
    client = client_of(root)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`ropewalk.run_id` = '{run_id}'")
    names = Counter(run.info.run_name for run in found)
    assert set(names.values()) <= {1}, names
    return {run.info.run_name: client.get_run(run.info.run_id) for run in found}


def models_of(root: Path, experiment_id: str = "1") -> dict[str, Any]:
    found = client_of(root).search_logged_models([experiment_id])
    names = Counter(model.name for model in found)
    assert set(names.values()) <= {1}, names
    return {model.name: model for model in found}


def files_of(root: Path, run: Any, folder: str = "") -> set[str]:
    found = set()
    for entry in client_of(root).list_artifacts(run.info.run_id, folder):
        found |= files_of(root, run, entry.path) if entry.is_dir else {entry.path}
    return found


def history(root: Path, run: Any, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client_of(root).get_metric_history(run.info.run_id, name)]


def content(root: Path, run_id: str) -> dict[str, Any]:
    """All that MLflow has of a run, without MLflow's own ids."""
    runs = runs_of(root, run_id)
    models = models_of(root, next(iter(runs.values())).info.experiment_id)
    model_names = {model.model_id: name for name, model in models.items()}
    own = ("mlflow.parentRunId", "ropewalk.run_id", "ropewalk.pipeline")
    shown: dict[str, Any] = {}
    for name, run in runs.items():
        tags = {key: value for key, value in run.data.tags.items() if key not in own}
        shown[name.replace(run_id, "RUN")] = {
            "state": (run.info.status, run.info.start_time, run.info.end_time),
            "tags": {key: value for key, value in tags.items() if key != "mlflow.runName"},
            "params": run.data.params,
            "metrics": {key: sorted(history(root, run, key)) for key in run.data.metrics},
            "datasets": sorted((d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs),
            "models in": sorted(model_names[model.model_id] for model in run.inputs.model_inputs),
            "models out": sorted((model_names[m.model_id], m.step) for m in run.outputs.model_outputs),
            "files": files_of(root, run),
        }
    metrics = {name: sorted((m.key, m.step, m.value) for m in model.metrics) for name, model in models.items()}
    return {"runs": shown, "models": metrics}


def small_record(root: Path, run_id: str) -> RecordBuilder:
    """A training step and an evaluation of its checkpoint, finished."""
    record = RecordBuilder(root, run_id, f"pipeline of {run_id}")
    record.start(train={"config": {"lr": 0.1}}, evaluate={"inputs": {"model": {"step": "train"}}})
    record.begin("train", rows="/rows")
    for at in range(3):
        record.metrics("train", {"loss": 3.0 - at}, at=at)
    record.succeed("train", "checkpoint")
    record.begin("evaluate", model="train", heldout="/heldout")
    record.metrics("evaluate", {"score": 0.5}, at=1024, about="model")
    record.add("something_of_a_later_version", step="evaluate")
    record.succeed("evaluate", "predictions")
    record.finish()
    return record


class Faulty:
    """MLflow's client with a fault before or after some of its calls, counted from 1; everything else is real."""

    def __init__(self, client: Any, fault: BaseException | None, *at: int, after: bool = False) -> None:
        self._client, self._fault, self._at, self._after = client, fault, at, after
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            number = self.calls
            if self._fault and number in self._at and not self._after:
                raise self._fault
            answer = method(*arguments, **named)
            if self._fault and number in self._at:
                raise self._fault
            return answer

        return call


class Killed(BaseException):
    """Stands for the process being killed: nothing catches it."""


# What is shown


def test_a_run_is_a_parent_with_a_child_for_each_step(shared: Path) -> None:
    runs = runs_of(shared, "run-1")
    parent = runs.pop("run-1")
    assert mlflow_run_id(shared, "run-1") == parent.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["ropewalk.kind"] == "pipeline"
    assert parent.data.tags["ropewalk.git_commit"] == "c0ffee" * 6
    steps = {name: run for name, run in runs.items() if run.data.tags["mlflow.parentRunId"] == parent.info.run_id}
    assert set(steps) == {"documents", "rows", "base", "extend", "evaluate", "report"}
    for run in steps.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["ropewalk.cache"] == "miss"
        assert len(run.data.tags["ropewalk.output_digest"]) == 64


def test_configs_are_flat_params_and_counts_are_metrics(shared: Path) -> None:
    runs = runs_of(shared, "run-1")
    assert runs["rows"].data.params == {
        "row_tokens": "4096",
        "mix.long_fraction": "0.5",
        "mix.sources": '["a", "b"]',
        "cap": "null",
    }
    metrics = runs["documents"].data.metrics
    assert (metrics["counts.in"], metrics["counts.kept"], metrics["counts.short"]) == (12, 10, 2)
    assert metrics["seconds"] == 2.5
    assert metrics["odd_name"] == 1.0


def test_training_curves_keep_step_value_and_time(shared: Path) -> None:
    run = runs_of(shared, "run-1")["base"]
    points = client_of(shared).get_metric_history(run.info.run_id, "loss")
    events = [json.loads(line) for line in (shared / "runs/run-1/events.jsonl").read_text().splitlines()]
    written = [e for e in events if e["type"] == "metrics" and e["step"] == "base"]
    expected = [(e["metric_step"], e["metrics"]["loss"], round(e["time"] * 1000)) for e in written]
    assert [(point.step, point.value, point.timestamp) for point in points] == expected


def test_inputs_and_outputs_are_datasets_with_digest_and_source(shared: Path) -> None:
    run = runs_of(shared, "run-1")["rows"]
    found = {entry.dataset.name: entry for entry in run.inputs.dataset_inputs}
    assert set(found) == {"documents/documents", "rows/rows"}
    given = found["documents/documents"]
    tags = {tag.key: tag.value for tag in given.tags}
    source = runs_of(shared, "run-1")["documents"].data.tags
    assert tags == {"mlflow.data.context": "input", "ropewalk.digest": source["ropewalk.output_digest"]}
    assert given.dataset.digest == source["ropewalk.output_digest"][:32]
    assert json.loads(given.dataset.source) == {"uri": source["ropewalk.output_uri"]}
    assert {tag.value for tag in found["rows/rows"].tags} >= {"output"}


def test_checkpoints_are_models_linked_to_what_made_and_what_judged_them(shared: Path) -> None:
    runs, models = runs_of(shared, "run-1"), models_of(shared)
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


def test_evaluations_are_attached_to_their_model_by_length(shared: Path) -> None:
    models = models_of(shared)
    for name, window in (("base", 1024), ("extend", 4096)):
        scores = {m.step: m.value for m in models[name].metrics if m.key == "passkey/score"}
        assert scores == {length: 0.9 if length <= window else 0.1 for length in (512, 1024, 2048, 4096)}
        assert {m.dataset_name for m in models[name].metrics} == {"documents/heldout"}


def test_several_models_in_one_step_do_not_mix_their_curves(shared: Path) -> None:
    runs = runs_of(shared, "run-1")
    lengths = (512, 1024, 2048, 4096)
    assert history(shared, runs["evaluate"], "base/passkey/score") == list(
        zip(lengths, (0.9, 0.9, 0.1, 0.1), strict=True)
    )
    assert history(shared, runs["evaluate/extended"], "passkey/score") == [(length, 0.9) for length in lengths]
    assert "passkey/score" not in runs["evaluate"].data.metrics
    assert runs["evaluate/base"].data.tags["mlflow.parentRunId"] == runs["evaluate"].info.run_id
    assert runs["evaluate/base"].info.status == "FINISHED"


def test_small_files_are_artifacts_and_the_report_is_on_the_parent_too(shared: Path) -> None:
    runs = runs_of(shared, "run-1")
    shown = {
        "data/report.html",
        "data/plots/scores.png",
        "data/artifact.json",
        "observed/latency.json",
        "manifest.json",
    }
    assert files_of(shared, runs["report"]) == shown | {"config.json"}
    assert files_of(shared, runs["run-1"]) == {f"report/{name}" for name in shown} | {"run.json"}


def test_secrets_reach_neither_params_nor_artifacts(shared: Path) -> None:
    run = runs_of(shared, "run-1")["extend"]
    assert run.data.params["hub_token"] == "***"
    written = [path for path in (shared / "mlartifacts").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"hf_abcdefghij" in path.read_bytes()]


def test_a_reused_step_is_a_short_child_and_its_model_is_the_same(shared: Path) -> None:
    first = write_quickstart_run(shared, "run-0")
    sync(shared, "run-0")
    before = {name: model.model_id for name, model in models_of(shared).items()}
    record = RecordBuilder(shared, "run-2", "quickstart")
    record.start(base={"config": {"learning_rate": 1e-3}}, report={})
    record.reuse("base", first, rows="/rows")
    record.reuse("report", first)
    record.finish()
    sync(shared, "run-2")
    runs = runs_of(shared, "run-2")
    assert runs["base"].data.tags["ropewalk.cache"] == "hit"
    assert runs["base"].data.tags["ropewalk.source"] == first.outputs["base"]["uri"]
    assert runs["base"].info.status == "FINISHED"
    assert [out.model_id for out in runs["base"].outputs.model_outputs] == [before["base"]]
    assert {name: model.model_id for name, model in models_of(shared).items()} == before
    assert "report/data/report.html" in files_of(shared, runs["run-2"])


def test_metrics_about_the_only_model_keep_their_names(shared: Path) -> None:
    small_record(shared, "run-single")
    sync(shared, "run-single")
    runs = runs_of(shared, "run-single")
    assert set(runs) == {"run-single", "train", "evaluate"}
    assert history(shared, runs["evaluate"], "score") == [(1024, 0.5)]
    model = models_of(shared, runs["train"].info.experiment_id)["train"]
    assert [(m.key, m.step, m.value, m.dataset_name) for m in model.metrics] == [
        ("score", 1024, 0.5, "external/heldout")
    ]


def test_values_that_are_no_numbers_are_nan_and_stay_away_from_models(shared: Path) -> None:
    record = RecordBuilder(shared, "run-nan", "numbers")
    record.start(train={}, evaluate={})
    record.begin("train")
    record.metrics("train", {"loss": math.nan, "norm": math.inf, "fine": 1.0}, at=1)
    record.succeed("train", "checkpoint")
    record.begin("evaluate", model="train")
    record.metrics("evaluate", {"loss": math.nan, "score": 1.0}, at=1, about="model")
    record.succeed("evaluate", "predictions")
    record.finish()
    sync(shared, "run-nan")
    runs = runs_of(shared, "run-nan")
    assert math.isnan(runs["train"].data.metrics["loss"]) and math.isnan(runs["train"].data.metrics["norm"])
    assert runs["train"].data.metrics["fine"] == 1.0
    model = models_of(shared, runs["train"].info.experiment_id)["train"]
    assert [m.key for m in model.metrics] == ["score"]


def test_a_large_config_is_cut_visibly_and_kept_whole_as_a_file(shared: Path) -> None:
    record = RecordBuilder(shared, "run-large", "large")
    config = {"text": "x" * 7000, **{f"field_{i}": i for i in range(250)}}
    record.start(pack={"config": config})
    record.begin("pack")
    record.finish("cancelled")
    sync(shared, "run-large")
    run = runs_of(shared, "run-large")["pack"]
    assert len(run.data.params) == 251
    assert run.data.params["text"].endswith("[cut; see config.json]")
    path = client_of(shared).download_artifacts(run.info.run_id, "config.json")
    assert json.loads(Path(path).read_text()) == config


def test_what_the_engine_records_is_shown(shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    for cache in ("miss", "hit"):
        result = engine.run(toy_stages.diamond(), shared)
        sync(shared, result.run_id)
        runs = runs_of(shared, result.run_id)
        assert runs.pop(result.run_id).info.status == "FINISHED"
        assert {name: run.data.tags["ropewalk.key"] for name, run in runs.items()} == {
            step.name: step.key for step in result.steps
        }
        assert {run.data.tags["ropewalk.cache"] for run in runs.values()} == {cache}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}


# How runs end


def test_a_failed_attempt_and_its_retry_are_one_child(shared: Path) -> None:
    record = RecordBuilder(shared, "run-retry", "retries")
    record.start(train={})
    log = record.folder / "logs" / "train" / "a1.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback: HF_TOKEN=abc\n")
    record.begin("train", attempt="a1")
    failed = {"step": "train", "key": "k", "attempt": "a1", "seconds": 1.0}
    record.add("step_failed", error="ValueError: no rows", **failed)
    sync(shared, "run-retry")
    run = runs_of(shared, "run-retry")["train"]
    assert (run.info.status, run.data.tags["ropewalk.error"]) == ("FAILED", "ValueError: no rows")
    path = client_of(shared).download_artifacts(run.info.run_id, "logs/a1.txt")
    assert Path(path).read_text() == "Traceback: HF_TOKEN=***\n"
    record.begin("train", attempt="a2")
    sync(shared, "run-retry")
    assert runs_of(shared, "run-retry")["train"].info.status == "RUNNING"
    record.succeed("train", "rows")
    record.finish()
    sync(shared, "run-retry")
    run = runs_of(shared, "run-retry")["train"]
    assert (run.info.status, run.data.tags["ropewalk.attempt"]) == ("FINISHED", "a2")


@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("cancelled", "KILLED")])
def test_the_end_of_a_run_closes_what_is_still_open(shared: Path, status: str, expected: str) -> None:
    record = RecordBuilder(shared, f"run-{status}", "endings")
    record.start(train={}, report={})
    record.begin("train")
    record.add("step_skipped", step="report", reason="depends on train")
    record.finish(status)
    sync(shared, f"run-{status}")
    runs = runs_of(shared, f"run-{status}")
    assert runs[f"run-{status}"].info.status == expected
    assert runs["train"].info.status == "KILLED"
    assert runs[f"run-{status}"].data.tags["ropewalk.skipped.report"] == "depends on train"


def test_a_run_whose_driver_died_is_killed_and_one_on_another_machine_is_not(shared: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for run_id, expected in (("run-dead", "KILLED"), ("run-elsewhere", "RUNNING")):
        driver = {"pid": int(gone.stdout), "process_started": 1.0}
        if run_id == "run-elsewhere":
            driver |= {"host": "another-machine"}
        record = RecordBuilder(shared, run_id, "drivers", driver=driver)
        record.start(train={})
        record.begin("train")
        sync(shared, run_id)
        runs = runs_of(shared, run_id)
        assert {run.info.status for run in runs.values()} == {expected}
    assert "without a word" in runs_of(shared, "run-dead")["train"].data.tags["ropewalk.ended"]


# Exactly once


def test_syncing_again_changes_nothing(shared: Path) -> None:
    before = content(shared, "run-1")
    sync(shared, "run-1")
    (shared / "runs/run-1/mlflow.json").unlink()
    sync(shared, "run-1")
    assert content(shared, "run-1") == before


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_being_killed_at_any_call_loses_and_doubles_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    counting = Faulty(client_of(store), None)
    monkeypatch.setattr(tracker, "open_client", lambda uri: counting)
    small_record(store, "undisturbed")
    sync(store, "undisturbed")
    expected = content(store, "undisturbed")
    killed = []
    # Both sides of a call matter: before it nothing is there, after it the id is not yet written down.
    for number, at in enumerate(range(1, counting.calls, stride)):
        run_id = f"killed-{at}"
        small_record(store, run_id)
        faulty = Faulty(client_of(store), Killed(), at, after=bool(number % 3))
        monkeypatch.setattr(tracker, "open_client", lambda uri, faulty=faulty: faulty)
        with contextlib.suppress(Killed):
            sync(store, run_id)
            pytest.fail("the fault was not met")
        monkeypatch.setattr(tracker, "open_client", open_client)
        sync(store, run_id)
        assert content(store, run_id) == expected, at
        killed.append(at)
    assert len(killed) >= 7


def test_a_run_deleted_in_mlflow_is_rebuilt(store: Path) -> None:
    small_record(store, "run")
    sync(store, "run")
    before = content(store, "run")
    client = client_of(store)
    for run in runs_of(store, "run").values():
        client.delete_run(run.info.run_id)
    sync(store, "run")
    assert content(store, "run")["runs"] == before["runs"]


def test_another_mlflow_gets_the_whole_run(store: Path, tmp_path: Path) -> None:
    small_record(store, "run")
    sync(store, "run")
    other = f"sqlite:///{store_with_database(tmp_path / 'other') / 'mlflow.db'}"
    sync(store, "run", tracking_uri=other)
    assert content(tmp_path / "other", "run")["runs"].keys() == content(store, "run")["runs"].keys()


def test_a_line_that_is_still_being_written_waits_for_its_end(store: Path) -> None:
    record = RecordBuilder(store, "run", "torn")
    record.start(train={})
    record.begin("train")
    whole = json.dumps({"seq": 2, "time": 1.0, "type": "run_finished", "status": "succeeded", "seconds": 1.0}) + "\n"
    with record.path.open("a") as file:
        file.write(whole[:30])
        file.flush()
        sync(store, "run")
        assert runs_of(store, "run")["run"].info.status == "RUNNING"
        file.write(whole[30:])
    sync(store, "run")
    assert runs_of(store, "run")["run"].info.status == "FINISHED"


def test_a_broken_line_is_named(store: Path) -> None:
    record = RecordBuilder(store, "run", "broken")
    record.start(train={})
    with record.path.open("a") as file:
        file.write("{oops\n")
    with pytest.raises(UserError, match=r"events\.jsonl has a line that is no JSON .*oops"):
        sync(store, "run")


def test_an_unknown_run_is_named(store: Path) -> None:
    with pytest.raises(UserError, match="no run is called 'nothing'"):
        sync(store, "nothing")


def test_an_event_that_mlflow_refuses_is_marked_and_does_not_block_the_rest(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class Refusing(Faulty):
        def log_batch(self, run_id: str, metrics: Any = (), **rest: Any) -> None:
            if any(metric.key == "loss" for metric in metrics):
                raise MlflowException("bad metric", INVALID_PARAMETER_VALUE)
            self._client.log_batch(run_id, metrics=metrics, **rest)

    small_record(store, "run")
    monkeypatch.setattr(tracker, "open_client", lambda uri: Refusing(open_client(uri), None))
    sync(store, "run")
    runs = runs_of(store, "run")
    assert runs["run"].info.status == "FINISHED"
    refused = {key: value for key, value in runs["run"].data.tags.items() if key.startswith("ropewalk.refused.")}
    assert refused == {f"ropewalk.refused.{seq}": "metrics: bad metric" for seq in (2, 3, 4)}


# While it grows, and outages


@pytest.mark.parametrize("after", [False, True])
def test_an_outage_during_the_run_is_ridden_out(store: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    from mlflow.exceptions import MlflowException

    small_record(store, "run")
    sync(store, "run")
    expected = content(store, "run")
    small_record(store, "flaky")
    fault = MlflowException("connection refused")
    flaky = Faulty(open_client(default_tracking_uri(store)), fault, 4, 9, 20, 40, after=after)
    monkeypatch.setattr(tracker, "open_client", lambda uri: flaky)
    monkeypatch.setattr(tracker, "FIRST_BACKOFF_SECONDS", 0.01)
    sync(store, "flaky", follow=True)
    assert flaky.calls > 40
    assert content(store, "flaky") == expected


def test_mlflow_being_down_is_one_clear_sentence(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    small_record(store, "run")
    with pytest.raises(TrackingError, match=r"MLflow at http://\*\*\*@127.0.0.1:9 does not take run run") as caught:
        sync(store, "run")
    assert "secret" not in str(caught.value)
    assert tracking.main([str(store), "run"]) == 1


def test_after_the_run_mlflow_is_waited_for_only_so_long(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "PATIENCE_SECONDS", 1.5)
    small_record(store, "run")
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLflow has only the first 0 events .* `ropewalk sync run` catches up"):
        sync(store, "run", follow=True, tracking_uri="http://127.0.0.1:9")
    assert time.monotonic() - began < 10


def test_the_child_process_follows_a_run_to_its_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A run id left in the environment would make MLflow's fluent API write into a stranger's run.
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    record = RecordBuilder(store, "live", "live")
    assert mlflow_run_id(store, "live") is None
    child = tracking.start(Store(store), "live")
    try:
        record.start(train={})
        record.begin("train")
        deadline = time.monotonic() + 60
        while mlflow_run_id(store, "live") is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert mlflow_run_id(store, "live") is not None
        for at in range(5):
            record.metrics("train", {"loss": float(at)}, at=at)
        record.succeed("train", "rows")
        record.finish()
        assert child.wait(timeout=60) == 0, (record.folder / "logs/tracking.log").read_text()
    finally:
        child.kill()
        child.wait()
    assert history(store, runs_of(store, "live")["train"], "loss") == [(at, float(at)) for at in range(5)]
    assert runs_of(store, "live")["live"].info.status == "FINISHED"


def test_the_child_process_outlives_a_killed_driver_and_closes_its_run(store: Path) -> None:
    code = (
        "import sys, time; from ropewalk.infra import tracking; from ropewalk.infra.store import Store; sys.stdin.read();"
        "print(tracking.start(Store(sys.argv[1]), 'orphan').pid, flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert driver.stdin is not None and driver.stdout is not None
    process = {"pid": driver.pid, "process_started": process_start(driver.pid)}
    record = RecordBuilder(store, "orphan", "orphan", driver=process)
    record.start(train={})
    record.begin("train")
    driver.stdin.close()
    child_pid = int(driver.stdout.readline())
    # What a terminal does on Ctrl-C reaches the driver's group, not the child.
    assert os.getpgid(child_pid) != os.getpgid(driver.pid)
    record.metrics("train", {"loss": 1.0}, at=1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child_pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    runs = runs_of(store, "orphan")
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert history(store, runs["train"], "loss") == [(1, 1.0)]


def test_four_processes_may_be_the_first_to_use_a_database(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ropewalk.infra.mlflow_database import *;"
        "prepare(default_tracking_uri(Path(sys.argv[1])))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0, 0]
    assert [experiment.name for experiment in client_of(tmp_path).search_experiments()] == ["Default"]
    assert not list(tmp_path.glob("*.partial*"))


def test_importing_and_starting_needs_no_mlflow() -> None:
    code = "import sys, ropewalk.infra.tracking; print({'mlflow', 'ray', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
