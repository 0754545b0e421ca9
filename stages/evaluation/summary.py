"""From predictions and losses to the numbers of the report: a pure function, so that any number can be made again.

Reads the tables that `evaluate` wrote and the trained windows of the models; writes a tree of plain numbers. The first
model is the baseline that the others are compared with, on the same samples and the same tokens.

Effective length follows RULER (Hsieh et al. 2024): the largest tested length that passes a threshold. Scores need not
fall monotonically, so here all shorter lengths must pass too. The relative threshold is a share of the baseline's score
at the shortest length, after NoLiMa (Modarressi et al. 2025, arXiv 2502.05167), one bar for all models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import Field

from ropewalk.stages.evaluation.intervals import (
    bootstrap_ratio,
    detectable_difference,
    effective_length,
    mcnemar,
    paired_difference,
    wilson,
)
from ropewalk.stages.schema import Record, seeded_rng

ALL_TASKS = "all"
"""Names the mean over tasks, which have equally many samples."""

Rows = Sequence[Mapping[str, Any]]
Tree = dict[str, Any]


class Analysis(Record):
    """How predictions and losses are summarised."""

    models: tuple[str, ...] = Field(default=("base", "extended"), min_length=1)
    """Input slots of the checkpoints. The first is the baseline that the others are compared with."""
    depths: tuple[float, ...] = Field(default=(0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95), min_length=1)
    """Where the asked fact stands, in 0 (first token of the text) to 1 (last), each with equally many samples."""
    seed: int = 0
    """Of samples, documents and resampling."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples of each bootstrap interval."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of all intervals."""
    absolute_threshold: float = Field(default=0.85, gt=0, le=1)
    """A length counts as usable from this score on."""
    relative_threshold: float = Field(default=0.85, gt=0, le=1)
    """A length counts as usable from this share of the baseline's score at the shortest length on."""
    loss_tolerance_nats: float = Field(default=0.1, ge=0)
    """Positions count as usable while their loss is at most this much above the baseline's at the end of its window."""


def summarise(
    predictions: Mapping[str, Rows], losses: Mapping[str, Rows], windows: Mapping[str, int], analysis: Analysis
) -> Tree:
    """All numbers, as JSON: lists of flat records. Keys of the arguments are model names.

    Raises ValueError if the models were not given the same samples and tokens: then nothing can be paired.
    """
    baseline = analysis.models[0]
    for model in analysis.models[1:]:
        _check_paired(model, predictions[baseline], predictions[model], ("sample_id", "prompt_sha256"))
        _check_paired(model, losses[baseline], losses[model], ("doc_id", "position_start", "num_tokens"))
    scores = [row for model in analysis.models for row in _scores(model, predictions[model], analysis)]
    curve = [row for model in analysis.models for row in _losses(model, losses[model], analysis)]
    return {
        "baseline": baseline,
        "windows": dict(windows),
        "scores": scores,
        "scores_by_depth": [row for m in analysis.models for row in _by_depth(m, predictions[m], analysis)],
        "comparisons": [
            row
            for model in analysis.models[1:]
            for row in _comparisons(model, predictions[baseline], predictions[model], analysis)
        ],
        "losses": curve,
        "loss_comparisons": [
            row
            for model in analysis.models[1:]
            for row in _loss_comparisons(model, losses[baseline], losses[model], analysis)
        ],
        "effective_lengths": _effective_lengths(scores, analysis),
        "usable_positions": _usable_positions(curve, windows, analysis),
    }


def _check_paired(model: str, first: Rows, second: Rows, fields: tuple[str, ...]) -> None:
    pairs = [[tuple(row[field] for field in fields) for row in rows] for rows in (first, second)]
    if pairs[0] != pairs[1]:
        raise ValueError(f"{model} and the baseline differ in {' or '.join(fields)}: they were given different inputs")


def _by_task_and_length(predictions: Rows) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in predictions:
        groups[row["task"], row["length_tokens"]].append(row)
    for (_, length), rows in list(groups.items()):
        groups[ALL_TASKS, length] += rows
    return groups


def _scores(model: str, predictions: Rows, analysis: Analysis) -> list[Tree]:
    return [
        {"model": model, "task": task, "length_tokens": length, **_proportion(rows, analysis)}
        for (task, length), rows in _by_task_and_length(predictions).items()
    ]


def _proportion(rows: Rows, analysis: Analysis) -> Tree:
    score = wilson(sum(row["score"] for row in rows), len(rows), analysis.confidence)
    return {**asdict(score), "num_samples": len(rows)}


def _by_depth(model: str, predictions: Rows, analysis: Analysis) -> list[Tree]:
    cells: dict[tuple[str, int, float], list[Mapping[str, Any]]] = defaultdict(list)
    for row in predictions:
        # Whole tokens move the realised depth by less than half the distance between two depths.
        depth = min(analysis.depths, key=lambda asked: abs(asked - row["depth_fraction"]))
        cells[row["task"], row["length_tokens"], depth].append(row)
    return [
        {"model": model, "task": task, "length_tokens": length, "depth": depth, **_proportion(rows, analysis)}
        for (task, length, depth), rows in cells.items()
    ]


