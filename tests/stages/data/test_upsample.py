import json
import random

import pytest
from cleaning_corpus import file_bytes, write_token_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.data import upsample
from ropewalk.stages.data.upsample import UpsampleConfig, budgets, is_drawn, rank
from ropewalk.stages.schema import read_artifact, read_table

LONG = 50


def corpus(seed=0, sizes=(("web", 120, 30), ("books", 12, 400), ("code", 60, 60))):
    """Documents of sources that differ in number and length, in a shuffled order."""
    rng = random.Random(seed)
    made = {}
    for source, number, mean in sizes:
        for index in range(number):
            made[f"{source}/{index}"] = [100] * max(1, int(rng.expovariate(1 / mean)))
    names = list(made)
    rng.shuffle(names)
    return {name: made[name] for name in names}


def run(tmp_path, documents, name="out", shard_records=60, **fields):
    source = write_token_corpus(tmp_path / f"{name}-in", documents, shard_records=shard_records)
    config = UpsampleConfig(**({"min_long_tokens": LONG} | fields))
    out = run_stage(upsample, config, {"tokens": source}, tmp_path / name)
    upsample.check(None, out)
    return out


def kept(out):
    return {row["doc_id"]: row["input_ids"] for row in read_table(out, "tokens").to_pylist()}


def tokens_by_source(documents):
    found = {}
    for name, ids in documents.items():
        found[name.split("/")[0]] = found.get(name.split("/")[0], 0) + len(ids)
    return found


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 120)), min_size=1, max_size=40),
    fraction=st.sampled_from([0.2, 0.5, 1.0]),
    seed=st.integers(0, 5),
)
def test_sources_keep_their_shares_within_one_document(lengths, fraction, seed, tmp_path_factory):
    documents = {f"{source}/{n}": [100] * length for n, (source, length) in enumerate(lengths)}
    before = tokens_by_source(documents)
    config = UpsampleConfig(min_long_tokens=LONG, short_keep_fraction=fraction, seed=seed)
    drawn = {name: ids for name, ids in documents.items() if is_drawn(config, name, len(ids))}
    root = tmp_path_factory.mktemp("upsample")
    if set(tokens_by_source(drawn)) != set(before):
        with pytest.raises(ValueError, match=r"the draw by length leaves (it )?no token"):
            run(root, documents, short_keep_fraction=fraction, seed=seed)
        return
    out = kept(run(root, documents, short_keep_fraction=fraction, seed=seed))
    after = tokens_by_source(out)
    total = sum(before.values())
    scarcest = min(tokens_by_source(drawn)[source] / (before[source] / total) for source in before)
    for source, tokens in before.items():
        longest = max(len(ids) for name, ids in drawn.items() if name.startswith(source))
        assert abs(after.get(source, 0) - scarcest * tokens / total) <= longest / 2 + 1e-6
    assert any(after.get(source) == tokens for source, tokens in tokens_by_source(drawn).items()), "as much as can be"
    assert all(ids == documents[name] for name, ids in out.items())


def test_long_documents_stay_and_short_ones_stay_by_chance(tmp_path):
    documents = {f"web/{n}": [100] * (LONG if n % 4 == 0 else LONG - 1) for n in range(2000)}
    out = run(tmp_path, documents, shares="drawn", shard_records=600)
    names = set(kept(out))
    assert {name for name, ids in documents.items() if len(ids) == LONG} <= names
    assert 100 < len(names) - 500 < 200, "a tenth of 1,500"
    counts = read_artifact(out).counts
    assert counts["num_dropped_short"] == 2000 - len(names) and counts["num_dropped_over_share"] == 0
    assert counts["num_tokens_in"] == counts["num_tokens"] + counts["num_tokens_dropped_short"]


def test_the_share_of_long_documents_rises_in_each_source(tmp_path):
    documents = corpus()
    out = kept(run(tmp_path, documents))

    def long_fraction(table, source):
        lengths = [len(ids) for name, ids in table.items() if name.startswith(source)]
        return sum(length for length in lengths if length >= LONG) / sum(lengths)

    for source in ("web", "code"):
        assert long_fraction(out, source) > long_fraction(documents, source) + 0.1


def test_neither_order_nor_shards_choose_the_documents(tmp_path):
    documents = corpus(1)
    shuffled = dict(sorted(documents.items(), key=lambda item: rank(UpsampleConfig(seed=9), item[0])))
    outs = [run(tmp_path, documents, f"cut{cut}", shard_records=cut) for cut in (90, 1000)]
    other = run(tmp_path, shuffled, "shuffled", shard_records=70)
    assert kept(outs[0]) == kept(outs[1]) == kept(other)
    assert list(kept(outs[0])) == [name for name in documents if name in kept(other)]
    assert list(kept(other)) == [name for name in shuffled if name in kept(other)]
    assert kept(run(tmp_path, documents, "seed", seed=1)) != kept(other)
    assert file_bytes(run(tmp_path, documents, "again", shard_records=90)) == file_bytes(outs[0])


