"""DEITA's grades against a plain computation with a tiny model."""

import numpy as np
import pytest
from judges import judge_texts, write_judge
from row_invariants import run_stage
from selected_samples import turns, write_chats

from ropewalk.stages.data.selection import deita
from ropewalk.stages.data.selection.deita import DeitaConfig, answered_turns, expected_grade
from ropewalk.stages.schema import read_artifact, read_table

TEXTS = judge_texts()


@pytest.fixture(scope="module")
def graders(tmp_path_factory):
    root = tmp_path_factory.mktemp("graders")
    return {
        "complexity_model": write_judge(root / "complexity", seed=1, window=1024),
        "quality_model": write_judge(root / "quality", seed=2, window=1024),
    }


def plain_grade(folder, text):
    """A grade by stock transformers in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    weights = logits[[tokenizer.convert_tokens_to_ids(str(grade)) for grade in range(1, 7)]].softmax(-1)
    return float((weights * torch.arange(1, 7)).sum())


def score(tmp_path, graders, chats, **config):
    inputs = {"chats": write_chats(tmp_path / "chats", chats), **graders}
    data = run_stage(deita, DeitaConfig(**{"max_tokens": 1024} | config), inputs, tmp_path / "run")
    deita.check(None, data)
    return {row["sample_id"]: row for row in read_table(data, "scores").to_pylist()}, read_artifact(data).counts


def test_the_score_is_complexity_times_quality_summed_over_turns(tmp_path, graders):
    chats = {f"s{n}": turns(TEXTS[n][: 9 * n + 5], TEXTS[n + 1]) for n in range(9)}
    chats["two"] = turns(TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[3])
    rows, _ = score(tmp_path, graders, chats)
    config = DeitaConfig()
    for name in ("s0", "s8", "two"):
        grades = [
            (
                plain_grade(graders["complexity_model"], config.complexity_template.replace("{instruction}", question)),
                plain_grade(
                    graders["quality_model"],
                    config.quality_template.replace("{instruction}", question).replace("{output}", answer),
                ),
            )
            for question, answer in answered_turns(chats[name])[0]
        ]
        assert rows[name]["score"] == pytest.approx(sum(a * b for a, b in grades), rel=1e-4)
        assert rows[name]["complexity"] == pytest.approx(sum(a for a, _ in grades), rel=1e-4)
        assert rows[name]["quality"] == pytest.approx(sum(b for _, b in grades), rel=1e-4)
        assert rows[name]["num_turns"] == len(grades)
    assert len({round(row["score"], 6) for row in rows.values()}) == len(rows)


def test_grades_are_an_expectation():
    assert expected_grade(np.zeros(6)) == 3.5
    assert expected_grade(np.array([0, 0, 0, 0, 0, 1e4])) == 6
    assert expected_grade(np.log([0.5, 0.25, 0.25])) == pytest.approx(1.75)


def test_batches_do_not_change_grades(tmp_path, graders):
    chats = {f"s{n:02d}": turns(TEXTS[n % 40][: 3 * n + 1], TEXTS[n % 7]) for n in range(40)}
    rows, _ = score(tmp_path / "1", graders, chats)
    alone, _ = score(tmp_path / "2", graders, chats, batch_tokens=1)
    for name, row in rows.items():
        assert row["score"] == pytest.approx(alone[name]["score"], rel=1e-4)


def test_turns_are_pairs_of_question_and_last_answer():
    system, tool = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}
    call, final = turns("x", "call")[1], turns("x", "final")[1]
    messages = [system, *turns("a", "b"), turns("c")[0], call, tool, final, turns("open")[0]]
    assert answered_turns(messages) == ([("a", "b"), ("c", "final")], 1)
    assert answered_turns([final]) == ([], 0)


def test_long_texts_are_cut_but_the_question_for_the_grade_stays(tmp_path, graders):
    long = " ".join(TEXTS * 3)
    rows, counts = score(tmp_path, graders, {"a": turns(long, "b")}, max_tokens=300)
    assert counts["num_cut_prompts"] == 2 and counts["num_cut_tokens"] > 0
    config = DeitaConfig(max_tokens=300)
    grader = deita.Grader(config, graders["complexity_model"], "complexity_model", config.complexity_template)
    ids = grader.prompt(config.complexity_template.replace("{instruction}", long), deita.Counter())
    text = deita.load_tokenizer(graders["complexity_model"]).decode(ids)
    assert len(ids) == 300
    assert text.startswith("<|bos|>You are a helpful assistant.") and text.endswith("  \n##Complexity: ")
    assert np.isfinite(rows["a"]["score"])
    with pytest.raises(ValueError, match="max_tokens 8 has no room for the template"):
        score(tmp_path / "2", graders, {"a": turns(long, "b")}, max_tokens=8)


def test_chats_without_a_turn_are_counted(tmp_path, graders):
    rows, counts = score(tmp_path, graders, {"a": turns("hi", "yes"), "b": turns("open"), "c": turns("x", "y")[1:]})
    assert set(rows) == {"a"}
    assert counts["num_dropped_no_turn"] == 2 and counts["num_unanswered_turns"] == 1


def test_grades_that_are_no_tokens_are_refused(tmp_path, graders):
    with pytest.raises(ValueError, match="slot complexity_model: its tokenizer has no token 'eleven'"):
        score(tmp_path, graders, {"a": turns("hi", "yes")}, grades=("1", "eleven"))
    with pytest.raises(ValueError, match="grades must be distinct"):
        DeitaConfig(grades=("1", "1"))
    with pytest.raises(ValueError, match=r"quality_template must hold \{output\}"):
        DeitaConfig(quality_template="{instruction}")
