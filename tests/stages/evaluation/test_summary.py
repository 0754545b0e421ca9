"""The summary recounts its tables, and the verdict says what the numbers say."""

import pytest

from ropewalk.stages.evaluation.summary import Analysis, summarise
from ropewalk.stages.evaluation.verdict import judge

ANALYSIS = Analysis(depths=(0.1, 0.9), bootstrap_samples=200)
SETTINGS = {"settings": ANALYSIS.model_dump(mode="json")}
LENGTHS = (256, 512, 1024)


def predictions(scores, *, num_samples=20):
    """Rows whose share of right answers is `scores[task][length]`, the right ones first."""
    return [
        {
            "sample_id": f"{task}-{length}-{number}",
            "prompt_sha256": f"{task}-{length}-{number}",
            "task": task,
            "length_tokens": length,
            "depth_fraction": 0.1001 if number % 2 else 0.8999,
            "score": float(number < round(share * num_samples)),
        }
        for task, by_length in scores.items()
        for length, share in by_length.items()
        for number in range(num_samples)
    ]


def losses(means):
    return [
        {
            "doc_id": f"d{doc}",
            "position_start": start,
            "position_end": end,
            "num_tokens": 100,
            "sum_nll": 100 * mean + doc,
        }
        for doc in range(6)
        for (start, end), mean in means.items()
    ]


def summary_of(base, extended, base_losses=None, extended_losses=None, num_samples=20):
    flat = {(0, 512): 3.0, (512, 1024): 3.0}
    rows = [predictions({"a": base, "b": base}, num_samples=num_samples)]
    rows.append(predictions({"a": extended, "b": extended}, num_samples=num_samples))
    summary = summarise(
        {"base": rows[0], "extended": rows[1]},
        {"base": losses(base_losses or flat), "extended": losses(extended_losses or flat)},
        {"base": 512, "extended": 1024},
        ANALYSIS,
    )
    return {**summary, **SETTINGS}


GOOD = {256: 1.0, 512: 1.0, 1024: 0.95}
BASE = {256: 1.0, 512: 0.9, 1024: 0.05}


def test_scores_and_comparisons_recount_the_predictions():
    summary = summary_of(BASE, GOOD)
    score = next(r for r in summary["scores"] if (r["model"], r["task"], r["length_tokens"]) == ("base", "all", 512))
    assert (score["mean"], score["num_samples"]) == (0.9, 40)
    pair = next(r for r in summary["comparisons"] if (r["task"], r["length_tokens"]) == ("a", 1024))
    assert (pair["only_baseline"], pair["only_model"], pair["num_samples"]) == (0, 18, 20)
    assert pair["mean"] == pytest.approx(0.9) and pair["established"]
    assert {row["depth"] for row in summary["scores_by_depth"]} == {0.1, 0.9}
    assert sum(row["num_samples"] for row in summary["scores_by_depth"]) == 2 * 2 * 3 * 20


def test_effective_lengths_follow_both_bars_and_their_lower_end():
    summary = summary_of({256: 0.6, 512: 0.55, 1024: 0.9}, GOOD)
    lengths = {row["model"]: row for row in summary["effective_lengths"] if row["task"] == "all"}
    assert lengths["base"]["absolute_tokens"] == 0
    assert lengths["base"]["relative_tokens"] == 1024  # at least 0.85 of 0.6 everywhere
    assert lengths["extended"]["absolute_tokens"] == 1024
    assert lengths["extended"]["conservative_tokens"] == 512  # 38 of 40 has a lower end of 0.83


def test_a_baseline_that_finds_nothing_sets_no_relative_bar():
    summary = summary_of({256: 0.0, 512: 0.0, 1024: 0.0}, {256: 0.0, 512: 0.0, 1024: 0.0})
    assert {row["relative_tokens"] for row in summary["effective_lengths"]} == {0}


def test_usable_positions_end_where_the_loss_rises():
    rising, flat = (
        {(0, 256): 3.5, (256, 512): 3.0, (512, 1024): 4.0},
        {(0, 256): 3.5, (256, 512): 2.9, (512, 1024): 3.05},
    )
    usable = summary_of(BASE, GOOD, rising, flat)["usable_positions"]
    assert {row["model"]: row["tokens"] for row in usable} == {"base": 512, "extended": 1024}


def test_models_that_saw_different_prompts_are_not_compared():
    first = predictions({"a": BASE})
    second = [{**row, "prompt_sha256": "other"} for row in first]
    with pytest.raises(ValueError, match="different inputs"):
        summarise(
            {"base": first, "extended": second}, {"base": [], "extended": []}, {"base": 1, "extended": 1}, ANALYSIS
        )


def test_a_longer_window_is_said_to_work_and_by_which_factor():
    verdict = judge(summary_of({256: 1.0, 512: 0.1, 1024: 0.0}, GOOD), "extended")
    assert verdict["outcome"] == "longer" and verdict["factor"] == 4
    assert "up to 1,024 tokens" in verdict["headline"] and "4 times as far" in verdict["headline"]
    assert any("95% of the planted facts" in sentence for sentence in verdict["sentences"])
    assert any("longest length that was tested" in sentence for sentence in verdict["sentences"])


def test_no_gain_is_called_no_gain():
    verdict = judge(summary_of(BASE, BASE), "extended")
    assert verdict["outcome"] == "same"
    assert verdict["headline"].startswith("The extension made it no better")


def test_a_loss_is_called_a_loss():
    verdict = judge(summary_of(GOOD, {256: 0.3, 512: 0.1, 1024: 0.0}), "extended")
    assert verdict["outcome"] == "worse"
    assert any("has become worse" in sentence for sentence in verdict["sentences"])
    assert "at none of the tested lengths" in verdict["headline"]


def test_a_gain_that_may_be_chance_is_not_claimed():
    verdict = judge(
        summary_of({256: 1.0, 512: 1.0, 1024: 0.75}, {256: 1.0, 512: 1.0, 1024: 1.0}, num_samples=4), "extended"
    )
    assert verdict["outcome"] == "unclear"
    assert verdict["headline"].startswith("Not established")


def test_a_higher_score_below_the_bar_is_not_called_usable():
    verdict = judge(summary_of(BASE, {256: 1.0, 512: 0.9, 1024: 0.6}), "extended")
    assert verdict["outcome"] == "higher"


def test_worse_short_context_and_higher_loss_are_mentioned():
    summary = summary_of(
        BASE,
        {256: 0.86, 512: 0.9, 1024: 0.95},
        {(0, 512): 3.0, (512, 1024): 3.0},
        {(0, 512): 3.0, (512, 1024): 3.4},
        60,
    )
    text = " ".join(judge(summary, "extended")["sentences"])
    assert "At the shortest length, 256 tokens, it has become worse" in text
    assert "higher by 0.40" in text


def test_a_model_that_was_not_evaluated_is_refused():
    with pytest.raises(ValueError, match="does not compare 'yarn'"):
        judge(summary_of(BASE, GOOD), "yarn")
