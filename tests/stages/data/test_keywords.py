import numpy as np
import pytest
from row_invariants import assert_rows_are_sound, numbered_documents, run_stage, write_documents, write_tokens

from ropewalk.stages.data import keywords as quest
from ropewalk.stages.data.packing.rake import candidate_phrases, keywords
from ropewalk.stages.schema import Artifact, documents_schema, read_artifact, seeded_rng, write_artifact, write_table

# The abstract that the RAKE paper works through, and the scores it gives.
ABSTRACT = (
    "Compatibility of systems of linear constraints over the set of natural numbers\n\n"
    "Criteria of compatibility of a system of linear Diophantine equations, strict inequations, and nonstrict "
    "inequations are considered. Upper bounds for components of a minimal set of solutions and algorithms of "
    "construction of minimal generating sets of solutions for all types of systems are given. These criteria and the "
    "corresponding algorithms for constructing a minimal supporting set of solutions can be used in solving all the "
    "considered types of systems and systems of mixed types."
)
TOPICS = ["tall ship", "rye bread", "rose hedge", "blast furnace"]


def rake(text, **changes):
    return keywords(text, **{"max_words": 4, "min_score": 0.0, "num_keywords": 99} | changes)


def test_scores_are_those_of_the_paper():
    found = rake(ABSTRACT)
    assert found["minimal generating sets"] == pytest.approx(8.7, abs=0.05)
    assert found["linear diophantine equations"] == pytest.approx(8.5)
    assert found["minimal supporting set"] == pytest.approx(7.7, abs=0.05)
    assert found["minimal set"] == pytest.approx(4.7, abs=0.05)
    assert found["linear constraints"] == pytest.approx(4.5)
    assert found["upper bounds"] == found["natural numbers"] == found["strict inequations"] == pytest.approx(4)
    assert found["systems"] == found["criteria"] == found["compatibility"] == pytest.approx(1)
    assert next(iter(found)) == "minimal generating sets"


def test_long_low_and_surplus_keywords_are_dropped():
    assert "minimal generating sets" not in rake(ABSTRACT, max_words=2)
    assert min(rake(ABSTRACT, min_score=3.0).values()) >= 3.0
    assert list(rake(ABSTRACT, num_keywords=2)) == list(rake(ABSTRACT))[:2]


def test_phrases_end_at_stop_words_numbers_and_punctuation():
    text = "The Tall ship, and a rye\\nbread 12 rose_hedge x oven"
    assert candidate_phrases(text.replace("\\n", "\n")) == [
        ("tall", "ship"),
        ("rye",),
        ("bread",),
        ("rose",),
        ("hedge",),
        ("oven",),
    ]


def topical_texts(num_documents):
    """A text for each document: the phrase of its topic, and words of its own."""
    own = [f"{chr(97 + n // 26)}{chr(97 + n % 26)}word" for n in range(num_documents)]
    return {f"d{n:03d}": f"the {TOPICS[n % 4]}. {own[n]} only." for n in range(num_documents)}


def make_inputs(folder, lengths, texts=None, shard_records=9):
    documents = numbered_documents(lengths)
    texts = texts or topical_texts(len(lengths))
    records = (
        {"doc_id": name, "text": text, "source": "test", "num_bytes": len(text.encode()), "metadata": "{}"}
        for name, text in texts.items()
    )
    write_table(folder / "documents", "documents", documents_schema(), records, shard_records=shard_records)
    write_artifact(folder / "documents", Artifact(kind="documents"))
    return documents, {"documents": folder / "documents", "tokens": write_tokens(folder / "tokens", documents)}


def config_of(**changes):
    return quest.QuestConfig(**{"row_tokens": 40, "max_document_fraction": 0.5} | changes)


@pytest.mark.parametrize("documents_per_unit", [100, 10])
def test_documents_of_one_keyword_come_together(tmp_path, monkeypatch, documents_per_unit):
    monkeypatch.setattr(quest, "DOCUMENTS_PER_UNIT", documents_per_unit)
    documents, inputs = make_inputs(tmp_path, [1 + n % 13 for n in range(80)])
    data = run_stage(quest, config_of(), inputs, tmp_path / "out")
    quest.check(None, data)
    rows = assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert {row["attention"] for row in rows} == {"causal"}
    assert artifact.counts["num_tokens_kept"] == artifact.counts["num_tokens_in"]
    assert artifact.counts["num_tokens_padding"] < 40
    assert artifact.details["num_groups"] == artifact.details["num_keys"] == 4
    assert artifact.details["num_documents_without_key"] == 0
    topics = [[int(segment["doc_id"][1:]) % 4 for segment in row["segments"]] for row in rows]
    assert np.mean([len(set(row)) == 1 for row in topics]) > 0.6
    assert artifact.counts["num_roots"] == 4


def test_keywords_of_one_document_and_of_too_many_are_no_keys(tmp_path):
    texts = {f"d{n:03d}": "tall ship. rye bread." if n < 3 else "rye bread." for n in range(8)}
    texts["d007"] = "lone phrase."
    documents, inputs = make_inputs(tmp_path, [5] * 8, texts)
    data = run_stage(quest, config_of(max_document_fraction=0.4), inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    details = read_artifact(data).details
    assert (details["num_keys"], details["num_groups"], details["num_documents_without_key"]) == (1, 1, 5)


def test_groups_and_their_documents_are_in_random_order():
    keys = np.repeat(np.arange(6, dtype=np.uint64), 5)
    orders = [quest.order_groups(keys, seeded_rng(seed)) for seed in range(20)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(30))
        assert (np.diff(keys[order]) != 0).sum() == 5
    assert len({tuple(order) for order in orders}) == 20
    assert len({int(keys[order[0]]) for order in orders}) > 3


def test_each_of_the_keywords_can_become_the_key(tmp_path):
    texts = {f"d{n:03d}": "tall ship. rye bread." for n in range(40)}
    _, inputs = make_inputs(tmp_path, [3] * 40, texts)
    data = run_stage(quest, config_of(max_document_fraction=1.0), inputs, tmp_path / "out")
    assert read_artifact(data).details["num_groups"] == 2


def test_bytes_depend_on_the_seed_but_not_on_shards(tmp_path):
    files = []
    for name, shard_records, seed in (("a", 9, 0), ("b", 80, 0), ("c", 9, 1)):
        _, inputs = make_inputs(tmp_path / name, [1 + n % 13 for n in range(80)], shard_records=shard_records)
        data = run_stage(quest, config_of(seed=seed), inputs, tmp_path / name / "out")
        files.append({path.name: path.read_bytes() for path in data.iterdir()})
    assert files[0] == files[1]
    assert files[0]["rows-00000.parquet"] != files[2]["rows-00000.parquet"]


def test_texts_of_other_documents_are_ignored_and_missing_ones_named(tmp_path):
    texts = topical_texts(12)
    documents, inputs = make_inputs(tmp_path, [5] * 10, texts)
    assert_rows_are_sound(run_stage(quest, config_of(), inputs, tmp_path / "out"), documents)
    few = write_documents(tmp_path / "few", dict(list(texts.items())[:3]))
    with pytest.raises(ValueError, match="'d003'"):
        run_stage(quest, config_of(), inputs | {"documents": few}, tmp_path / "missing")
