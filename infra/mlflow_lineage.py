"""What was made from what, in MLflow's terms: checkpoints are logged models, everything else is a dataset.

A checkpoint's weights stay where they are; MLflow holds a model that refers to them by URI and digest. One digest is
one model in an experiment, however many runs reuse it, so that all its evaluations are attached to the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropewalk.infra.mlflow_values import artifact_facts, dataset_input, model_name, tag_value

DATASET_KINDS = ("documents", "tokens", "rows")


@dataclass
class Ids:
    """What MLflow calls our things: the content of `mlflow.json`."""

    tracking_uri: str = ""
    """Without secrets; another URI means another database, where nothing is known yet."""
    experiment_id: str | None = None
    parent_run_id: str | None = None
    children: dict[str, str] = field(default_factory=dict)
    """Run id by step, and by `<step>/<input>` for the runs that hold the metrics about one of several models."""
    models: dict[str, str] = field(default_factory=dict)
    """Logged model id by output digest."""
    seq: int = 0
    """The first event that MLflow may not have."""
    driver: dict[str, Any] = field(default_factory=dict)
    """`host`, `pid` and `started` of the process that writes the record."""


class Lineage:
    """Looks up and links the models and datasets of one run."""

    def __init__(self, client: Any, ids: Ids, save: Callable[[Ids], None]) -> None:
        self._client = client
        self._ids = ids
        self._save_ids = save
        self._inputs: dict[str, Mapping[str, Any]] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def remember(self, step: str, inputs: Mapping[str, Any]) -> None:
        """Learn what a step was given: `{"uri", "digest", "step"}` by slot."""
        self._inputs[step] = inputs

    def facts(self, uri: str) -> dict[str, Any]:
        """What an artifact says of itself (it never changes once committed)."""
        if uri not in self._facts:
            self._facts[uri] = artifact_facts(uri)
        return self._facts[uri]

    def link_inputs(self, child: str, step: str) -> None:
        """Log a step's inputs on its run."""
        from mlflow.entities import LoggedModelInput

        datasets, models = [], []
        for slot, reference in self._inputs[step].items():
            if self._is_checkpoint(reference):
                models.append(LoggedModelInput(self.model(reference)))
            else:
                datasets.append(self._dataset(slot, reference))
        if datasets or models:
            self._client.log_inputs(child, datasets=datasets, models=models)

    def link_output(self, child: str, step: str, output: Mapping[str, Any], *, at_step: int) -> None:
        """Log a step's output on its run. `at_step` is the last training step, at which a checkpoint was taken."""
        from mlflow.entities import LoggedModelOutput

        reference = {**output, "step": step}
        facts = self.facts(output["uri"])
        kind = facts.get("kind")
        if kind in DATASET_KINDS:
            made = dataset_input(f"{step}/{kind}", reference, "output", facts)
            self._client.log_inputs(child, datasets=[made])
        elif kind == "checkpoint":
            model = self.model(reference, child)
            # A second link of the same pair is an error in MLflow.
            if model not in {linked.model_id for linked in self._client.get_run(child).outputs.model_outputs}:
                self._client.log_outputs(child, [LoggedModelOutput(model, at_step)])

    def model(self, reference: Mapping[str, Any], child: str | None = None) -> str:
        """The id of a checkpoint's logged model, found by digest or made; `child` is the run that made it."""
        digest = reference["digest"]
        if digest in self._ids.models:
            return self._ids.models[digest]
        found = self._client.search_logged_models(
            [self._ids.experiment_id], filter_string=f"tags.`ropewalk.digest` = '{digest}'", max_results=50
        )
        model = min(found, key=lambda each: each.creation_timestamp) if found else self._create(reference, child)
        if str(model.status) != "READY":
            self._client.finalize_logged_model(model.model_id, "READY")
        self._ids.models[digest] = model.model_id
        self._save_ids(self._ids)
        return model.model_id

    def model_behind(self, step: str, slot: str) -> str | None:
        """The model that metrics about this input describe: the checkpoint itself, or the one its maker was given.

        None if there is none, or several.
        """
        reference = self._inputs.get(step, {}).get(slot)
        if reference is None:
            return None
        if self._is_checkpoint(reference):
            return self.model(reference)
        maker = reference["step"]
        behind = {self.model_behind(maker, inner) for inner in self._inputs.get(maker, {})} - {None}
        return behind.pop() if len(behind) == 1 else None

    def num_checkpoints(self, step: str) -> int:
        """How many checkpoints a step was given."""
        return sum(map(self._is_checkpoint, self._inputs[step].values()))

    def judged_on(self, step: str) -> dict[str, str]:
        """The dataset of metrics about a model: the step's first input that is no checkpoint."""
        for slot, reference in self._inputs[step].items():
            if not self._is_checkpoint(reference):
                dataset = self._dataset(slot, reference).dataset
                return {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
        return {}

    def _is_checkpoint(self, reference: Mapping[str, Any]) -> bool:
        return self.facts(reference["uri"]).get("kind") == "checkpoint"

    def _dataset(self, slot: str, reference: Mapping[str, Any]) -> Any:
        name = f"{reference['step'] or 'external'}/{slot}"
        return dataset_input(name, reference, "input", self.facts(reference["uri"]))

    def _create(self, reference: Mapping[str, Any], child: str | None) -> Any:
        step = reference["step"]
        window = self.facts(reference["uri"]).get("row_tokens")
        tags = {
            "mlflow.model.isExternal": "true",
            "ropewalk.digest": reference["digest"],
            "ropewalk.uri": tag_value(reference["uri"]),
            "ropewalk.step": step or "external",
        }
        return self._client.create_logged_model(
            self._ids.experiment_id,
            name=model_name(step or Path(reference["uri"]).name),
            source_run_id=child,
            tags=tags,
            params={} if window is None else {"window_tokens": str(window)},
        )
