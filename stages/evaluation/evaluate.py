"""Evaluate: do the models use their window? Retrieval by length and depth, and loss by position, on held-out text.

Reads    `heldout`, Tokens of documents that no training stage saw, and one checkpoint for each name in `models`.
Writes   `<model>/predictions-*.parquet` (Predictions), `<model>/losses-*.parquet` (`doc_id`, `position_start`,
         `position_end`, `sum_nll` in nats, `num_tokens`), `samples-*.parquet` (the asked fact with the text around it)
         and `summary.json`, every number with its interval. Latency lies in `observed/`.
Loses    nothing: every sample is built, asked and scored, an answer that ends early counts as wrong, and a length that
         does not fit is an error. Documents too short for the loss curve are counted.

All models get the same prompts and the same tokens, in one batch shape, so that they are compared pair by pair. Every
model is asked at every length, also beyond the window it was trained at: how it fares there is the question. The
curve of loss by position is over the same documents at every position, token-weighted (YaRN's published script averages
the mean losses of windows of unequal length: its first window counts as much as a short step).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_predictions
from ropewalk.stages.context import Context, Output
from ropewalk.stages.episodes import EpisodeFormat, EpisodeWriter, episode_writer
from ropewalk.stages.evaluation.backends import Backend, HuggingFaceBackend, Precision
from ropewalk.stages.evaluation.checkpoints import describe_models, tokenizer_of
from ropewalk.stages.evaluation.scoring import (
    loss_documents,
    loss_records,
    losses_schema,
    prediction_record,
    sample_record,
    samples_schema,
)
from ropewalk.stages.evaluation.summary import Analysis, Tree, summarise
from ropewalk.stages.evaluation.tasks import Haystack, Task, build_sample, check_pools, text_tokens
from ropewalk.stages.schema import (
    Artifact,
    TokenizerInfo,
    predictions_schema,
    read_table,
    write_artifact,
    write_table,
)
from ropewalk.stages.shards import map_shards
from ropewalk.stages.training.attention import AttentionImplementation

NAME = "evaluate"
VERSION = 2

RECORDS_FILE = "records.json"
check = check_predictions


class EvaluateConfig(Analysis):
    """What is asked of the models, and how it is summarised."""

    tasks: tuple[Task, ...] = Field(
        default=(Task(name="passkey", num_facts=1), Task(name="multikey", num_facts=8)), min_length=1
    )
    lengths_tokens: tuple[int, ...] = Field(default=(256, 512, 1024, 2048, 4096), min_length=1)
    """Lengths of prompt plus answer."""
    samples_per_cell: int = Field(default=8, ge=1)
    """Samples for each task, length and depth."""
    episode: EpisodeFormat = EpisodeFormat()
    """How facts and questions are written: as in training, for models that never saw instructions."""
    loss_documents: int = Field(default=16, ge=2)
    """At most this many held-out documents for the loss curve; how many there were is in the counts."""
    loss_tokens: int = Field(default=4096, ge=2)
    """Only documents of at least this many tokens; losses are measured on the begin mark and their first
    `loss_tokens - 1`."""
    loss_bucket_edges: tuple[int, ...] = Field(default=(0, 64, 128, 256, 512, 1024, 2048, 3072, 4096), min_length=2)
    """Positions between which losses are summed, in tokens from the begin mark; the last is at most `loss_tokens`."""
    batch_rows: int = Field(default=4, ge=1)
    """Prompts of one forward pass. Part of the config because it moves the last bits of a loss."""
    precision: Precision = "float32"
    """Of weights and activations."""
    attention_implementation: AttentionImplementation = "ropewalk"
    """What works attention out: our kernels, torch's own, or the model's code for what ours refuses (soft caps, sinks).
    """

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        edges = self.loss_bucket_edges
        if edges[0] < 0 or list(edges) != sorted(set(edges)) or edges[1] < 2 or edges[-1] > self.loss_tokens:
            raise ValueError(
                "loss_bucket_edges must increase from 0 or more to at most loss_tokens, and the first bucket must "
                "hold a token after the begin mark"
            )
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise ValueError("depths must lie in 0 to 1")
        for name, values in (
            ("models", self.models),
            ("depths", self.depths),
            ("lengths_tokens", self.lengths_tokens),
            ("tasks", tuple(task.name for task in self.tasks)),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} holds something twice: {values}")
        if {"heldout", "samples"} & set(self.models):
            raise ValueError("models may not be called 'heldout' or 'samples': these names are taken")
        return self


@dataclass(frozen=True)
class RetrievalUnit:
    """A piece of work: one model, one task, one length."""

    model: str
    task: Task
    length_tokens: int

    @property
    def name(self) -> str:
        """Names the unit's result in the work folder."""
        return f"{self.model}-retrieval-{self.task.name}-{self.length_tokens}"


