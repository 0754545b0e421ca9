"""Shows a run record in MLflow: one parent run for the run, one child run for each step that ran or was reused.

Every operation is safe to repeat: runs and models are looked up by tag before they are made, params and metrics carry
the record's own values and times, which MLflow stores once. Only `MlflowClient` with explicit ids is used; the fluent
API keeps an active run per thread and makes requests of its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ropewalk.infra.mlflow_database import artifact_location
from ropewalk.infra.mlflow_lineage import Ids, Lineage
from ropewalk.infra.mlflow_values import (
    batches,
    metric_value,
    milliseconds,
    name_for_mlflow,
    params_of,
    small_files,
    tag_value,
)
from ropewalk.infra.scrub import scrub, scrub_text

Event = Mapping[str, Any]
MAX_LOG_CHARACTERS = 200_000
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment on its runs; without it MLflow's UI begins with pages about agents and traces."""


class View:
    """Writes one run's events to MLflow. `remember` takes every event, in order; `apply` the ones to be shown."""

    def __init__(self, client: Any, ids: Ids, save: Callable[[Ids], None], store_root: Path, run_id: str) -> None:
        self.client = client
        self.ids = ids
        self.run_id = run_id
        self._save_ids = save
        self._store_root = store_root
        self._run: Event = {}
        self._steps: dict[str, Event] = {}
        self._running: set[str] = set()
        self._last_metric_step: dict[str, int] = defaultdict(int)
        self._lineage = Lineage(client, ids, save)
        self.finished = False

    def remember(self, event: Event) -> None:
        """Learn from an event what later ones refer to. Touches nothing outside."""
        kind, step = event["type"], event.get("step", "")
        if kind == "run_started":
            self._run = event
            self._steps = {spec["name"]: spec for spec in event["steps"]}
        elif kind in ("step_started", "step_reused"):
            self._lineage.remember(step, event["inputs"])
            if kind == "step_started":
                self._running.add(step)
        elif kind == "metrics" and event["metric_step"] is not None:
            self._last_metric_step[step] = max(self._last_metric_step[step], event["metric_step"])
        elif kind in ("step_succeeded", "step_failed"):
            self._running.discard(step)
        self.finished = self.finished or kind == "run_finished"

    def find(self) -> None:
        """Find this run in MLflow, or make it. Begins with the first event if MLflow lost what it had."""
        name = self._run["pipeline"]
        known = set(self.ids.children)
        self.ids.experiment_id = experiment_id = self._experiment(name)
        found = self.client.search_runs([experiment_id], f"tags.`ropewalk.run_id` = '{self.run_id}'", max_results=5000)
        found.sort(key=lambda run: run.info.start_time)
        parents = [run.info.run_id for run in found if run.data.tags.get("ropewalk.kind") == "pipeline"]
        children = {_child_name(run): run.info.run_id for run in reversed(found) if run.info.run_id not in parents}
        if self.ids.parent_run_id not in parents or not known <= set(children):
            self.ids.seq = 0
        self.ids.parent_run_id = parents[0] if parents else self._create_parent(name)
        if self.ids.seq == 0:
            self.ids.models = {}
        self.ids.children = children
        self._save_ids(self.ids)

    def apply(self, events: Sequence[Event]) -> None:
        """Show remembered events: a stretch of metrics, or one event of another type."""
        if events[0]["type"] == "metrics":
            self._metrics(events)
            return
        for event in events:
            handler = getattr(self, f"_on_{event['type']}", None)
            # A record written by a newer Ropewalk may hold events that are unknown here.
            if handler is not None:
                handler(event)

    def abandon(self, seconds: float, why: str) -> None:
        """Close what is still open as killed: no process is left that could finish it."""
        self._close_running(seconds, why)
        self._tag(self._parent, {"ropewalk.status": "killed", "ropewalk.ended": why})
        self.client.set_terminated(self._parent, "KILLED", end_time=milliseconds(seconds))

    def note_refused(self, event: Event, error: str) -> None:
        """Say in MLflow itself that an event is missing from it."""
        if self.ids.parent_run_id:
            self._tag(self._parent, {f"ropewalk.refused.{event['seq']}": f"{event['type']}: {error}"})

    @property
    def _parent(self) -> str:
        assert self.ids.parent_run_id is not None, "find() comes first"
        return self.ids.parent_run_id

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = artifact_location(self._store_root, self.ids.tracking_uri, name)
            try:
                return self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _create_parent(self, pipeline: str) -> str:
        tags = {
            "ropewalk.kind": "pipeline",
            "ropewalk.run_id": self.run_id,
            "ropewalk.pipeline": pipeline,
            "ropewalk.status": "running",
            "mlflow.source.name": "ropewalk",
        }
        start = milliseconds(self._run["time"])
        run = self.client.create_run(self.ids.experiment_id, start_time=start, tags=tags, run_name=self.run_id)
        return run.info.run_id

    def _child(self, event: Event, cache: str) -> str:
        """The child run of the event's step, made and described if it is not there."""
        step = event["step"]
        if step not in self.ids.children:
            tags = {"mlflow.parentRunId": self._parent, "ropewalk.kind": "step", "ropewalk.status": "running"}
            tags |= {"ropewalk.key": event["key"], "ropewalk.cache": cache}
            self._create(step, self._identity(event) | tags, event["time"])
        child = self.ids.children[step]
        self._log_config(child, self._steps[step]["config"])
        self._lineage.link_inputs(child, step)
        return child

    def _identity(self, event: Event) -> dict[str, str]:
        spec = self._steps[event["step"]]
        return {
            "mlflow.source.name": "ropewalk",
            "ropewalk.run_id": self.run_id,
            "ropewalk.pipeline": self._run["pipeline"],
            "ropewalk.step": event["step"],
            "ropewalk.stage": spec["stage"],
            "ropewalk.stage_version": str(spec["version"]),
        }

    def _create(self, name: str, tags: dict[str, str], seconds: float) -> None:
        start = milliseconds(seconds)
        run = self.client.create_run(self.ids.experiment_id, start_time=start, tags=tags, run_name=name)
        self.ids.children[name] = run.info.run_id
        self._save_ids(self.ids)

    def _log_config(self, child: str, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value) for name, value in params_of(config).items()]
        for batch in batches(params, 100):
            self.client.log_batch(child, params=batch)
        self.client.log_dict(child, scrub(config), "config.json")

    def _metrics(self, events: Sequence[Event]) -> None:
        by_run: dict[str, list[Any]] = defaultdict(list)
        for event in events:
            child = self.ids.children[event["step"]]
            about = event["about"]
            model = self._lineage.model_behind(event["step"], about) if about else None
            if model is None:
                by_run[child].extend(_metrics_of(event))
                continue
            dataset = self._lineage.judged_on(event["step"])
            if self._lineage.num_checkpoints(event["step"]) > 1:
                by_run[child].extend(_metrics_of(event, prefix=f"{about}/"))
                child = self._judged(event)
            by_run[child].extend(_metrics_of(event, model_id=model, **dataset))
        for run, metrics in by_run.items():
            for batch in batches(metrics, 1000):
                self.client.log_batch(run, metrics=batch)

    def _judged(self, event: Event) -> str:
        """A run below the step's for metrics about one of several models.

        MLflow attaches to a model only what is a metric of a run too. In one run the models' curves would mix; in a
        run for each they have the same names and can be compared in one chart.
        """
        step, about = event["step"], event["about"]
        name = f"{step}/{about}"
        if name not in self.ids.children:
            tags = self._identity(event) | {"mlflow.parentRunId": self.ids.children[step], "ropewalk.about": about}
            self._create(name, tags | {"ropewalk.kind": "judged"}, event["time"])
        return self.ids.children[name]

    def _terminate(self, step: str, status: str, seconds: float) -> None:
        for name, child in self.ids.children.items():
            if name.split("/")[0] == step:
                self.client.set_terminated(child, status, end_time=milliseconds(seconds))

    def _on_run_started(self, event: Event) -> None:
        git = event["git"]
        tags = {
            "ropewalk.store": event["store_uri"],
            "ropewalk.git_commit": git["commit"],
            "ropewalk.git_dirty": git["dirty"],
        }
        if git["commit"]:
            tags["mlflow.source.git.commit"] = git["commit"]
        self._tag(self._parent, tags)
        self.client.log_dict(self._parent, scrub(event), "run.json")

    def _on_step_started(self, event: Event) -> None:
        child = self._child(event, "miss")
        self._tag(child, {"ropewalk.attempt": event["attempt"], "ropewalk.status": "running"})
        self.client.update_run(child, status="RUNNING")

    def _on_step_reused(self, event: Event) -> None:
        child = self._child(event, "hit")
        self._output(child, event)
        source = event["output"]["uri"]
        tags = {"ropewalk.source": source, "ropewalk.status": "reused", "ropewalk.reason": event["reason"]}
        self._tag(child, tags)
        self._terminate(event["step"], "FINISHED", event["time"])

    def _on_step_succeeded(self, event: Event) -> None:
        child = self.ids.children[event["step"]]
        output = event["output"]
        counts = self._lineage.facts(output["uri"]).get("counts", {})
        values = {"seconds": event["seconds"], "output.num_bytes": output["num_bytes"]}
        values |= {"output.num_files": output["num_files"]} | {f"counts.{name}": n for name, n in counts.items()}
        self._numbers(child, values, event["time"])
        self._output(child, event)
        self._upload(child, output["uri"])
        self._tag(child, {"ropewalk.status": "succeeded", "ropewalk.reason": event["reason"]})
        self._terminate(event["step"], "FINISHED", event["time"])

    def _on_step_failed(self, event: Event) -> None:
        child = self.ids.children[event["step"]]
        self._numbers(child, {"seconds": event["seconds"]}, event["time"])
        self._tag(child, {"ropewalk.status": "failed", "ropewalk.error": event["error"]})
        log = self._store_root / "runs" / self.run_id / "logs" / event["step"] / f"{event['attempt']}.log"
        if log.is_file():
            text = log.read_text(encoding="utf-8", errors="replace")[-MAX_LOG_CHARACTERS:]
            self.client.log_text(child, scrub_text(text), f"logs/{log.stem}.txt")
        self._terminate(event["step"], "FAILED", event["time"])

    def _on_step_skipped(self, event: Event) -> None:
        self._tag(self._parent, {f"ropewalk.skipped.{event['step']}": event["reason"]})

    def _on_run_finished(self, event: Event) -> None:
        self._close_running(event["time"], f"the run {event['status']} before the step did")
        self._numbers(self._parent, {"seconds": event["seconds"]}, event["time"])
        self._tag(self._parent, {"ropewalk.status": event["status"]})
        status = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}[event["status"]]
        self.client.set_terminated(self._parent, status, end_time=milliseconds(event["time"]))

    def _close_running(self, seconds: float, why: str) -> None:
        for step in sorted(self._running):
            if step in self.ids.children:
                self._tag(self.ids.children[step], {"ropewalk.status": "killed", "ropewalk.ended": why})
                self._terminate(step, "KILLED", seconds)

    def _output(self, child: str, event: Event) -> None:
        """Link what the step made; a report is shown on the parent too."""
        step, output = event["step"], event["output"]
        self._tag(child, {"ropewalk.output_digest": output["digest"], "ropewalk.output_uri": output["uri"]})
        self._lineage.link_output(child, step, output, at_step=self._last_metric_step[step])
        if self._lineage.facts(output["uri"]).get("kind") == "report":
            self._upload(self._parent, output["uri"], prefix=f"{step}/")

    def _upload(self, run: str, uri: str, prefix: str = "") -> None:
        files, left_out = small_files(uri)
        for path, folder in files:
            self.client.log_artifact(run, str(path), (prefix + folder).rstrip("/") or None)
        if left_out:
            self._tag(run, {"ropewalk.files_left_out": left_out})

    def _numbers(self, run: str, values: Mapping[str, float], seconds: float) -> None:
        event = {"metrics": values, "time": seconds, "metric_step": 0}
        self.client.log_batch(run, metrics=_metrics_of(event))

    def _tag(self, run: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(name_for_mlflow(name), tag_value(value)) for name, value in tags.items()]
        self.client.log_batch(run, tags=entries)


def _metrics_of(event: Event, prefix: str = "", **attached: str) -> list[Any]:
    """An event's numbers as MLflow metrics; `attached` names a model and the dataset that it was judged on."""
    from mlflow.entities import Metric

    when, step = milliseconds(event["time"]), event["metric_step"] or 0
    metrics = []
    for name, value in event["metrics"].items():
        to_model = attached if math.isfinite(value) else {}
        metrics.append(Metric(name_for_mlflow(prefix + name), metric_value(value), when, step, **to_model))
    return metrics


def _child_name(run: Any) -> str:
    about = run.data.tags.get("ropewalk.about")
    return run.data.tags["ropewalk.step"] + (f"/{about}" if about else "")