def test_documents_that_join_change_no_draw_by_length_of_others(tmp_path):
    documents = corpus(3)
    joined = {**documents, **{f"web/new{n}": [100] * 9 for n in range(50)}}
    before, after = (kept(run(tmp_path, table, str(n), shares="drawn")) for n, table in enumerate((documents, joined)))
    assert before == {name: ids for name, ids in after.items() if name in documents}
    ranks = [rank(UpsampleConfig(), f"a/{n}") for n in range(1000)]
    assert len(set(ranks)) == 1000 and 0.45 < sum(r < 2**63 for r in ranks) / 1000 < 0.55


def test_given_shares_are_met_and_the_total_too(tmp_path):
    documents = corpus(2)
    fractions = {"web": 0.5, "books": 0.5, "code": 0.0}
    out = run(tmp_path, documents, shares="given", fractions=fractions, short_keep_fraction=1.0, num_tokens=3000)
    found = tokens_by_source(kept(out))
    assert "code" not in found
    for source in ("web", "books"):
        longest = max(len(ids) for name, ids in documents.items() if name.startswith(source))
        assert abs(found[source] - 1500) <= longest / 2
    report = json.loads((out / "statistics.json").read_text())
    assert report == read_artifact(out).details
    row = report["sources"]["web"]
    assert row["num_tokens"] == found["web"] and row["tokens_fraction"] == found["web"] / sum(found.values())
    assert row["num_tokens_in"] == tokens_by_source(documents)["web"] == row["num_tokens_drawn"]


def test_everything_stays_when_nothing_is_asked(tmp_path):
    documents = {**corpus(4), "lone/full": [100] * 60, **{f"lone/empty{n}": [] for n in range(40)}}
    for shares in ("original", "drawn"):
        assert kept(run(tmp_path, documents, shares, shares=shares, short_keep_fraction=1.0)) == documents


@settings(deadline=None, max_examples=60)
@given(
    drawn=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 1000), min_size=1),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_budgets_have_the_shares_and_fit(drawn, weights):
    shares = dict(zip(sorted(drawn), weights, strict=False))
    shares = {source: weight / sum(shares.values()) for source, weight in shares.items()}
    found = budgets(shares, drawn, None)
    assert all(found[source] <= drawn[source] * (1 + 1e-9) for source in drawn)
    assert any(found[source] == pytest.approx(drawn[source]) for source in drawn)
    assert all(found[source] == pytest.approx(shares[source] * sum(found.values())) for source in drawn)


def test_what_cannot_be_had_is_an_error_that_says_so(tmp_path):
    documents = {"a/1": [100] * 60, "b/1": [100] * 10}
    with pytest.raises(ValueError, match="source 'b' has a share, but the draw by length leaves it no token"):
        run(tmp_path, documents, "1", short_keep_fraction=0.0)
    with pytest.raises(ValueError, match="num_tokens asks for 71, but the draw by length and the shares allow 70"):
        run(tmp_path, documents, "2", short_keep_fraction=1.0, num_tokens=71)
    with pytest.raises(ValueError, match=r"names the sources \['a', 'c'\], but the tokens have \['a', 'b'\]"):
        run(tmp_path, documents, "3", shares="given", fractions={"a": 0.5, "c": 0.5})
    with pytest.raises(ValueError, match="no token to upsample"):
        run(tmp_path, {"a/1": []}, "4")
    with pytest.raises(ValueError, match="no token to upsample"):
        run(tmp_path, {}, "5")
    with pytest.raises(ValueError, match="the draw by length leaves no token"):
        run(tmp_path, documents, "6", shares="drawn", short_keep_fraction=0.0, min_long_tokens=100)
    with pytest.raises(ValueError, match=r"kept no token: .*raise num_tokens"):
        run(tmp_path, documents, "7", short_keep_fraction=1.0, num_tokens=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"fractions": {"a": 1.0}},
        {"shares": "given"},
        {"shares": "given", "fractions": {"a": 0.5}},
        {"shares": "given", "fractions": {"a": float("nan")}},
        {"shares": "given", "fractions": {"a": 1.5, "b": -0.5}},
    ],
)
def test_shares_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValidationError, match="fractions"):
        UpsampleConfig(**fields)