@dataclass(frozen=True)
class LossUnit:
    """A piece of work: one model, one batch of documents."""

    model: str
    first: int
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """Names the unit's result in the work folder."""
        return f"{self.model}-loss-{self.first}"


@dataclass(frozen=True)
class Material:
    """What samples are made of, the same for every model."""

    haystack: Haystack
    doc_ids: list[str]
    writer: EpisodeWriter
    tokenizer: Any
    """A transformers fast tokenizer."""
    info: TokenizerInfo


def load_material(config: EvaluateConfig, inputs: Mapping[str, Path], info: TokenizerInfo) -> Material:
    """Read the held-out text and put the episode format into ids."""
    from transformers import AutoTokenizer

    table = read_table(inputs["heldout"], "tokens", ["doc_id", "input_ids"])
    documents = [ids.values.to_numpy() for chunk in table["input_ids"].chunks for ids in chunk]
    folder = tokenizer_of(config.models, inputs, info)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    writer = episode_writer(config.episode, tokenizer, info)
    return Material(Haystack(documents, info.eos_token_id), table["doc_id"].to_pylist(), writer, tokenizer, info)


@dataclass
class UnitRunner:
    """Does units of work. Built once per worker, where it loads the held-out text and one model at a time."""

    config: EvaluateConfig
    inputs: dict[str, Path]
    info: TokenizerInfo
    _material: Material | None = field(default=None, repr=False)
    _backend: tuple[str, Backend] | None = None

    def __call__(self, unit: RetrievalUnit | LossUnit, folder: Path) -> Tree:
        """Write the unit's records."""
        (folder / RECORDS_FILE).write_text(json.dumps(self.records(unit)), encoding="utf-8")
        return {}

    def records(self, unit: RetrievalUnit | LossUnit) -> Tree:
        """The unit's records, as JSON."""
        if self._material is None:
            self._material = load_material(self.config, self.inputs, self.info)
        if self._backend is None or self._backend[0] != unit.model:
            self._backend = None  # frees the last model before the next is loaded
            backend = HuggingFaceBackend(
                self.inputs[unit.model],
                precision=self.config.precision,
                attention=self.config.attention_implementation,
            )
            self._backend = (unit.model, backend)
        if isinstance(unit, LossUnit):
            return measure_losses(unit.indices, self.config, self._backend[1], self._material)
        return ask(unit.task, unit.length_tokens, self.config, self._backend[1], self._material)


def ask(task: Task, length_tokens: int, config: EvaluateConfig, backend: Backend, material: Material) -> Tree:
    """Ask one backend all samples of a task at one length: `predictions`, `samples` and `seconds` by sample id."""
    writer, tokenizer = material.writer, material.tokenizer
    build = partial(
        build_sample,
        seed=config.seed,
        writer=writer,
        haystack=material.haystack,
        bos_token_id=material.info.bos_token_id,
    )
    cells = [(depth, index) for depth in config.depths for index in range(config.samples_per_cell)]
    result: Tree = {"predictions": [], "samples": [], "seconds": {}}
    for first in range(0, len(cells), config.batch_rows):
        batch = [build(task, length_tokens, *cell) for cell in cells[first : first + config.batch_rows]]
        begin = time.perf_counter()
        generated = backend.generate([sample.prompt_ids for sample in batch], writer.value_tokens)
        seconds = (time.perf_counter() - begin) / len(batch)
        for sample, ids in zip(batch, generated, strict=True):
            result["predictions"].append(prediction_record(sample, ids, config.seed, tokenizer))
            result["samples"].append(sample_record(sample, tokenizer))
            result["seconds"][sample.sample_id] = seconds
    return result


def measure_losses(indices: Sequence[int], config: EvaluateConfig, backend: Backend, material: Material) -> Tree:
    """The `losses` of one backend on some documents, by position."""
    bos, documents = material.info.bos_token_id, material.haystack.documents
    sequences = [[bos, *documents[index][: config.loss_tokens - 1].tolist()] for index in indices]
    doc_ids = [material.doc_ids[index] for index in indices]
    return {"losses": list(loss_records(backend, sequences, doc_ids, config.loss_bucket_edges))}


