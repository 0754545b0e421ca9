"""Retrieval samples: exact lengths and depths, nothing leaked, nothing dependent on how many are asked for."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.episodes import EpisodeFormat, EpisodeWriter, episode_writer
from ropewalk.stages.evaluation.backends import WindowReader
from ropewalk.stages.evaluation.evaluate import EvaluateConfig, ask
from ropewalk.stages.evaluation.summary import summarise
from ropewalk.stages.evaluation.tasks import Haystack, Task, build_sample

BOS, EOS, KEY, ASK = 0, 1, 2, 3


def occurrences(ids, piece):
    return [place for place in range(len(ids)) if ids[place : place + len(piece)] == piece]


def planted_facts(prompt):
    """Where facts begin, found by their marker: (place, key, value)."""
    return [(place, prompt[place + 1], prompt[place + 2]) for place, index in enumerate(prompt) if index == KEY]


@settings(max_examples=150, deadline=None)
@given(
    length=st.integers(40, 600),
    num_facts=st.integers(1, 9),
    depth=st.floats(0, 1),
    index=st.integers(0, 50),
    seed=st.integers(0, 5),
)
def test_a_sample_is_exactly_as_long_and_as_deep_as_asked(writer, haystack, length, num_facts, depth, index, seed):
    task = Task(name="t", num_facts=num_facts)
    sample = build_sample(task, length, depth, index, seed=seed, writer=writer, haystack=haystack, bos_token_id=BOS)
    prompt = sample.prompt_ids
    assert len(prompt) + len(sample.answer_ids) == length
    assert prompt.count(BOS) == 1 and prompt[0] == BOS

    facts = planted_facts(prompt)
    keys, values = [key for _, key, _ in facts], [value for _, _, value in facts]
    assert len(facts) == num_facts == len(set(keys)) == len(set(values))
    assert prompt[-2:] == [ASK, prompt[-1]] and prompt.count(ASK) == 1
    asked = [(place, value) for place, key, value in facts if key == prompt[-1]]
    assert asked == [(sample.fact_start, sample.answer_ids[0])]
    assert set(keys) <= set(writer.keys["evaluation"]) and not set(keys) & set(writer.keys["train"])

    first, last = 1, len(prompt) - 2 - 3
    assert sample.depth_fraction == pytest.approx((sample.fact_start - first) / (last - first))
    assert abs(sample.fact_start - first - depth * (last - first)) <= 0.5 + 1e-9

    text, place = [], 1
    while place < len(prompt) - 2:
        if prompt[place] == KEY:
            place += 3
        else:
            text.append(prompt[place])
            place += 1
    assert any(occurrences(document.tolist(), text) for document in haystack.documents)


def test_the_same_sample_comes_out_in_every_process_and_version():
    # Golden: this code with numpy 2's Philox. A change here changes every published number.
    pools = {"train": tuple(range(10, 40)), "evaluation": tuple(range(40, 70))}
    writer = EpisodeWriter(((KEY,), (), ()), ((ASK,), ()), 1, 1, pools, tuple(range(70, 100)))
    haystack = Haystack([np.arange(100, 100 + size) for size in (300, 200, 90)], EOS)
    sample = build_sample(
        Task(name="multikey", num_facts=3), 40, 0.35, 3, seed=7, writer=writer, haystack=haystack, bos_token_id=BOS
    )
    assert (sample.prompt_ids, sample.answer_ids) == GOLDEN


def test_samples_do_not_depend_on_how_many_are_asked_for(material):
    def rows(samples_per_cell, depths):
        config = EvaluateConfig(lengths_tokens=(96,), depths=depths, samples_per_cell=samples_per_cell)
        reader = WindowReader(material.writer, material.info.vocab_size)
        result = ask(Task(name="passkey"), 96, config, reader, material)
        return {row["sample_id"]: row["prompt_sha256"] for row in result["predictions"]}

    few, many = rows(2, (0.5,)), rows(5, (0.1, 0.5, 0.9))
    assert few.items() <= many.items()
    assert len(set(many.values())) == 15


def test_text_runs_over_documents_only_where_none_is_long_enough(writer):
    documents = [np.full(30, 10), np.full(50, 11), np.full(40, 12)]
    rng = np.random.default_rng(0)
    haystack = Haystack(documents, EOS)
    text, used = haystack.text(rng, 50)
    assert (text, used) == ([11] * 50, 1)
    text, used = haystack.text(rng, 100)
    assert len(text) == 100 and used == 3 and text.count(EOS) == 2
    assert {index: text.count(index) for index in (10, 11, 12)}[text[0]] in (30, 50, 40)
    with pytest.raises(ValueError, match="heldout has 120 tokens"):
        haystack.require(121)


def results_of(reader, task, config, material):
    return [
        row for length in config.lengths_tokens for row in ask(task, length, config, reader, material)["predictions"]
    ]


@pytest.mark.parametrize("num_facts", [1, 8])
@pytest.mark.parametrize("style", [EpisodeFormat(), EpisodeFormat(key_tokens=2, value_tokens=3)])
def test_a_reader_of_the_whole_prompt_scores_one(num_facts, style, material):
    writer = episode_writer(style, material.tokenizer, material.info)
    material = replace(material, writer=writer)
    config = EvaluateConfig(lengths_tokens=(90, 300), samples_per_cell=3)
    reader = WindowReader(writer, material.info.vocab_size)
    task = Task(name="t", num_facts=num_facts)
    assert {row["score"] for row in results_of(reader, task, config, material)} == {1.0}


def test_a_window_reader_finds_deep_facts_only_and_fails_where_theory_says(material):
    window, depths = 100, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    config = EvaluateConfig(models=("base",), lengths_tokens=(80, 200, 400), depths=depths, samples_per_cell=2)
    task = Task(name="multikey", num_facts=5)
    rows = results_of(
        WindowReader(material.writer, material.info.vocab_size, window_tokens=window), task, config, material
    )
    summary = summarise({"base": rows}, {"base": []}, {"base": window}, config)
    for cell in summary["scores_by_depth"]:
        # A prompt has length - 1 tokens: begin mark, text with facts, two of question; a fact takes three.
        fact_start = 1 + cell["depth"] * (cell["length_tokens"] - 1 - 1 - 2 - 3)
        distance_to_end = cell["length_tokens"] - 1 - fact_start
        assert abs(distance_to_end - window) > 1, "the case would hang on rounding"
        assert cell["mean"] == float(distance_to_end <= window)
    assert {cell["mean"] for cell in summary["scores_by_depth"]} == {0.0, 1.0}


class LastFactReader(WindowReader):
    """Answers with the most recent value, whatever is asked."""

    def _read(self, prompt):
        return [planted_facts(prompt)[-1][2]]


def test_recency_alone_does_not_solve_the_multi_key_task(material):
    config = EvaluateConfig(lengths_tokens=(200,), samples_per_cell=20)
    task = Task(name="multikey", num_facts=8)
    rows = results_of(LastFactReader(material.writer, material.info.vocab_size), task, config, material)
    assert 0 < np.mean([row["score"] for row in rows]) < 0.3


# fmt: off
GOLDEN = (
    [
        0, 153, 154, 155, 156, 157, 158, 159, 160, 2, 65, 90, 161, 2, 45, 70, 162, 163, 164, 165,
        166, 2, 47, 73, 167, 168, 169, 170, 171, 172, 173, 174, 175, 176, 177, 178, 179, 3, 45,
    ],
    [70],
)
# fmt: on
