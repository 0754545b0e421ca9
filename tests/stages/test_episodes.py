import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ropewalk.stages.data.vocabulary import add_markers, describe_tokenizer, train_tokenizer
from ropewalk.stages.episodes import ASK_MARKER, KEY_MARKER, EpisodeFormat, EpisodeWriter, episode_writer
from ropewalk.stages.schema import seeded_rng

WORDS = [f"{a}{b}{c}" for a in "bcdfgl" for b in "aeiou" for c in "mnprst"]
IN_WORDS = EpisodeFormat(
    fact="\nThe pass key for{key} is{value}.\n",
    question="\nThe pass key for{key} is",
    key_tokens=2,
    value_tokens=3,
    draw_from="words",
)


@pytest.fixture(scope="module")
def vocabulary():
    """(tokenizer, its description); the vocabulary also has merges of spaces, punctuation and half characters."""
    text = " ".join(WORDS) * 4 + "    == != <= () {} \U0001f389\U0001f38a " * 20
    tokenizer = train_tokenizer([text], 480, "<|bos|>", "<|eos|>")
    markers = add_markers(tokenizer, [KEY_MARKER, ASK_MARKER])
    return tokenizer, describe_tokenizer(tokenizer, "0" * 64, markers)


@pytest.fixture(scope="module")
def writer(vocabulary):
    return episode_writer(EpisodeFormat(), *vocabulary)


def test_a_fact_and_its_question_are_written_as_the_format_says(vocabulary, writer):
    key, ask = (vocabulary[1].added_tokens[marker] for marker in (KEY_MARKER, ASK_MARKER))
    assert writer.fact([300], [301]) == [key, 300, 301]
    assert writer.question([300]) == [ask, 300]
    assert (writer.fact_tokens, writer.question_tokens, writer.value_tokens) == (3, 2, 1)


def test_a_format_in_words_decodes_to_its_sentences(vocabulary):
    tokenizer, _ = vocabulary
    writer = episode_writer(IN_WORDS, *vocabulary)
    [(key, value)] = writer.draw(seeded_rng("test"), 1, "train")
    key_text, value_text = tokenizer.decode(key), tokenizer.decode(value)
    assert tokenizer.decode(writer.fact(key, value)) == f"\nThe pass key for{key_text} is{value_text}.\n"
    assert tokenizer.decode(writer.question(key)) == f"\nThe pass key for{key_text} is"
    assert len(writer.fact(key, value)) == writer.fact_tokens
    assert len(writer.question(key)) == writer.question_tokens
    assert key_text.startswith(" ")
    assert len(key_text.split()) == 2
    assert len(value_text.split()) == 3


def test_the_three_pools_are_disjoint_ordinary_words(vocabulary, writer):
    tokenizer, info = vocabulary
    pools = [set(writer.keys["train"]), set(writer.keys["evaluation"]), set(writer.values)]
    assert sum(map(len, pools)) == len(set.union(*pools))
    assert len(pools[0]) >= 3 * len(pools[1]) - 3, "half of the words are for training keys, a sixth for evaluation"
    for token in set.union(*pools):
        text = tokenizer.decode([token])
        assert text.strip().isalnum()
        assert len(text) > 1
        assert token not in {info.bos_token_id, info.eos_token_id, *info.added_tokens.values()}


def test_drawing_from_words_only_leaves_every_token_in_its_pool(vocabulary, writer):
    words = episode_writer(IN_WORDS, *vocabulary)
    for some, all_of in (
        (words.keys["train"], writer.keys["train"]),
        (words.keys["evaluation"], writer.keys["evaluation"]),
        (words.values, writer.values),
    ):
        assert set(some) < set(all_of)
        assert all(vocabulary[0].decode([token]).startswith(" ") for token in some)


