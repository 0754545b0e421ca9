"""What MLflow shows of a run beside what its record says, in the same form."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ropewalk.infra.tracking.database import open_client

Points = dict[str, Counter[tuple[str, int, float, int]]]
"""How often there is each point (name, step, value, time in milliseconds), by step of the pipeline."""


def recorded_points(root: Path, run_id: str) -> Points:
    """The metrics in the record of a run."""
    points: Points = {}
    for line in (root / "runs" / run_id / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["type"] == "metrics":
            when, step = round(event["time"] * 1000), event["metric_step"] or 0
            found = points.setdefault(event["step"], Counter())
            found.update((name, step, value, when) for name, value in event["metrics"].items())
    return points


def shown_points(client: Any, run_id: str) -> Points:
    """The same metrics, by MLflow; what tracking adds of its own (seconds, counts) is left out."""
    shown: Points = {}
    for name, run in shown_runs(client, run_id).items():
        history = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
        own = [p for p in history if p.key != "seconds" and not p.key.startswith(("output.", "counts."))]
        if own:
            shown[name] = Counter((p.key, p.step, p.value, p.timestamp) for p in own)
    return shown


def shown_runs(client: Any, run_id: str) -> dict[str, Any]:
    """MLflow's runs of a run, by name. One that is there twice fails here."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`ropewalk.run_id` = '{run_id}'")
    names = Counter(run.info.run_name for run in found)
    assert set(names.values()) <= {1}, names
    return {run.info.run_name: run for run in found}


def client_of(root: Path) -> Any:
    """A client on the database in a store's folder."""
    return open_client(f"sqlite:///{root.resolve()}/mlflow.db")


def runs_of(root: Path, run_id: str) -> dict[str, Any]:
    """MLflow's runs of a run by name, with inputs and outputs."""
    client = client_of(root)
    return {name: client.get_run(run.info.run_id) for name, run in shown_runs(client, run_id).items()}


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
