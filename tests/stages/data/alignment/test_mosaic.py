import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import run_stage

from ropewalk.stages.data.alignment import mosaic
from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.data.alignment.meta_instructions import _MASKS, _ORDERS, draw_meta
from ropewalk.stages.data.alignment.mosaic import Item, MosaicConfig, draw_num_items, make_mosaics
from ropewalk.stages.data.alignment.token_counts import TokenCounter
from ropewalk.stages.schema import read_artifact, read_table, seeded_rng

ITEMS = st.lists(
    st.tuples(st.text("abc\n ", min_size=1, max_size=60), st.text("xyz\n ", min_size=1, max_size=120)), max_size=25
).map(lambda found: [Item(f"s{n}", f"q{n} {q}?", f"a{n} {a}.") for n, (q, a) in enumerate(found)])
CONFIGS = st.builds(
    MosaicConfig,
    num_items=st.sampled_from(["uniform", "fixed", "exponential", "pareto", "log_normal", "logistic", "fill"]),
    max_items=st.integers(1, 12),
    max_tokens=st.integers(20, 3000),
    meta_instructions=st.sampled_from(["format", "order", "mask", "all"]),
    seed=st.integers(0, 1000),
)


@pytest.fixture(scope="module")
def counter(tokenizer_folder):
    return TokenCounter(tokenizer_folder)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, items=ITEMS)
def test_items_are_used_once_in_order_and_mosaics_are_short_enough(counter, config, items):
    made = list(make_mosaics(config, items, counter, 0, 0))
    used = [name for record in made if record for name in json.loads(record["metadata"])["items"]]
    assert used == [item.sample_id for item in items if item.sample_id in set(used)]
    assert len(used) + made.count(None) == len(items)
    for record in filter(None, made):
        question, answer = (message["content"] for message in record["messages"])
        assert counter(question, answer) < config.max_tokens
        if config.num_items != "fill":
            assert len(json.loads(record["metadata"])["items"]) <= config.max_items


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, items=ITEMS)
def test_a_whole_that_has_more_tokens_than_its_parts_is_short_enough_all_the_same(config, items):
    def steep(*texts):
        return int(sum(map(len, texts)) ** 1.2)

    for record in filter(None, make_mosaics(config, items, steep, 0, 0)):
        assert steep(*(message["content"] for message in record["messages"])) < config.max_tokens


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, items=ITEMS)
def test_every_question_is_shown_and_the_right_ones_are_answered_in_the_right_order(counter, config, items):
    by_id = {item.sample_id: item for item in items}
    for record in filter(None, make_mosaics(config, items, counter, 0, 0)):
        question, answer = (message["content"] for message in record["messages"])
        metadata = json.loads(record["metadata"])
        inside = [by_id[name] for name in metadata["items"]]
        assert [question.count(f" {item.question}") >= 1 for item in inside] == [True] * len(inside)
        found = [int(number) for number in re.findall(r"a(\d+) ", answer)]
        names = [int(item.sample_id[1:]) for item in inside]
        assert [names.index(number) for number in found] == metadata["answered"]
        assert metadata["answered"] == expected_places(metadata, inside, question)


def test_every_rule_is_drawn_and_followed(counter):
    words = ["Pear", "apple", "fig", "Quince ", "date", "banana", "elder", "grape", "cherry"]
    items = [Item(f"s{n}", f"{word} {'so ' * (n * 5 % 7)}?", f"a{n} .") for n, word in enumerate(words)]
    by_id = {item.sample_id: item for item in items}
    seen = Counter()
    for seed in range(300):
        config = MosaicConfig(num_items="fixed", max_items=9, seed=seed)
        (record,) = make_mosaics(config, items, counter, 0, 0)
        metadata = json.loads(record["metadata"])
        question, answer = (message["content"] for message in record["messages"])
        inside = [by_id[name] for name in metadata["items"]]
        assert metadata["answered"] == expected_places(metadata, inside, question)
        assert [int(number) for number in re.findall(r"a(\d+) ", answer)] == metadata["answered"]
        seen[metadata["rule"]] += 1
    assert set(seen) == {"", *_ORDERS, *_MASKS}