def test_markers_change_no_pool(vocabulary, writer):
    tokenizer = train_tokenizer(
        [" ".join(WORDS) * 4 + "    == != <= () {} \U0001f389\U0001f38a " * 20], 480, "<|bos|>", "<|eos|>"
    )
    markers = add_markers(tokenizer, ["<|other|>", ASK_MARKER, KEY_MARKER])
    other = episode_writer(EpisodeFormat(), tokenizer, describe_tokenizer(tokenizer, "1" * 64, markers))
    assert (other.keys, other.values) == (writer.keys, writer.values)


@settings(max_examples=50, deadline=None)
@given(
    num_facts=st.integers(1, 10),
    seed=st.integers(0, 99),
    split=st.sampled_from(["train", "evaluation"]),
    key_tokens=st.integers(1, 3),
)
def test_draws_repeat_no_token_and_stay_in_their_pools(writer, num_facts, seed, split, key_tokens):
    long = EpisodeWriter(writer.fact_pieces, writer.question_pieces, key_tokens, 2, writer.keys, writer.values)
    facts = long.draw(seeded_rng("draw", seed), num_facts, split)
    assert facts == long.draw(seeded_rng("draw", seed), num_facts, split)
    assert len(facts) == num_facts
    for items, pool, length in (
        ([key for key, _ in facts], writer.keys[split], key_tokens),
        ([value for _, value in facts], writer.values, 2),
    ):
        tokens = [token for item in items for token in item]
        assert {len(item) for item in items} == {length}
        assert len(set(tokens)) == len(tokens)
        assert set(tokens) <= set(pool)


def test_every_token_of_a_pool_is_drawn_about_equally_often(writer):
    rng, pool = seeded_rng("uniform"), writer.keys["train"]
    counts = dict.fromkeys(pool, 0)
    for _ in range(1000):
        for key, _ in writer.draw(rng, 4, "train"):
            counts[key[0]] += 1
    expected = 4000 / len(pool)
    assert min(counts.values()) > expected - 5 * expected**0.5
    assert max(counts.values()) < expected + 5 * expected**0.5


def test_more_facts_than_the_pool_has_tokens_are_an_error(writer):
    size = len(writer.keys["train"])
    assert len(writer.draw(seeded_rng("all"), min(size, len(writer.values)), "train")) > 16
    with pytest.raises(ValueError, match=rf"{size + 9} facts of 1 tokens need .* only {size} of the tokenizer"):
        writer.draw(seeded_rng("all"), size + 9, "train")


def test_a_missing_marker_is_named(vocabulary):
    tokenizer, info = vocabulary
    without = info.model_copy(update={"added_tokens": {KEY_MARKER: info.added_tokens[KEY_MARKER]}})
    with pytest.raises(ValueError, match=r"an episode inserts '<\|ask\|>', which the tokenizer lacks"):
        episode_writer(EpisodeFormat(), tokenizer, without)
    assert episode_writer(IN_WORDS, tokenizer, without).fact_tokens > 5, "a format in words needs no marker"


def test_too_small_a_vocabulary_is_an_error():
    tokenizer = train_tokenizer(["short"], 258, "<|bos|>", "<|eos|>")
    info = describe_tokenizer(tokenizer, "0" * 64, add_markers(tokenizer, [KEY_MARKER, ASK_MARKER]))
    with pytest.raises(ValueError, match="leaves 0, 0, 0 pieces for training keys, evaluation keys and values"):
        episode_writer(EpisodeFormat(), tokenizer, info)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fact": "{key}"}, "fact needs {key} and {value}, once each"),
        ({"fact": "{key}{value}{key}"}, "fact needs {key} and {value}, once each"),
        ({"fact": "{value} is for {key}"}, "fact needs {key} before {value}"),
        ({"question": "what?"}, "question needs {key} once and no {value}"),
        ({"question": "{key}{value}"}, "question needs {key} once and no {value}"),
        ({"key_tokens": 0}, "key_tokens"),
    ],
)
def test_formats_that_cannot_be_asked_for_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message.replace("{", r"\{")):
        EpisodeFormat(**fields)
