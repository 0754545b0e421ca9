"""What the numbers say, in a few plain sentences. Every sentence follows from numbers in the summary.

A longer effective length alone is not called better: at that length the paired difference must be established too, by
its interval and by the exact test. Where it is not, the headline says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ropewalk.stages.evaluation.summary import ALL_TASKS, Tree


def find(rows: list[Tree], **fields: Any) -> Tree | None:
    """The first record with these values, or None."""
    return next((row for row in rows if all(row[name] == value for name, value in fields.items())), None)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, and no sign at zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(f"{value:.{digits}f}") == 0 else text


def interval(row: Mapping[str, Any], digits: int = 2) -> str:
    """The interval of a difference, in words."""
    return f"{signed(row['low'], digits)} to {signed(row['high'], digits)}"


def judge(summary: Tree, model: str) -> Tree:
    """`outcome`, `headline`, `sentences` and `figures` (the few numbers to put in front) for one compared model."""
    baseline = summary["baseline"]
    kind, before, after = _effective(summary, baseline, model)
    lengths = sorted({row["length_tokens"] for row in summary["scores"]})
    at = after or lengths[-1]
    evidence = find(summary["comparisons"], model=model, task=ALL_TASKS, length_tokens=at)
    longest = find(summary["comparisons"], model=model, task=ALL_TASKS, length_tokens=lengths[-1])
    if evidence is None or longest is None:
        raise ValueError(f"the evaluation does not compare {model!r} with {baseline!r}: name a model that it compares")
    outcome = _outcome(before, after, evidence, longest)
    sentences = [
        _score_sentence(summary, model, evidence if outcome == "longer" else longest),
        *_loss_sentences(summary, model),
        *_short_sentences(summary, model, lengths[0], at),
    ]
    if after == lengths[-1]:
        sentences.append(f"{after:,} tokens is the longest length that was tested, so the limit may lie further out.")
    if kind == "relative_tokens":
        share = summary["settings"]["relative_threshold"]
        sentences.append(
            f"No model reaches the absolute threshold, so lengths count here from {share:.0%} of the {baseline} "
            f"model's own score at {lengths[0]:,} tokens on."
        )
    return {
        "model": model,
        "baseline": baseline,
        "outcome": outcome,
        "rule": kind,
        "effective_tokens_before": before,
        "effective_tokens_after": after,
        "factor": after / before if before else None,
        "headline": _headline(outcome, baseline, model, before, after),
        "sentences": sentences,
        "figures": _figures(summary, model, before, after, lengths[-1]),
    }


def _effective(summary: Tree, baseline: str, model: str) -> tuple[str, int, int]:
    rows = [find(summary["effective_lengths"], model=name, task=ALL_TASKS) or {} for name in (baseline, model)]
    for kind in ("absolute_tokens", "relative_tokens"):
        before, after = (row.get(kind, 0) for row in rows)
        if before or after:
            return kind, before, after
    return "absolute_tokens", 0, 0


def _outcome(before: int, after: int, evidence: Tree, longest: Tree) -> str:
    if after > before:
        return "longer" if evidence["established"] and evidence["mean"] > 0 else "unclear"
    if after < before or (longest["established"] and longest["mean"] < 0):
        return "worse"
    return "higher" if longest["established"] else "same"


def _reach(tokens: int) -> str:
    return f"up to {tokens:,} tokens" if tokens else "at none of the tested lengths"


def _headline(outcome: str, baseline: str, model: str, before: int, after: int) -> str:
    both = f"the {model} model answers reliably {_reach(after)}, the {baseline} model {_reach(before)}"
    if outcome == "longer":
        times = f": {after / before:.3g} times as far" if before else ""
        return f"The extension works: {both}{times}."
    if outcome == "unclear":
        return f"Not established: {both}, but the difference between them there may be chance."
    if outcome == "worse":
        return f"The extension made it worse: {both}."
    if outcome == "higher":
        return f"The usable length has not grown: {both}. At the longest length it scores more, but not enough."
    return f"The extension made it no better: {both}."


def _score_sentence(summary: Tree, model: str, comparison: Tree) -> str:
    length = comparison["length_tokens"]
    confidence = summary["settings"]["confidence"]
    mine, other = (
        find(summary["scores"], model=name, task=ALL_TASKS, length_tokens=length) or {}
        for name in (model, summary["baseline"])
    )
    return (
        f"At {length:,} tokens the {model} model finds {mine['mean']:.0%} of the planted facts ({confidence:.0%} "
        f"interval {mine['low']:.0%} to {mine['high']:.0%}) and the {summary['baseline']} model {other['mean']:.0%} "
        f"({other['low']:.0%} to {other['high']:.0%})."
    )


def _loss_sentences(summary: Tree, model: str) -> list[str]:
    if not summary["loss_comparisons"]:
        return []
    last = max((row for row in summary["loss_comparisons"] if row["model"] == model), key=lambda r: r["position_end"])
    bucket = {"position_start": last["position_start"], "position_end": last["position_end"]}
    mine = find(summary["losses"], model=model, **bucket) or {}
    other = find(summary["losses"], model=summary["baseline"], **bucket) or {}
    if last["high"] < 0:
        says = "lower by"
    elif last["low"] > 0:
        says = "higher by"
    else:
        says = "not distinguishable, the difference being"
    difference = signed(last["mean"]) if says.startswith("not") else f"{abs(last['mean']):.2f}"
    return [
        f"On held-out text its loss at positions {last['position_start']:,} to {last['position_end']:,} is "
        f"{mine['mean']:.2f} nats a token, the {summary['baseline']} model's {other['mean']:.2f}: {says} {difference} "
        f"(interval of the difference {interval(last)})."
    ]


def _short_sentences(summary: Tree, model: str, shortest: int, judged_at: int) -> list[str]:
    row = find(summary["comparisons"], model=model, task=ALL_TASKS, length_tokens=shortest)
    if row is None or shortest == judged_at:
        return []
    where = f"At the shortest length, {shortest:,} tokens,"
    numbers = f"{signed(row['mean'])} ({interval(row)})"
    if row["established"]:
        became = "worse" if row["mean"] < 0 else "better"
        return [f"{where} it has become {became}: its score changes by {numbers}."]
    return [
        f"{where} no change is visible: its score changes by {numbers}, and a change smaller than about "
        f"{row['detectable_difference']:.2f} could hardly have been seen with these samples."
    ]


def _figures(summary: Tree, model: str, before: int, after: int, longest: int) -> list[Tree]:
    scores = [
        find(summary["scores"], model=name, task=ALL_TASKS, length_tokens=longest) or {}
        for name in (summary["baseline"], model)
    ]
    figures = [
        {"label": "effective length, tokens", "before": f"{before:,}", "after": f"{after:,}"},
        {
            "label": f"facts found at {longest:,} tokens",
            "before": f"{scores[0]['mean']:.0%}",
            "after": f"{scores[1]['mean']:.0%}",
        },
    ]
    positions = [row for row in summary["losses"] if row["model"] == model]
    if positions:
        last = max(positions, key=lambda row: row["position_end"])
        bucket = {"position_start": last["position_start"], "position_end": last["position_end"]}
        other = find(summary["losses"], model=summary["baseline"], **bucket) or {}
        label = f"loss at positions {last['position_start']:,}–{last['position_end']:,}, nats"
        figures.append({"label": label, "before": f"{other['mean']:.2f}", "after": f"{last['mean']:.2f}"})
    return figures
