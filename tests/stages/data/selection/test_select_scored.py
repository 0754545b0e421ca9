from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import write_chats
from pydantic import ValidationError
from row_invariants import run_stage, tokenizer_info, write_documents, write_tokens

from ropewalk.stages.data.selection import select_scored
from ropewalk.stages.data.selection.choice import Candidates, choose
from ropewalk.stages.data.selection.scores import scores_table
from ropewalk.stages.data.selection.select_scored import SelectConfig, amount
from ropewalk.stages.schema import (
    Artifact,
    documents_schema,
    read_artifact,
    read_table,
    tokens_schema,
    write_artifact,
    write_shard,
    write_table,
)

TEXTS = {f"d{n:02d}": "x" * (n + 1) for n in range(10)}
SCORES = {name: float(n % 5) for n, name in enumerate(TEXTS)}


def write_scored(folder, scores, parts=None, **dropped):
    """A Scores artifact in an order of its own."""
    names = sorted(scores, key=lambda name: name[::-1])
    columns = {"score": [scores[name] for name in names]} | {
        part: [values[name] for name in names] for part, values in (parts or {}).items()
    }
    write_shard(folder, "scores", 0, scores_table(names, ["s"] * len(names), columns))
    counts = {"num_in": len(names) + sum(dropped.values()), "num_scored": len(names), **dropped}
    write_artifact(folder, Artifact(kind="scores", counts=counts))
    return folder


def select(tmp_path, config, *, scores=SCORES, texts=TEXTS, name="out", **dropped):
    inputs = {
        "documents": write_documents(tmp_path / f"{name}-documents", texts),
        "scores": write_scored(tmp_path / f"{name}-scores", scores, **dropped),
    }
    data = run_stage(select_scored, config, inputs, tmp_path / name)
    select_scored.check(config, data)
    return data


def kept(data):
    return read_table(data, "documents").column("doc_id").to_pylist()


@pytest.mark.parametrize(
    "rule, expected",
    [
        ({"keep_fraction": 0.3}, ["d03", "d04", "d09"]),
        ({"num_samples": 2}, ["d04", "d09"]),
        ({"num_samples": 10}, list(TEXTS)),
        ({"min_score": 3.0}, ["d03", "d04", "d08", "d09"]),
        ({"budget_bytes": 15 + 4}, ["d03", "d04", "d09"]),
        ({"budget_bytes": 15 + 4 + 9 - 1}, ["d03", "d04", "d09"]),
        ({"budget_bytes": 10**6}, list(TEXTS)),
    ],
)
def test_the_best_are_kept_in_the_order_of_the_table(tmp_path, rule, expected):
    data = select(tmp_path, SelectConfig(**rule))
    assert kept(data) == expected
    counts = read_artifact(data).counts
    assert counts["num_in"] == 10 == counts["num_kept"] + counts["num_dropped_below"] + counts["num_dropped_unscored"]
    assert counts["num_kept_bytes"] == sum(len(TEXTS[name]) for name in expected)
    assert read_table(data, "documents").schema.equals(documents_schema())
    assert (tmp_path / "out/observed/selection.png").stat().st_size


def test_another_threshold_needs_the_scores_alone(tmp_path):
    scores = write_scored(tmp_path / "scores", SCORES)
    documents = write_documents(tmp_path / "documents", TEXTS)
    before = {path: path.read_bytes() for folder in (scores, documents) for path in folder.iterdir()}
    for number, low in enumerate((1.0, 4.0)):
        inputs = {"scores": scores, "documents": documents}
        data = run_stage(select_scored, SelectConfig(min_score=low), inputs, tmp_path / str(number))
        assert kept(data) == [name for name, score in SCORES.items() if score >= low]
    assert before == {path: path.read_bytes() for folder in (scores, documents) for path in folder.iterdir()}


def test_samples_that_the_scoring_dropped_are_rejected_by_name(tmp_path):
    scores = {name: score for name, score in SCORES.items() if name not in ("d04", "d05")}
    data = select(tmp_path, SelectConfig(num_samples=2), scores=scores, num_dropped_short=2)
    assert kept(data) == ["d03", "d09"]
    counts = read_artifact(data).counts
    assert (counts["num_dropped_unscored"], counts["num_dropped_below"]) == (2, 6)