def expected_places(metadata, inside, question):
    """The rule worked out another way; the listed ones are read from the question."""
    places = list(range(len(inside)))
    texts = [item.question for item in inside]
    rule = metadata["rule"]
    if metadata["strategy"] == "format" or len(inside) < 2:
        return places
    if rule in ("permute", "listed"):
        numbers = listed_numbers(question)
        named = [number - 1 for number in numbers]
        return named if rule == "permute" else [place for place in places if place not in named]
    if rule in ("most_words", "fewest_words"):
        skipped = len(places) - len(metadata["answered"])
        by_words = sorted(places, key=lambda n: (len(texts[n].split()) * (-1 if rule == "most_words" else 1), n))
        return sorted(by_words[skipped:])
    return {
        "reverse": lambda: places[::-1],
        "odd_first": lambda: places[0::2] + places[1::2],
        "even_first": lambda: places[1::2] + places[0::2],
        "odd": lambda: places[1::2],
        "even": lambda: places[0::2],
        "alphabetical": lambda: [n for _, n in sorted((texts[n].casefold(), n) for n in places)],
        "shortest_first": lambda: [n for _, n in sorted((len(texts[n]), n) for n in places)],
        "longest_first": lambda: [n for _, n in sorted((-len(texts[n]), n) for n in places)],
    }[rule]()


def listed_numbers(question):
    lines = [
        line
        for line in question.split("\n\n")
        if re.search(r"order: |has to be |like this: |out these |Do not answer|Skip whatever", line)
    ]
    found = re.findall(
        r"\d+", lines[0] if re.search("order: |has to|like this|out these|Do not ans|Skip wh", lines[0]) else ""
    )
    return [int(number) for number in found]


def test_a_mask_leaves_out_a_tenth_to_a_half_and_never_all():
    questions = [f"q {'w ' * n}" for n in range(9)]
    for number in range(300):
        meta = draw_meta(("mask",), seeded_rng(number))
        for count in (2, 3, 9):
            left_out = meta.left_out(questions[:count], seeded_rng(number, "r").random(count).tolist())
            assert 1 <= len(left_out) < count
            limit = (count + 1) // 2 if meta.rule in ("odd", "even") else max(1, count // 2)
            assert len(left_out) <= limit
            if "{count}" in meta.rule_text:
                assert f" {len(left_out)} " in meta.wrap("", questions[:count], [0.5] * count)


def test_numbers_of_items_follow_their_distributions():
    def draws(kind):
        config = MosaicConfig(num_items=kind, max_items=10)
        return Counter(draw_num_items(config, seeded_rng(kind, n)) for n in range(4000))

    uniform = draws("uniform")
    assert set(uniform) == set(range(1, 11)) and max(uniform.values()) < 1.4 * min(uniform.values())
    assert set(draws("fixed")) == {10}
    for kind in ("exponential", "pareto", "log_normal", "logistic"):
        found = draws(kind)
        assert set(found) <= set(range(1, 11)) and found[10] > found[9] > found[7]
    exponential = draws("exponential")
    assert exponential[10] / 4000 == pytest.approx(1 - np.exp(-1), abs=0.03)
    assert draw_num_items(MosaicConfig(num_items="fill"), seeded_rng(0)) is None


CHATS = {f"c{n}": [user(f"what is {n} and {'more ' * (n % 5)}?"), assistant(f"it is {n}")] for n in range(23)}


@pytest.fixture
def run(tmp_path, write_chats, tokenizer_folder):
    def run(config, chats, name="out"):
        inputs = {"chats": write_chats(chats, f"{name}-chats"), "tokenizer": tokenizer_folder}
        folder = run_stage(mosaic, config, inputs, tmp_path / name)
        mosaic.check(config, folder)
        return folder

    return run


def test_every_epoch_uses_every_chat_once_in_another_order(run, monkeypatch):
    monkeypatch.setattr(mosaic, "SHARD_RECORDS", 10)
    folder = run(MosaicConfig(num_epochs=3), CHATS)
    items = [name for row in read_table(folder, "chats").to_pylist() for name in json.loads(row["metadata"])["items"]]
    epochs = [items[start : start + len(CHATS)] for start in range(0, len(items), len(CHATS))]
    assert len(epochs) == 3
    assert all(sorted(epoch) == sorted(CHATS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    counts = read_artifact(folder).counts
    assert counts["num_items_in"] == counts["num_items_used"] == 3 * len(CHATS)


def test_drops_are_counted(run):
    long = [user("x"), assistant("y" * 500)]
    chats = {**CHATS, "long": long, "turns": [*CHATS["c1"], *CHATS["c2"]]}
    counts = read_artifact(run(MosaicConfig(num_epochs=2, max_tokens=200), chats)).counts
    assert (counts["num_in"], counts["num_dropped_several_turns"], counts["num_items_dropped_oversize"]) == (25, 1, 2)
    with pytest.raises(ValueError, match="no mosaic is left"):
        run(MosaicConfig(max_tokens=200), {"long": long}, "none")


def test_the_same_config_gives_the_same_bytes_and_another_seed_others(run):
    def content(seed, name):
        return [
            path.read_bytes() for path in sorted(run(MosaicConfig(seed=seed), CHATS, name).iterdir()) if path.is_file()
        ]

    assert content(0, "a") == content(0, "b") != content(1, "c")