def run(config: EvaluateConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Evaluate the models (see the module)."""
    info, models = describe_models(config.models, config.lengths_tokens, inputs, config.episode)
    material = load_material(config, inputs, info)
    for task in config.tasks:
        check_pools(task, material.writer)
        for length in config.lengths_tokens:
            material.haystack.require(text_tokens(task, length, material.writer))
    chosen, num_eligible = loss_documents(
        material.haystack.documents,
        material.doc_ids,
        num_documents=config.loss_documents,
        num_tokens=config.loss_tokens,
        seed=config.seed,
    )
    units = list(_units(config, chosen))
    results = dict(zip([unit.name for unit in units], _results(units, config, inputs, info, context), strict=True))

    predictions = {m: list(_in_order(units, results, m, "predictions")) for m in config.models}
    losses = {m: list(_in_order(units, results, m, "losses")) for m in config.models}
    windows = {name: model["trained_tokens"] for name, model in models.items()}
    summary = {"models": models, **summarise(predictions, losses, windows, config)}
    summary["settings"] = config.model_dump(mode="json")

    samples = list(_in_order(units, results, config.models[0], "samples"))
    _write(output, config, units, results, samples, predictions, losses, summary)
    counts = _counts(config, material.haystack, samples, predictions, len(chosen), num_eligible)
    write_artifact(output.data, Artifact(kind="predictions", tokenizer=info, counts=counts))
    _log(summary, context)


def _units(config: EvaluateConfig, chosen: list[int]) -> Iterator[RetrievalUnit | LossUnit]:
    # Model by model, so that a worker loads each once; longest first, so that no long unit is left for the end.
    for model in config.models:
        for length in sorted(config.lengths_tokens, reverse=True):
            for task in config.tasks:
                yield RetrievalUnit(model, task, length)
        for first in range(0, len(chosen), config.batch_rows):
            yield LossUnit(model, first, tuple(chosen[first : first + config.batch_rows]))


def _results(
    units: list[RetrievalUnit | LossUnit],
    config: EvaluateConfig,
    inputs: Mapping[str, Path],
    info: TokenizerInfo,
    context: Context,
) -> Iterator[Tree]:
    """The result of each unit, in order. Finished units lie in the work folder, so that a new attempt goes on."""
    build = partial(UnitRunner, config, dict(inputs), info)
    for shard in map_shards(context, build, {unit.name: unit for unit in units}, label="units", unit="units"):
        yield json.loads((shard.folder / RECORDS_FILE).read_text(encoding="utf-8"))


def _in_order(
    units: list[RetrievalUnit | LossUnit], results: Mapping[str, Tree], model: str, table: str
) -> Iterator[Tree]:
    for unit in units:
        if unit.model == model:
            yield from results[unit.name].get(table, ())


def _write(
    output: Output,
    config: EvaluateConfig,
    units: list[RetrievalUnit | LossUnit],
    results: Mapping[str, Tree],
    samples: list[Tree],
    predictions: Mapping[str, list[Tree]],
    losses: Mapping[str, list[Tree]],
    summary: Tree,
) -> None:
    for model in config.models:
        write_table(output.data / model, "predictions", predictions_schema(), predictions[model])
        write_table(output.data / model, "losses", losses_schema(), losses[model])
        seconds = {
            sample_id: value
            for unit in units
            if unit.model == model
            for sample_id, value in results[unit.name].get("seconds", {}).items()
        }
        (output.observed / f"{model}-seconds.json").write_text(json.dumps(seconds, indent=1), encoding="utf-8")
    write_table(output.data, "samples", samples_schema(), samples)
    text = json.dumps(summary, indent=1, sort_keys=True, allow_nan=False)
    (output.data / "summary.json").write_text(text + "\n", encoding="utf-8")


def _counts(
    config: EvaluateConfig,
    haystack: Haystack,
    samples: list[Tree],
    predictions: Mapping[str, list[Tree]],
    num_used: int,
    num_eligible: int,
) -> dict[str, int]:
    num_documents = len(haystack.documents)
    expected = len(config.tasks) * len(config.lengths_tokens) * len(config.depths) * config.samples_per_cell
    found = {len(samples), *(len(rows) for rows in predictions.values())}
    if found != {expected}:
        raise AssertionError(f"{expected} samples were asked of every model, and {found} were answered")
    return {
        "heldout_documents": num_documents,
        "heldout_tokens": sum(len(document) for document in haystack.documents),
        "loss_documents_used": num_used,
        "loss_documents_not_needed": num_eligible - num_used,
        "loss_documents_too_short": num_documents - num_eligible,
        "samples": len(samples),
        "samples_over_several_documents": sum(sample["num_documents"] > 1 for sample in samples),
        "predictions": sum(map(len, predictions.values())),
        "predictions_ended_early": sum(row["finish_reason"] == "stop" for rows in predictions.values() for row in rows),
    }


def _log(summary: Tree, context: Context) -> None:
    """Metrics of each model, by context length."""
    for model in summary["models"]:
        by_length: dict[int, dict[str, float]] = {}
        for row in summary["scores"]:
            if row["model"] == model:
                by_length.setdefault(row["length_tokens"], {})[f"{row['task']}/score"] = row["mean"]
        for row in summary["losses"]:
            if row["model"] == model:
                by_length.setdefault(row["position_end"], {})["loss_by_position"] = row["mean"]
        for length in sorted(by_length):
            context.log(by_length[length], step=length, about=model)
        for row in summary["effective_lengths"]:
            if row["model"] == model:
                name = f"{row['task']}/effective_length_tokens"
                context.log({name: float(row["absolute_tokens"])}, about=model)