def test_scores_of_another_table_are_refused(tmp_path):
    fewer = {name: score for name, score in SCORES.items() if name != "d04"}
    with pytest.raises(ValueError, match=r"lacks a score for 1 samples of the table, such as 'd04', but the scoring"):
        select(tmp_path, SelectConfig(num_samples=2), scores=fewer, name="missing")
    with pytest.raises(ValueError, match=r"has a score for 'e99', which the table lacks"):
        select(tmp_path, SelectConfig(num_samples=2), scores=SCORES | {"e99": 1.0}, name="extra")
    with pytest.raises(ValueError, match=r"lacks a score for 0 samples of the table, but the scoring dropped 3"):
        select(tmp_path, SelectConfig(num_samples=2), name="dropped", num_dropped_short=3)


def test_quotas_hold_the_shares_of_the_sources(tmp_path):
    chats = {f"{source}/{n}": [("user", "u" * n), ("assistant", "a")] for source in "abc" for n in range(1, 8)}
    chats = {name: turns for name, turns in chats.items() if not (name[0] == "c" and int(name[2:]) > 4)}
    scores = {name: "cba".index(name[0]) * 100.0 + int(name[2:]) for name in chats}
    inputs = {"chats": write_chats(tmp_path / "chats", chats), "scores": write_scored(tmp_path / "scores", scores)}

    def of(number, **config):
        data = run_stage(select_scored, SelectConfig(**config), inputs, tmp_path / str(number))
        select_scored.check(SelectConfig(**config), data)
        return read_table(data, "chats").column("sample_id").to_pylist(), read_artifact(data).details

    assert of(0, num_samples=7)[0] == [f"a/{n}" for n in range(1, 8)]
    names, details = of(1, num_samples=7, enable_source_quotas=True)
    assert names == ["a/5", "a/6", "a/7", "b/5", "b/6", "b/7", "c/4"], "exact shares are 2.72, 2.72 and 1.56"
    assert details["sources"]["b"] == {"num_in": 7, "num_kept": 3, "lowest_kept_score": 105.0}
    names, _ = of(2, budget_bytes=sum(range(2, 9)) * 2, enable_source_quotas=True)
    sizes = {name: sum(int(n[2:]) + 1 for n in names if n[0] == name) for name in "abc"}
    assert all(sizes[name] <= 28 for name in "ab") and sizes["c"] <= 14 and min(sizes.values()) > 6


def test_tokens_keep_their_tokenizer_and_loss_mask(tmp_path):
    ids = {name: list(range(100, 100 + len(text))) for name, text in TEXTS.items()}
    tokens = write_tokens(tmp_path / "tokens", ids)
    (tokens / "tokenizer").mkdir()
    (tokens / "tokenizer" / "tokenizer.json").write_text("{}")
    info = tokenizer_info(digest="44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")
    write_artifact(tokens, Artifact(kind="tokens", tokenizer=info))
    scores = write_scored(tmp_path / "scores", SCORES)
    config = SelectConfig(budget_tokens=19)
    data = run_stage(select_scored, config, {"tokens": tokens, "scores": scores}, tmp_path / "out")
    select_scored.check(config, data)
    assert read_table(data, "tokens").column("doc_id").to_pylist() == ["d03", "d04", "d09"]
    artifact = read_artifact(data, "tokens")
    assert artifact.tokenizer == info and (artifact.counts["num_tokens_in"], artifact.counts["num_tokens"]) == (55, 19)
    masked = tmp_path / "masked"
    rows = ({"doc_id": n, "source": "s", "input_ids": i, "loss_mask": [True] * len(i)} for n, i in ids.items())
    write_table(masked, "tokens", tokens_schema(loss_mask=True), rows)
    write_artifact(masked, Artifact(kind="tokens", tokenizer=info))
    data = run_stage(select_scored, config, {"tokens": masked, "scores": scores}, tmp_path / "out2")
    select_scored.check(config, data)
    assert read_table(data, "tokens").column("loss_mask").to_pylist() == [[True] * 4, [True] * 5, [True] * 10]


