"""Shows a run record in MLflow: one parent run for the run, one child run for each step that ran or was reused.

Every operation is safe to repeat: runs and models are looked up by tag before they are made, params and metrics carry
the record's own values and times, which MLflow stores once. Only `MlflowClient` with explicit ids is used; the fluent
API keeps an active run per thread and makes requests of its own.

A request that was given up on may still be served, any time later, and another machine may write the same run. So runs
that are there twice are reduced to one, the same for all who look, and `settle` looks whether MLflow agrees with the
record on how everything ended.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ropewalk.infra.scrub import scrub, scrub_text
from ropewalk.infra.tracking.artifacts import Artifacts
from ropewalk.infra.tracking.database import artifact_location, locked
from ropewalk.infra.tracking.ids import Ids
from ropewalk.infra.tracking.lineage import Lineage
from ropewalk.infra.tracking.run_state import Ending, Event, RunState, ending_of
from ropewalk.infra.tracking.values import batches, metric_value, milliseconds, name_for_mlflow, params_of, tag_value

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the experiment on its runs; without it MLflow's UI begins with pages about agents and traces."""


class View:
    """Writes one run's events to MLflow. `state` learns every event, in order; `apply` takes the ones to be shown."""

    def __init__(
        self, client: Any, ids: Ids, save: Callable[[Ids], None], store_root: Path, run_id: str, artifacts: Artifacts
    ) -> None:
        self.client = client
        self.ids = ids
        self.run_id = run_id
        self.state = RunState()
        self._save_ids = save
        self._store_root = store_root
        self._artifacts = artifacts
        self._lineage = Lineage(client, ids, save, artifacts, self.state.inputs, self._lock)

    def find(self) -> None:
        """Find this run in MLflow, or make it. Begins with the first event if MLflow lost what it had."""
        name = self.state.run["pipeline"]
        self.ids.experiment_id = self._experiment(name)
        found = self._runs()
        if not self._is_whole(found):
            self.ids.seq = 0
        parent = found.pop("", None)
        self.ids.children = {name: run.info.run_id for name, run in found.items()}
        if self.ids.seq == 0:
            self.ids.models, self.ids.unsent_files, self.ids.is_complete = {}, [], False
        self.ids.parent_run_id = parent.info.run_id if parent else self._create_parent(name)
        self._save_ids(self.ids)

    def apply(self, events: Sequence[Event]) -> None:
        """Show learned events: a stretch of metrics, or one event of another type."""
        if events[0]["type"] == "metrics":
            self._metrics(events)
            return
        for event in events:
            handler = getattr(self, f"_on_{event['type']}", None)
            # A record written by a newer Ropewalk may hold events that are unknown here.
            if handler is not None:
                handler(event)

    def send_files_again(self, event: Event) -> None:
        """Show an event once more whose files were not taken."""
        self.ids.unsent_files.remove(event["seq"])
        self.apply([event])

    def is_whole(self) -> bool:
        """Whether the runs that were written to are still the ones that count."""
        return self._is_whole(self._runs())

    def _is_whole(self, found: Mapping[str, Any]) -> bool:
        known = {"": self.ids.parent_run_id, **self.ids.children}
        return all(name in found and found[name].info.run_id == run for name, run in known.items())

    def settle(self) -> None:
        """Make MLflow agree with the record on how the run and its steps ended. Raises OSError if a run is gone."""
        runs = self._runs()
        if not self._is_whole(runs):
            raise OSError("what was written has been deleted meanwhile")
        for name, run in runs.items():
            ending = self.state.endings.get(name.partition("/")[0]) if name else self.state.ending
            if ending and (run.info.status, run.data.tags.get("ropewalk.status")) != (ending.shown, ending.status):
                self._end(run.info.run_id, ending)

    def note_refused(self, event: Event, error: str) -> None:
        """Say in MLflow itself that an event is missing from it."""
        self._tag(self._parent, {f"ropewalk.refused.{event['seq']}": f"{event['type']}: {error}"})

    @property
    def _parent(self) -> str:
        assert self.ids.parent_run_id is not None, "find() comes first"
        return self.ids.parent_run_id

    def _lock(self) -> AbstractContextManager[Any]:
        return locked(self._store_root / "mlflow-models.lock")

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = artifact_location(self._store_root, self.ids.database, name)
            try:
                return self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _runs(self) -> dict[str, Any]:
        """What MLflow has of this run, each once, by name: "" for the parent, else as in `Ids.children`."""
        query = f"tags.`ropewalk.run_id` = '{self.run_id}'"
        found = self.client.search_runs([self.ids.experiment_id], query, max_results=5000)
        # Whoever looks, and whenever, must keep the same one; and what is in use rather than what came too late.
        runs: dict[str, Any] = {}
        for run in sorted(found, key=lambda run: (_name(run).split("/"), not _is_used(run), run.info.run_id)):
            name = _name(run)
            step, slash, _ = name.partition("/")
            above = runs.get(step if slash else "")
            belongs = not name or (above and run.data.tags.get("mlflow.parentRunId") == above.info.run_id)
            if not belongs or runs.setdefault(name, run) is not run:
                self.client.delete_run(run.info.run_id)
        return runs

    def _create_parent(self, pipeline: str) -> str:
        tags = {
            "ropewalk.kind": "pipeline",
            "ropewalk.run_id": self.run_id,
            "ropewalk.pipeline": pipeline,
            "ropewalk.status": "running",
            "mlflow.source.name": "ropewalk",
        }
        start = milliseconds(self.state.run["time"])
        run = self.client.create_run(self.ids.experiment_id, start_time=start, tags=tags, run_name=self.run_id)
        return run.info.run_id

    def _child(self, event: Event, cache: str) -> str:
        """The child run of the event's step, made and described if it is not there."""
        step = event["step"]
        if step not in self.ids.children:
            tags = {"mlflow.parentRunId": self._parent, "ropewalk.kind": "step", "ropewalk.status": "running"}
            self._create(step, self._identity(event) | tags | {"ropewalk.key": event["key"]}, event["time"])
        child = self.ids.children[step]
        self._tag(child, {"ropewalk.cache": cache})
        self._log_config(child, self.state.steps[step]["config"])
        self._lineage.link_inputs(child, step)
        return child

    def _identity(self, event: Event) -> dict[str, str]:
        spec = self.state.steps[event["step"]]
        return {
            "mlflow.source.name": "ropewalk",
            "ropewalk.run_id": self.run_id,
            "ropewalk.pipeline": self.state.run["pipeline"],
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

    def _end_step(self, event: Event) -> None:
        ending = ending_of(event)
        assert ending is not None
        for name, child in self.ids.children.items():
            if name.partition("/")[0] == event["step"]:
                self._end(child, ending)

    def _end(self, run: str, ending: Ending) -> None:
        why = {"ropewalk.ended": ending.why} if ending.why else {}
        self._tag(run, {"ropewalk.status": ending.status, **why})
        self.client.set_terminated(run, ending.shown, end_time=milliseconds(ending.seconds))

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
        self._files(event, lambda: self.client.log_dict(self._parent, scrub(event), "run.json"))

    def _on_step_waiting(self, event: Event) -> None:
        self._tag(self._parent, {f"ropewalk.waited.{event['step']}": event["reason"]})

    def _on_step_started(self, event: Event) -> None:
        step = event["step"]
        child = self._child(event, "miss")
        tags = {"ropewalk.attempt": event["attempt"], "ropewalk.attempts": self.state.attempts[step]}
        self._tag(child, {**tags, "ropewalk.status": "running"})
        self.client.update_run(child, status="RUNNING")
        config = scrub(self.state.steps[step]["config"])
        self._files(event, lambda: self.client.log_dict(child, config, "config.json"))

    def _on_running(self, event: Event) -> None:
        self._tag(self.ids.children[event["step"]], {"ropewalk.node": event.get("node")})

    def _on_timed_out(self, event: Event) -> None:
        self._tag(self.ids.children[event["step"]], {"ropewalk.timed_out": event["reason"]})

    def _on_lease_lost(self, event: Event) -> None:
        self._tag(self.ids.children[event["step"]], {"ropewalk.lease_lost": event["attempt"]})

    def _on_attempt_failed(self, event: Event) -> None:
        """Nothing is retried silently: each failed attempt leaves a tag and its log."""
        failure = f"{event['kind']}: {event['error']}"
        number = event["num_failed"] + event["num_preempted"]
        tags = {f"ropewalk.failed_attempt.{number}": failure, "ropewalk.preemptions": event["num_preempted"]}
        # The store may not have answered before there was a first attempt.
        run = self.ids.children.get(event["step"], self._parent)
        self._tag(run, {**tags, "ropewalk.status": "retrying"} if run != self._parent else tags)
        self._log_file(run, event)

    def _on_step_reused(self, event: Event) -> None:
        child = self._child(event, "hit")
        config = scrub(self.state.steps[event["step"]]["config"])
        self._files(event, lambda: self.client.log_dict(child, config, "config.json"))
        self._output(child, event)
        self._tag(child, {"ropewalk.source": event["output"]["uri"], "ropewalk.reason": event["reason"]})
        self._end_step(event)

    def _on_step_succeeded(self, event: Event) -> None:
        child = self.ids.children[event["step"]]
        output = event["output"]
        counts = self._artifacts.facts(output["uri"]).get("counts", {})
        values = {"seconds": event["seconds"], "output.num_bytes": output["num_bytes"]}
        values |= {"output.num_files": output["num_files"]} | {f"counts.{name}": n for name, n in counts.items()}
        self._numbers(child, values, event["time"])
        self._output(child, event)
        self._upload(child, event)
        self._tag(child, {"ropewalk.reason": event["reason"]})
        self._end_step(event)

    def _on_step_failed(self, event: Event) -> None:
        child = self.ids.children.get(event["step"])
        if child is None:
            self._tag(self._parent, {f"ropewalk.failed.{event['step']}": event["error"]})
            return
        self._numbers(child, {"seconds": event["seconds"]}, event["time"])
        tags = {"ropewalk.error": event["error"], "ropewalk.failure": event.get("kind")}
        self._tag(child, {**tags, "ropewalk.preemptions": event.get("num_preempted", 0)})
        self._log_file(child, event)
        self._end_step(event)

    def _on_step_skipped(self, event: Event) -> None:
        self._tag(self._parent, {f"ropewalk.skipped.{event['step']}": event["reason"]})

    def _on_run_finished(self, event: Event) -> None:
        self._numbers(self._parent, {"seconds": event["seconds"]}, event["time"])

    def _output(self, child: str, event: Event) -> None:
        """Link what the step made; a report is shown on the parent too."""
        step, output = event["step"], event["output"]
        self._tag(child, {"ropewalk.output_digest": output["digest"], "ropewalk.output_uri": output["uri"]})
        self._lineage.link_output(child, step, output, at_step=self.state.last_metric_step[step])
        if self._artifacts.facts(output["uri"]).get("kind") == "report":
            self._upload(self._parent, event, prefix=f"{step}/")

    def _upload(self, run: str, event: Event, prefix: str = "") -> None:
        with self._artifacts.small_files(event["output"]["uri"]) as (files, left_out):
            for path, folder in files:
                target = (prefix + folder).rstrip("/") or None
                self._files(event, lambda path=path, target=target: self.client.log_artifact(run, str(path), target))
        if left_out:
            self._tag(run, {"ropewalk.files_left_out": left_out})

    def _log_file(self, run: str, event: Event) -> None:
        text = self._artifacts.log(self.run_id, event["step"], event["attempt"])
        if text:
            self._files(event, lambda: self.client.log_text(run, text, f"logs/{event['attempt']}.txt"))

    def _files(self, event: Event, send: Callable[[], None]) -> None:
        """Send files of an event, later if their storage does not take them: numbers must not wait for it.

        Clients may send to S3 and the like without the server, and what the library of a storage raises is of any
        type: for wrong credentials, for a bucket that is gone, for the library itself not being installed.
        """
        if event["seq"] in self.ids.unsent_files:
            return
        try:
            send()
        except Exception as error:  # noqa: BLE001 - see above
            self.ids.unsent_files.append(event["seq"])
            self.ids.trouble = scrub_text(f"its artifact storage takes no files: {type(error).__name__}: {error}")[:300]

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


def _is_used(run: Any) -> bool:
    """Whether something was written to a run after it was made: whoever made it knows of it."""
    return bool(run.data.metrics) or not run.data.tags.keys().isdisjoint(("ropewalk.store", "ropewalk.cache"))


def _name(run: Any) -> str:
    """What a run is called in `Ids.children`; "" for a parent."""
    about = run.data.tags.get("ropewalk.about")
    return run.data.tags.get("ropewalk.step", "") + (f"/{about}" if about else "")
