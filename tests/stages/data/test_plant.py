import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import numbered_documents, run_stage, tokenizer_info, write_tokens

from ropewalk.stages.data import plant
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.plant import PlantConfig, plan_rows
from ropewalk.stages.data.running_text import lay_out
from ropewalk.stages.data.vocabulary import add_markers, describe_tokenizer, tokenizer_digest, train_tokenizer
from ropewalk.stages.episodes import ASK_MARKER, KEY_MARKER, EpisodeFormat, EpisodeWriter, episode_writer
from ropewalk.stages.schema import read_artifact, read_table, rows_schema, shard_paths

SENTENCES = "long ropes are laid in a long straight lane where short strands become strong ropes again and again. " * 8


@pytest.fixture(scope="module")
def tokenizer_home(tmp_path_factory):
    """An encode output as far as plant reads it: (folder, tokenizer, its description)."""
    folder = tmp_path_factory.mktemp("encoded")
    words = SENTENCES + " ".join(f"{a}{b}{c}" for a in "bcdfgl" for b in "aeiou" for c in "mnprst") * 3
    tokenizer = train_tokenizer([words], 500, "<|bos|>", "<|eos|>")
    markers = add_markers(tokenizer, [KEY_MARKER, ASK_MARKER])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder, tokenizer, describe_tokenizer(tokenizer, tokenizer_digest(folder), markers)


def text_documents(lengths):
    """Documents of ids 100 to 399, which no marker and no mark is among."""
    return {
        f"s/d{number}": [100 + (number * 37 + place * 7) % 300 for place in range(length)]
        for number, length in enumerate(lengths)
    }


def plant_rows(tmp_path, home, documents, **fields):
    folder, _, info = home
    tokens = write_tokens(tmp_path / "tokens", documents, info)
    return run_stage(plant, PlantConfig(**fields), {"tokens": tokens, "tokenizer": folder}, tmp_path / "out")


