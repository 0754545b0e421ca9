"""What was made from what, in MLflow's terms: checkpoints are logged models, everything else is a dataset.

A checkpoint's weights stay where they are; MLflow holds a model that refers to them by URI and digest. One digest is
one model in an experiment, however many runs reuse it, so that all its evaluations are attached to the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ropewalk.infra.tracking.artifacts import Artifacts
from ropewalk.infra.tracking.ids import Ids
from ropewalk.infra.tracking.values import dataset_input, model_name, tag_value

DATASET_KINDS = ("documents", "tokens", "rows")


class Lineage:
    """Looks up and links the models and datasets of one run."""

    def __init__(
        self,
        client: Any,
        ids: Ids,
        save: Callable[[Ids], None],
        artifacts: Artifacts,
        inputs: Mapping[str, Mapping[str, Any]],
        lock: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        """`inputs` says what each step was given, by slot; `lock` keeps others from making models meanwhile."""
        self._client = client
        self._ids = ids
        self._save_ids = save
        self._artifacts = artifacts
        self._inputs = inputs
        self._lock = lock

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
        facts = self._artifacts.facts(output["uri"])
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
        with self._lock():
            model = self._found(digest) or self._create(reference, child)
            if str(model.status) != "READY":
                self._client.finalize_logged_model(model.model_id, "READY")
        self._ids.models[digest] = model.model_id
        self._save_ids(self._ids)
        return model.model_id

    def _found(self, digest: str) -> Any:
        """The model with this digest, None if there is none.

        A creation that was given up on may have been served all the same, so there may be another that nobody uses.
        """
        found = self._client.search_logged_models(
            [self._ids.experiment_id], filter_string=f"tags.`ropewalk.digest` = '{digest}'", max_results=50
        )
        found = sorted(found, key=lambda each: (str(each.status) != "READY", each.creation_timestamp, each.model_id))
        for unused in found[1:]:
            if str(unused.status) != "READY":
                self._client.delete_logged_model(unused.model_id)
        return found[0] if found else None

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
        return self._artifacts.facts(reference["uri"]).get("kind") == "checkpoint"

    def _dataset(self, slot: str, reference: Mapping[str, Any]) -> Any:
        name = f"{reference['step'] or 'external'}/{slot}"
        return dataset_input(name, reference, "input", self._artifacts.facts(reference["uri"]))

    def _create(self, reference: Mapping[str, Any], child: str | None) -> Any:
        step = reference["step"]
        window = self._artifacts.facts(reference["uri"]).get("row_tokens")
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
