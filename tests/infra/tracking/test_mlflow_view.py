"""MLflow shows of a run what its record says: its steps, configs, numbers and files, and how all of it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
import toy_stages
from run_records import RecordBuilder
from shown_runs import client_of, files_of, runs_of

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking

pytestmark = pytest.mark.usefixtures("no_server")


def sync(root: Path, run_id: str, **how: Any) -> None:
    tracking.sync(Store(root), run_id, **how)


def test_a_run_is_a_parent_with_a_child_for_each_step(shown_store: Path) -> None:
    runs = runs_of(shown_store, "run-1")
    parent = runs.pop("run-1")
    assert tracking.mlflow_run_id(Store(shown_store), "run-1") == parent.info.run_id
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["ropewalk.kind"] == "pipeline"
    assert parent.data.tags["ropewalk.git_commit"] == "c0ffee" * 6
    steps = {name: run for name, run in runs.items() if run.data.tags["mlflow.parentRunId"] == parent.info.run_id}
    assert set(steps) == {"documents", "rows", "base", "extend", "evaluate", "report"}
    for run in steps.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["ropewalk.cache"] == "miss"
        assert len(run.data.tags["ropewalk.output_digest"]) == 64


def test_configs_are_flat_params_and_counts_are_metrics(shown_store: Path) -> None:
    runs = runs_of(shown_store, "run-1")
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


def test_training_curves_keep_step_value_and_time(shown_store: Path) -> None:
    run = runs_of(shown_store, "run-1")["base"]
    points = client_of(shown_store).get_metric_history(run.info.run_id, "loss")
    events = [json.loads(line) for line in (shown_store / "runs/run-1/events.jsonl").read_text().splitlines()]
    written = [e for e in events if e["type"] == "metrics" and e["step"] == "base"]
    expected = [(e["metric_step"], e["metrics"]["loss"], round(e["time"] * 1000)) for e in written]
    assert [(point.step, point.value, point.timestamp) for point in points] == expected


def test_small_files_are_artifacts_and_the_report_is_on_the_parent_too(shown_store: Path) -> None:
    runs = runs_of(shown_store, "run-1")
    shown = {
        "data/report.html",
        "data/plots/scores.png",
        "data/artifact.json",
        "observed/latency.json",
        "manifest.json",
    }
    assert files_of(shown_store, runs["report"]) == shown | {"config.json"}
    assert files_of(shown_store, runs["run-1"]) == {f"report/{name}" for name in shown} | {"run.json"}


def test_secrets_reach_neither_params_nor_artifacts(shown_store: Path) -> None:
    run = runs_of(shown_store, "run-1")["extend"]
    assert run.data.params["hub_token"] == "***"
    written = [path for path in (shown_store / "mlartifacts").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if b"hf_abcdefghij" in path.read_bytes()]


def test_a_large_config_is_cut_visibly_and_kept_whole_as_a_file(shown_store: Path) -> None:
    record = RecordBuilder(shown_store, "run-large", "large")
    config = {"text": "x" * 7000, **{f"field_{i}": i for i in range(250)}}
    record.start(pack={"config": config})
    record.begin("pack")
    record.finish("cancelled")
    sync(shown_store, "run-large")
    run = runs_of(shown_store, "run-large")["pack"]
    assert len(run.data.params) == 251
    assert run.data.params["text"].endswith("[cut; see config.json]")
    path = client_of(shown_store).download_artifacts(run.info.run_id, "config.json")
    assert json.loads(Path(path).read_text()) == config


def test_what_the_engine_records_is_shown(shown_store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOY_COUNTER", str(tmp_path))
    for cache in ("miss", "hit"):
        result = engine.run(toy_stages.diamond(), shown_store)
        sync(shown_store, result.run_id)
        runs = runs_of(shown_store, result.run_id)
        assert runs.pop(result.run_id).info.status == "FINISHED"
        assert {name: run.data.tags["ropewalk.key"] for name, run in runs.items()} == {
            step.name: step.key for step in result.steps
        }
        assert {run.data.tags["ropewalk.cache"] for run in runs.values()} == {cache}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_failed_attempt_and_its_retry_are_one_child(shown_store: Path) -> None:
    record = RecordBuilder(shown_store, "run-retry", "retries")
    record.start(train={})
    log = record.folder / "logs" / "train" / "a1.log"
    log.parent.mkdir(parents=True)
    log.write_text("Traceback: HF_TOKEN=abc\n")
    record.begin("train", attempt="a1")
    failed = {"step": "train", "key": "k", "attempt": "a1", "seconds": 1.0}
    record.add("step_failed", error="ValueError: no rows", **failed)
    sync(shown_store, "run-retry")
    run = runs_of(shown_store, "run-retry")["train"]
    assert (run.info.status, run.data.tags["ropewalk.error"]) == ("FAILED", "ValueError: no rows")
    path = client_of(shown_store).download_artifacts(run.info.run_id, "logs/a1.txt")
    assert Path(path).read_text() == "Traceback: HF_TOKEN=***\n"
    record.begin("train", attempt="a2")
    sync(shown_store, "run-retry")
    assert runs_of(shown_store, "run-retry")["train"].info.status == "RUNNING"
    record.succeed("train", "rows")
    record.finish()
    sync(shown_store, "run-retry")
    run = runs_of(shown_store, "run-retry")["train"]
    assert (run.info.status, run.data.tags["ropewalk.attempt"]) == ("FINISHED", "a2")


@pytest.mark.parametrize(("status", "expected"), [("failed", "FAILED"), ("cancelled", "KILLED")])
def test_the_end_of_a_run_closes_what_is_still_open(shown_store: Path, status: str, expected: str) -> None:
    record = RecordBuilder(shown_store, f"run-{status}", "endings")
    record.start(train={}, report={})
    record.begin("train")
    record.add("step_skipped", step="report", reason="depends on train")
    record.finish(status)
    sync(shown_store, f"run-{status}")
    runs = runs_of(shown_store, f"run-{status}")
    assert runs[f"run-{status}"].info.status == expected
    assert runs["train"].info.status == "KILLED"
    assert runs[f"run-{status}"].data.tags["ropewalk.skipped.report"] == "depends on train"


def test_a_run_whose_driver_died_is_killed_and_one_on_another_machine_is_not(shown_store: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for run_id, expected in (("run-dead", "KILLED"), ("run-elsewhere", "RUNNING")):
        driver = {"pid": int(gone.stdout), "process_started": 1.0}
        if run_id == "run-elsewhere":
            driver |= {"host": "another-machine"}
        record = RecordBuilder(shown_store, run_id, "drivers", driver=driver)
        record.start(train={})
        record.begin("train")
        sync(shown_store, run_id)
        runs = runs_of(shown_store, run_id)
        assert {run.info.status for run in runs.values()} == {expected}
    assert "without a word" in runs_of(shown_store, "run-dead")["train"].data.tags["ropewalk.ended"]