def parse(row, documents, writer, info, question_targets=True):
    """Check one row token by token and say what it is: (kind, facts).

    Reads the row from left to right with a grammar of its own: a position is text, the end mark, or, where a marker
    stands, a whole fact or question.
    """
    ids, mask = row["input_ids"], row["loss_mask"]
    source = {}
    last = 0
    for segment in row["segments"]:
        assert segment["row_start"] >= last
        last = segment["row_start"] + segment["num_tokens"]
        piece = documents[segment["doc_id"]][segment["start"] : segment["start"] + segment["num_tokens"]]
        assert len(piece) == segment["num_tokens"] > 0
        source.update(zip(range(segment["row_start"], last), piece, strict=True))
    assert ids[0] == info.bos_token_id
    assert not mask[0]
    facts, asked, position = {}, {}, 1
    period = next((n for n in range(8, len(ids) // 2 + 1) if ids[1 + n :] == ids[1 : len(ids) - n]), None)
    while position < len(ids):
        if period and position > period:
            assert ids[position] == ids[position - period]
            assert mask[position]
            position += 1
        elif position in source:
            assert ids[position] == source[position]
            assert mask[position]
            assert not asked, "text after the questions"
            position += 1
        elif ids[position] == info.added_tokens[KEY_MARKER]:
            _, key, value = ids[position : position + 3]
            assert key not in facts
            facts[key] = value
            assert mask[position : position + 3] == [False] * 3
            position += 3
        elif ids[position] == info.added_tokens[ASK_MARKER]:
            _, key, value = ids[position : position + 3]
            assert key not in asked
            asked[key] = value
            assert mask[position : position + 3] == [question_targets, question_targets, True]
            position += 3
        else:
            assert ids[position] == info.eos_token_id
            assert mask[position]
            position += 1
    assert facts == asked, "every fact is asked for once and answered rightly"
    assert set(facts) <= set(writer.keys["train"])
    assert set(facts.values()) <= set(writer.values)
    return ("episode" if facts else "repeat" if period else "text"), facts


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=12).filter(any),
    row_tokens=st.integers(24, 80),
    num_rows=st.integers(1, 30),
    seed=st.integers(0, 3),
    targets=st.booleans(),
)
def test_every_token_is_text_a_mark_a_fact_or_a_question(
    tmp_path_factory, tokenizer_home, lengths, row_tokens, num_rows, seed, targets
):
    documents = text_documents(lengths)
    fields = {"row_tokens": row_tokens, "num_rows": num_rows, "seed": seed, "num_facts_min": 1, "num_facts_max": 2}
    fields["enable_question_targets"] = targets
    out = plant_rows(tmp_path_factory.mktemp("plant"), tokenizer_home, documents, **fields)
    _, tokenizer, info = tokenizer_home
    writer = episode_writer(EpisodeFormat(), tokenizer, info)
    table = read_table(out, "rows")
    assert table.schema.equals(rows_schema(loss_mask=True))
    rows, counts = table.to_pylist(), read_artifact(out, "rows").counts
    assert len({row["row_id"] for row in rows}) == len(rows) == counts["num_rows"] == num_rows
    kinds, num_facts = Counter(), 0
    for row in rows:
        assert len(row["input_ids"]) == len(row["loss_mask"]) == row_tokens
        assert row["attention"] == "causal"
        kind, facts = parse(row, documents, writer, info, targets)
        kinds[kind] += 1
        num_facts += len(facts)
    assert kinds["episode"] == counts["num_episode_rows"]
    assert num_facts == counts["num_facts"]
    placed = sum(segment["num_tokens"] for row in rows for segment in row["segments"])
    assert counts["num_tokens_kept"] == placed
    assert counts["num_tokens"] == num_rows * row_tokens == placed + counts["num_tokens_inserted"]
    assert counts["num_target_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
    used = {segment["doc_id"] for row in rows for segment in row["segments"]}
    assert counts["num_documents_used"] == len(used)
    assert counts["num_documents_used"] + counts["num_documents_unused"] == len(documents) == counts["num_documents_in"]


def test_the_kinds_have_their_shares_and_are_mixed(tmp_path, tokenizer_home):
    documents = text_documents([400] * 30)
    fields = {"row_tokens": 64, "num_rows": 107, "episode_fraction": 0.25, "repeat_fraction": 0.3, "num_facts_max": 4}
    out = plant_rows(tmp_path, tokenizer_home, documents, **fields)
    _, tokenizer, info = tokenizer_home
    writer = episode_writer(EpisodeFormat(), tokenizer, info)
    kinds = [parse(row, documents, writer, info)[0] for row in read_table(out, "rows").to_pylist()]
    # 26.75, 32.1 and 48.15 rows: the one that is left goes to the largest remainder.
    assert Counter(kinds) == {"episode": 27, "repeat": 32, "text": 48}
    assert max(len(list(group)) for _, group in itertools.groupby(kinds)) < 15


def test_facts_vary_in_number_place_and_order(tmp_path, tokenizer_home):
    documents = text_documents([900] * 30)
    out = plant_rows(
        tmp_path, tokenizer_home, documents, row_tokens=128, num_rows=60, episode_fraction=1, repeat_fraction=0
    )
    key, ask = (tokenizer_home[2].added_tokens[marker] for marker in (KEY_MARKER, ASK_MARKER))
    numbers, places, in_order = Counter(), [], 0
    for row in read_table(out, "rows").to_pylist():
        ids = row["input_ids"]
        planted = [position for position, token in enumerate(ids) if token == key]
        asked = [ids[position + 1] for position, token in enumerate(ids) if token == ask]
        numbers[len(planted)] += 1
        places += [position / ids.index(ask) for position in planted]
        in_order += asked == [ids[position + 1] for position in planted]
    assert set(numbers) == set(range(2, 9))
    # About 75 of some 300 in each quarter; 45 is four standard deviations less.
    assert np.histogram(places, bins=[0, 0.25, 0.5, 0.75, 1])[0].min() > len(places) * 0.15
    assert in_order < 30


def test_the_text_is_read_on_from_row_to_row_and_a_small_corpus_again_in_another_order(tmp_path, tokenizer_home):
    documents = text_documents([30, 50, 70, 0])
    fields = {"row_tokens": 40, "num_rows": 12, "episode_fraction": 0, "repeat_fraction": 0}
    out = plant_rows(tmp_path, tokenizer_home, documents, **fields)
    counts = read_artifact(out).counts
    read = Counter()
    for row in read_table(out, "rows").to_pylist():
        for segment in row["segments"]:
            read.update((segment["doc_id"], segment["start"] + place) for place in range(segment["num_tokens"]))
    assert counts["num_epochs"] == 4, "12 rows of 39 tokens, of which there are 150 and 3 end marks an epoch"
    assert len(read) == 150
    assert set(read.values()) <= {3, 4}, "no token is read once more than another"
    assert counts["num_documents_unused"] == 1


def test_rows_are_shuffled_after_they_are_made(tmp_path, tokenizer_home):
    documents = text_documents([4000])
    fields = {"row_tokens": 32, "num_rows": 50, "episode_fraction": 0, "repeat_fraction": 0}
    out = plant_rows(tmp_path, tokenizer_home, documents, **fields)
    starts = [row["segments"][0]["start"] for row in read_table(out, "rows").to_pylist()]
    assert sorted(starts) == list(range(0, 31 * 50, 31))
    assert sum(b > a for a, b in itertools.pairwise(starts)) < 40


def test_repeats_tile_segments_of_many_lengths(tmp_path, tokenizer_home):
    documents = text_documents([4000])
    fields = {"row_tokens": 64, "num_rows": 80, "episode_fraction": 0, "repeat_fraction": 1}
    out = plant_rows(tmp_path, tokenizer_home, documents, **fields)
    periods = []
    for row in read_table(out, "rows").to_pylist():
        ids, pieces = row["input_ids"], row["segments"]
        assert len(pieces) == 1, "the copies are planted"
        period = pieces[0]["num_tokens"]
        assert ids[1 + period :] == ids[1:-period]
        periods.append(period)
    assert min(periods) >= 8
    assert max(periods) <= 32
    assert len(set(periods)) > 15


def test_keys_and_values_may_be_long_and_written_in_words(tmp_path, tokenizer_home):
    style = EpisodeFormat(
        fact="\nthe strand{key} is{value}.\n", question="\nthe strand{key} is", key_tokens=2, value_tokens=3
    )
    fields = {"num_facts_min": 2, "num_facts_max": 2, "episode": style, "episode_fraction": 1, "repeat_fraction": 0}
    out = plant_rows(tmp_path, tokenizer_home, text_documents([900] * 3), row_tokens=200, num_rows=5, **fields)
    tokenizer = tokenizer_home[1]
    ask, between, end = (tokenizer.encode(t, add_special_tokens=False) for t in ("\nthe strand", " is", ".\n"))
    for row in read_table(out, "rows").to_pylist():
        ids, mask = row["input_ids"], row["loss_mask"]
        each = len(ask) + 2 + len(between)
        for begin in (200 - 2 * (each + 3), 200 - (each + 3)):
            question, value = ids[begin : begin + each], ids[begin + each : begin + each + 3]
            assert question[: len(ask)] == ask
            assert question[len(ask) + 2 :] == between
            assert all(mask[begin : begin + each + 3])
            fact = question + value + end
            places = [i for i in range(begin) if ids[i : i + len(fact)] == fact]
            assert len(places) == 1, tokenizer.decode(ids)
            assert not any(mask[places[0] : places[0] + len(fact)])


def test_facts_that_do_not_fit_are_an_error_unless_fewer_are_allowed(tmp_path, tokenizer_home):
    fields = {"row_tokens": 64, "num_rows": 40, "episode_fraction": 1, "repeat_fraction": 0}
    message = "num_facts_max 8 facts of 6 tokens, questions included, exceed half of row_tokens 64, which holds 5"
    with pytest.raises(ValueError, match=message):
        plant_rows(tmp_path / "strict", tokenizer_home, text_documents([900]), **fields)
    out = plant_rows(tmp_path / "fewer", tokenizer_home, text_documents([900]), enable_fewer_facts=True, **fields)
    key = tokenizer_home[2].added_tokens[KEY_MARKER]
    numbers = {row["input_ids"].count(key) for row in read_table(out, "rows").to_pylist()}
    assert numbers == {2, 3, 4, 5}


def test_a_row_without_room_for_one_fact_is_an_error(tokenizer_home):
    style = EpisodeFormat(key_tokens=4, value_tokens=4)
    config = PlantConfig(row_tokens=16, num_rows=4, episode=style, enable_fewer_facts=True)
    with pytest.raises(ValueError, match="row_tokens 16, which holds 0"):
        plan_rows(config, episode_writer(style, *tokenizer_home[1:]))


def test_equal_inputs_give_equal_bytes_and_seeds_do_not(tmp_path, tokenizer_home):
    def files(name, **changes):
        fields = {"row_tokens": 64, "num_rows": 30, "num_facts_max": 3, **changes}
        out = plant_rows(tmp_path / name, tokenizer_home, text_documents([300] * 9), **fields)
        return {path.name: path.read_bytes() for path in out.iterdir()}

    assert files("a") == files("b")
    assert files("c", seed=1) != files("d")


def test_many_shards_hold_the_same_rows(tmp_path, tokenizer_home, monkeypatch):
    fields = {"row_tokens": 64, "num_rows": 30, "num_facts_max": 3}
    one = plant_rows(tmp_path / "one", tokenizer_home, text_documents([300] * 9), **fields)
    monkeypatch.setattr(plant, "_SHARD_TOKENS", 64 * 7)
    many = plant_rows(tmp_path / "many", tokenizer_home, text_documents([300] * 9), **fields)
    assert [len(shard_paths(out, "rows")) for out in (one, many)] == [1, 5]
    assert read_table(one, "rows").equals(read_table(many, "rows"))


def test_without_episodes_no_tokenizer_is_needed(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([300]))
    config = PlantConfig(row_tokens=32, num_rows=4, episode_fraction=0)
    out = run_stage(plant, config, {"tokens": tokens}, tmp_path / "out")
    assert read_artifact(out).tokenizer == tokenizer_info()
    with pytest.raises(ValueError, match="input slot `tokenizer` to write episodes, or episode_fraction 0"):
        run_stage(plant, PlantConfig(row_tokens=64, num_rows=4), {"tokens": tokens}, tmp_path / "again")


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer_home):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([300]))
    with pytest.raises(ValueError, match="`tokenizer` is not the one that encoded its input `tokens`"):
        inputs = {"tokens": tokens, "tokenizer": tokenizer_home[0]}
        run_stage(plant, PlantConfig(row_tokens=64, num_rows=4), inputs, tmp_path / "out")