def _comparisons(model: str, baseline: Rows, predictions: Rows, analysis: Analysis) -> list[Tree]:
    compared = []
    others = _by_task_and_length(predictions)
    for (task, length), rows in _by_task_and_length(baseline).items():
        pairs = [(bool(a["score"]), bool(b["score"])) for a, b in zip(rows, others[task, length], strict=True)]
        both, only_first, only_second = (pairs.count(kind) for kind in ((True, True), (True, False), (False, True)))
        neither = len(pairs) - both - only_first - only_second
        difference = paired_difference(both, only_first, only_second, neither, analysis.confidence)
        discordant = (only_first + only_second) / len(pairs)
        p_value = mcnemar(only_first, only_second)
        compared.append(
            {
                "model": model,
                "task": task,
                "length_tokens": length,
                **asdict(difference),
                "num_samples": len(pairs),
                "only_baseline": only_first,
                "only_model": only_second,
                "p_value": p_value,
                # Interval and test can disagree at the edge; a difference is established only if both say so.
                "established": difference.low * difference.high > 0 and p_value < 1 - analysis.confidence,
                # Fewer than a tenth of the pairs disagreeing here says little about the next ones.
                "detectable_difference": detectable_difference(len(pairs), max(discordant, 0.1), analysis.confidence),
            }
        )
    return compared


def _by_bucket(losses: Rows) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    buckets: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in losses:
        buckets[row["position_start"], row["position_end"]].append(row)
    return buckets


def _losses(model: str, losses: Rows, analysis: Analysis) -> list[Tree]:
    return [
        _loss_row(model, bucket, [row["sum_nll"] for row in rows], rows, analysis)
        for bucket, rows in _by_bucket(losses).items()
    ]


def _loss_comparisons(model: str, baseline: Rows, losses: Rows, analysis: Analysis) -> list[Tree]:
    others = _by_bucket(losses)
    compared = []
    for bucket, rows in _by_bucket(baseline).items():
        sums = [b["sum_nll"] - a["sum_nll"] for a, b in zip(rows, others[bucket], strict=True)]
        compared.append(_loss_row(model, bucket, sums, rows, analysis))
    return compared


def _loss_row(model: str, bucket: tuple[int, int], sums: list[float], rows: Rows, analysis: Analysis) -> Tree:
    weights = [row["num_tokens"] for row in rows]
    # Not keyed by model: all models see the same resampled documents.
    rng = seeded_rng(analysis.seed, "loss-bootstrap", *bucket)
    estimate = bootstrap_ratio(sums, weights, rng, analysis.bootstrap_samples, analysis.confidence)
    return {
        "model": model,
        "position_start": bucket[0],
        "position_end": bucket[1],
        **asdict(estimate),
        "num_documents": len(rows),
        "num_tokens": sum(weights),
    }


def _effective_lengths(scores: list[Tree], analysis: Analysis) -> list[Tree]:
    rows = []
    for task in sorted({row["task"] for row in scores}, key=lambda task: (task != ALL_TASKS, task)):
        shortest = min(row["length_tokens"] for row in scores)
        reference = next(
            row["mean"]
            for row in scores
            if (row["model"], row["task"], row["length_tokens"]) == (analysis.models[0], task, shortest)
        )
        for model in analysis.models:
            mine = [row for row in scores if (row["model"], row["task"]) == (model, task)]
            lengths = [row["length_tokens"] for row in mine]
            means, lows = [row["mean"] for row in mine], [row["low"] for row in mine]
            relative = analysis.relative_threshold * reference
            rows.append(
                {
                    "model": model,
                    "task": task,
                    "absolute_tokens": effective_length(lengths, means, analysis.absolute_threshold),
                    # A baseline that scores nothing sets no bar.
                    "relative_tokens": effective_length(lengths, means, relative) if reference else 0,
                    "conservative_tokens": effective_length(lengths, lows, analysis.absolute_threshold),
                }
            )
    return rows


def _usable_positions(curve: list[Tree], windows: Mapping[str, int], analysis: Analysis) -> list[Tree]:
    """How far each model's loss stays near the baseline's loss at the end of the baseline's window."""
    baseline = analysis.models[0]
    inside = [row for row in curve if row["model"] == baseline and row["position_end"] <= windows[baseline]]
    if not inside:
        return []
    last = max(inside, key=lambda row: row["position_end"])
    bar = last["mean"] + analysis.loss_tolerance_nats
    usable = []
    for model in analysis.models:
        # Early positions cost more for want of context, in every model: the rule begins where the reference stands.
        mine = [row for row in curve if row["model"] == model and row["position_end"] >= last["position_end"]]
        tokens = effective_length([row["position_end"] for row in mine], [-row["mean"] for row in mine], -bar)
        usable.append({"model": model, "tokens": tokens, "reference_nats": last["mean"], "bar_nats": bar})
    return usable