def test_a_budget_of_tokens_uses_the_lengths_that_the_scores_hold(tmp_path):
    documents = write_documents(tmp_path / "documents", TEXTS)
    lengths = dict.fromkeys(TEXTS, 10.0) | {"d09": 25.0}
    inputs = {"documents": documents, "scores": write_scored(tmp_path / "scores", SCORES, {"num_tokens": lengths})}
    assert kept(run_stage(select_scored, SelectConfig(budget_tokens=45), inputs, tmp_path / "out")) == [
        "d03",
        "d04",
        "d09",
    ]
    with pytest.raises(ValueError, match="budget_tokens: the scores have no part num_tokens"):
        select(tmp_path, SelectConfig(budget_tokens=45), name="unknown")


def test_what_cannot_be_done_is_said(tmp_path):
    for rules in ({}, {"num_samples": 1, "min_score": 0.0}):
        with pytest.raises(ValidationError, match="exactly one of keep_fraction"):
            SelectConfig(**rules)
    with pytest.raises(ValidationError, match="no meaning with min_score"):
        SelectConfig(min_score=1.0, enable_source_quotas=True)
    with pytest.raises(ValueError, match="wants num_samples 11, but 10 were scored"):
        select(tmp_path, SelectConfig(num_samples=11), name="many")
    with pytest.raises(ValueError, match=r"keeps nothing of 10 samples: \{'min_score': 9.0"):
        select(tmp_path, SelectConfig(min_score=9.0), name="none")
    scores = write_scored(tmp_path / "scores", SCORES)
    tokens = write_tokens(tmp_path / "tokens", {name: [100] for name in TEXTS})
    with pytest.raises(ValueError, match="budget_bytes: Tokens hold no text"):
        run_stage(select_scored, SelectConfig(budget_bytes=3), {"tokens": tokens, "scores": scores}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"takes the slots scores and one of .*, not \['scores'\]"):
        run_stage(select_scored, SelectConfig(num_samples=3), {"scores": scores}, tmp_path / "b")
    with pytest.raises(ValueError, match="holds tokens, not documents"):
        run_stage(select_scored, SelectConfig(num_samples=3), {"documents": tokens, "scores": scores}, tmp_path / "c")


samples = st.lists(
    st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.integers(0, 3)), st.integers(1, 9)),
    min_size=1,
    max_size=25,
)


@given(samples, st.integers(0, 60), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_choice_has_one_threshold_a_source_and_does_not_exceed_its_room(rows, wanted, by_source):
    ids = np.asarray([f"{number * 7 % 31:02d}" for number in range(len(rows))])
    sources = np.asarray([row[0] for row in rows])
    scores = np.asarray([np.nan if row[1] is None else row[1] for row in rows])
    sizes = np.asarray([row[2] for row in rows])

    def in_order(order):
        texts = (pa.chunked_array([pa.array(values[order].tolist())]) for values in (ids, sources))
        return Candidates.of(*texts, scores[order], sizes[order])

    candidates = in_order(np.arange(len(rows)))
    total = int(candidates.sizes[candidates.scored].sum())
    keep = choose(candidates, min(wanted, total), by_source=by_source)
    assert not keep[~candidates.scored].any() and candidates.sizes[keep].sum() <= wanted
    for source in set(sources) if by_source else [None]:
        among = candidates.scored & ((sources == source) if by_source else True)
        place = lambda number: (-scores[number], ids[number])  # noqa: E731
        inside = [place(number) for number in np.flatnonzero(among & keep)]
        outside = [place(number) for number in np.flatnonzero(among & ~keep)]
        assert not inside or not outside or max(inside) < min(outside)
        if by_source and total:
            room = Fraction(min(wanted, total)) * int(candidates.sizes[among].sum()) / total
            assert candidates.sizes[among & keep].sum() < room + 1
    order = np.random.default_rng(0).permutation(len(rows))
    assert (choose(in_order(order), min(wanted, total), by_source=by_source) == keep[order]).all()


def test_a_fraction_is_taken_as_it_is_written():
    assert amount(SelectConfig(keep_fraction=0.29), 100) == 29
    assert amount(SelectConfig(keep_fraction=0.5), 3) == 2