def test_a_corpus_without_tokens_is_an_error(tmp_path, tokenizer_home):
    with pytest.raises(ValueError, match="holds no token"):
        plant_rows(tmp_path, tokenizer_home, {"s/empty": []}, row_tokens=64, num_rows=1, num_facts_max=2)


@pytest.mark.parametrize(
    "fields", [{"episode_fraction": 0.7, "repeat_fraction": 0.4}, {"num_facts_min": 9}, {"row_tokens": 15}]
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValidationError):
        PlantConfig(**{"row_tokens": 64, "num_rows": 1, **fields})


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
def test_windows_are_what_one_long_list_of_tokens_has(lengths, sizes, seed):
    eos = 1
    documents = numbered_documents(lengths)
    text = lay_out(Corpus.from_documents(list(documents.items())), eos, sum(sizes) + len(sizes), seed)
    names = list(documents)
    tokens = [
        (token, place)
        for number in text.order
        for token, place in [
            *((token, (number, start)) for start, token in enumerate(documents[names[number]])),
            (eos, None),
        ]
    ]
    cursor = 0
    for start, size in zip(text.walk(sizes), sizes, strict=True):
        if tokens[cursor][1] is None:
            cursor += 1
        assert start == cursor
        ids, pieces = text.window(start, size)
        assert ids.tolist() == [token for token, _ in tokens[cursor : cursor + size]]
        places = {
            piece.offset + i: (piece.document, piece.start + i) for piece in pieces for i in range(piece.num_tokens)
        }
        assert [places.get(i) for i in range(size)] == [place for _, place in tokens[cursor : cursor + size]]
        cursor += size
    epochs = -(-len(text.order) // sum(map(bool, lengths)))
    assert text.num_epochs == epochs


def test_a_long_row_of_many_facts_still_adds_up(tmp_path, tokenizer_home):
    """The plan's sizes are exact for each number of facts."""
    writer = episode_writer(EpisodeFormat(), *tokenizer_home[1:])
    assert isinstance(writer, EpisodeWriter)
    config = PlantConfig(
        row_tokens=512, num_rows=50, num_facts_max=20, num_facts_min=20, episode_fraction=1, repeat_fraction=0
    )
    assert {plan.text_tokens for plan in plan_rows(config, writer)} == {511 - 20 * 6}
    out = plant_rows(tmp_path, tokenizer_home, text_documents([5000] * 4), **config.model_dump(exclude={"episode"}))
    measured = json.loads((out.parent / "observed/throughput.json").read_text())
    assert measured["rows_per_second"] > 0
