import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import (
    EOS,
    assert_rows_are_sound,
    candidate_lists,
    numbered_documents,
    run_stage,
    write_documents,
    write_tokens,
)

from ropewalk.stages.data import splice
from ropewalk.stages.data.retrieve import RandomNeighbours, build_index
from ropewalk.stages.schema import read_artifact, read_table, seeded_rng

quick = settings(deadline=None, max_examples=60)
TOPICS = {
    "sea": ["rope", "mast", "sail", "hull", "keel", "tide", "wave"],
    "kitchen": ["bread", "flour", "oven", "yeast", "salt", "dough", "crust"],
    "garden": ["rose", "soil", "spade", "seed", "hedge", "lawn", "fern"],
    "forge": ["iron", "anvil", "hammer", "coal", "tongs", "steel", "spark"],
}


def topical_texts(per_topic, seed=0):
    """Texts by document id; the topic is told by the id's place: d000, d004, ... are of the first topic."""
    draw = random.Random(seed)
    topics = list(TOPICS)
    texts = {}
    for number in range(per_topic * len(topics)):
        words = draw.choices(TOPICS[topics[number % len(topics)]], k=20) + draw.choices(["the", "of", "and"], k=5)
        texts[f"d{number:03d}"] = " ".join(words)
    return texts


def topic_of(doc_id):
    return int(doc_id[1:]) % len(TOPICS)


def make_neighbours(texts, num_candidates=4):
    index = build_index(list(texts), texts.items())
    return candidate_lists(index, num_candidates)


def slow_splice(lengths, scores, *, row_tokens, k, order, min_remainder, seed):
    """SPLiCe on lists of (document, place) tokens; `scores[q][d]` ranks documents. Returns the rows' tokens."""
    capacity = row_tokens - 1
    pool, rows = {}, []
    for document, length in enumerate(lengths):
        tokens = [(document, place) for place in range(length)]
        while len(tokens) >= capacity:
            rows.append(tokens[:capacity])
            tokens = tokens[capacity:]
        if tokens and (len(tokens) == length or len(tokens) >= min_remainder):
            pool[document] = tokens
    while pool:
        rng = seeded_rng(seed, "splice", len(rows))
        context, queue = [], []
        while sum(len(tokens) + 1 for _, tokens in context) <= capacity and (queue or pool):
            if queue:
                parent = queue.pop(0)
                near = sorted((-scores[parent][d], d) for d in pool if scores[parent][d] > 0)
                found = [d for _, d in near[:k]]
            else:
                found = [sorted(pool)[rng.integers(len(pool))]]
            context += [(d, pool.pop(d)) for d in found]
            queue += found
        if order == "shuffle":
            context = [context[place] for place in rng.permutation(len(context))]
        if order == "reverse":
            context = context[::-1]
        # A separator is ("end", document); only whole documents have one.
        laid = [token for document, tokens in context for token in [*tokens, ("end", document)]][:capacity]
        rows.append(laid)
        for document, tokens in context:
            left = [token for token in tokens if token not in laid]
            if len(left) >= min_remainder or len(left) == len(tokens):
                pool[document] = left
        pool = {document: tokens for document, tokens in pool.items() if tokens}
    return [[token for token in row if token[0] != "end"] for row in rows]


@quick
@given(
    st.lists(st.integers(0, 45), min_size=12, max_size=12),
    st.integers(2, 30),
    st.integers(1, 3),
    st.sampled_from(["identity", "shuffle", "reverse"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 3),
)
def test_rows_equal_those_of_plain_lists(lengths, row_tokens, k, order, min_remainder, num_candidates, seed):
    neighbours = make_neighbours(topical_texts(3, seed=seed), num_candidates)
    config = splice.SpliceConfig(
        row_tokens=row_tokens, k=k, order=order, min_remainder_tokens=min_remainder, num_candidates=1, seed=seed
    )
    fast = splice.splice(config, lengths, neighbours)
    scores = [neighbours.index.scores(document) for document in range(12)]
    slow = slow_splice(lengths, scores, row_tokens=row_tokens, k=k, order=order, min_remainder=min_remainder, seed=seed)
    assert [[(p.document, p.start + i) for p in row for i in range(p.num_tokens)] for row in fast.plan] == slow
    assert fast.num_tokens_trimmed == sum(lengths) - sum(map(len, slow))


@quick
@given(st.lists(st.integers(0, 60), min_size=12, max_size=12), st.integers(2, 30), st.integers(1, 3))
def test_every_row_but_the_last_is_full(lengths, row_tokens, k):
    config = splice.SpliceConfig(row_tokens=row_tokens, k=k, min_remainder_tokens=3)
    plan = splice.splice(config, lengths, make_neighbours(topical_texts(3))).plan
    for row in plan[:-1]:
        assert sum(piece.num_tokens + piece.is_end for piece in row) >= row_tokens - 1


@quick
@given(st.integers(1, 4), st.integers(1, 20))
def test_the_length_of_the_lists_does_not_change_the_rows(k, num_candidates):
    texts = topical_texts(5)
    lengths = [7 + 3 * number for number in range(20)]
    plans = []
    for count in (num_candidates, 20):
        config = splice.SpliceConfig(row_tokens=40, k=k)
        plans.append(splice.splice(config, lengths, make_neighbours(texts, count)).plan)
    assert plans[0] == plans[1]


def test_a_path_by_hand():
    # d0 -> d1 (two shared words) -> d3 (d0 is used) -> d2 has nothing in common with d3, so it is the next root.
    texts = {"d0": "hemp yarn tar", "d1": "hemp yarn sled", "d2": "lane hook", "d3": "sled"}
    config = splice.SpliceConfig(row_tokens=50, seed=next(s for s in range(99) if first_root(s, 4) == 0))
    result = splice.splice(config, [5, 5, 5, 5], make_neighbours(texts))
    assert [[piece.document for piece in row] for row in result.plan] == [[0, 1, 3, 2]]
    assert [(edge.parent, edge.child) for edge in result.edges] == [(0, 1), (1, 3)]
    assert result.num_roots == 2


def test_a_tree_is_filled_breadth_first():
    # d0 brings in d1 and d2; d1 brings in d3 and d4 before d2 brings in d5.
    texts = {
        "d0": "aa bb cc dd",
        "d1": "aa bb ee ff gg",
        "d2": "cc hh ii",
        "d3": "ee ff",
        "d4": "gg",
        "d5": "hh ii",
    }
    config = splice.SpliceConfig(row_tokens=50, k=2, seed=next(s for s in range(99) if first_root(s, 6) == 0))
    result = splice.splice(config, [5] * 6, make_neighbours(texts))
    assert [piece.document for piece in result.plan[0]] == [0, 1, 2, 3, 4, 5]
    assert [(edge.parent, edge.child) for edge in result.edges] == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]


def first_root(seed, num_documents):
    return seeded_rng(seed, "splice", 0).integers(num_documents)


def test_what_the_cut_leaves_of_a_document_comes_in_a_later_row():
    config = splice.SpliceConfig(row_tokens=11, min_remainder_tokens=2, seed=1)
    result = splice.splice(config, [7, 8], make_neighbours({"d0": "hemp yarn", "d1": "hemp tar"}))
    (first, second), (rest,) = result.plan
    assert (first.start, second.start, second.is_end) == (0, 0, False)
    assert (rest.document, rest.start, rest.is_end) == (second.document, second.num_tokens, True)
    assert result.num_tokens_trimmed == 0


def test_short_tails_are_trimmed_and_counted():
    config = splice.SpliceConfig(row_tokens=11, min_remainder_tokens=20, seed=1)
    result = splice.splice(config, [7, 8], make_neighbours({"d0": "hemp yarn", "d1": "hemp tar"}))
    assert len(result.plan) == 1
    assert result.num_tokens_trimmed == 15 - sum(piece.num_tokens for piece in result.plan[0])


def test_documents_of_a_topic_come_together():
    texts = topical_texts(30)
    lengths = [20] * len(texts)
    shares = {}
    for name, neighbours in (("bm25", make_neighbours(texts)), ("random", RandomNeighbours())):
        plan = splice.splice(splice.SpliceConfig(row_tokens=200), lengths, neighbours).plan
        pairs = [(a.document, b.document) for row in plan for a, b in pairwise(row)]
        shares[name] = np.mean([a % len(TOPICS) == b % len(TOPICS) for a, b in pairs])
    assert shares["bm25"] > 0.9
    assert shares["random"] < 0.45


@pytest.fixture
def corpus(tmp_path):
    texts = topical_texts(8)
    draw = random.Random(1)
    documents = numbered_documents([draw.randint(1, 70) for _ in texts])
    inputs = {
        "tokens": write_tokens(tmp_path / "tokens", documents),
        "documents": write_documents(tmp_path / "documents", texts | {"of another subset": "hemp"}),
    }
    return documents, inputs


@pytest.mark.parametrize("retriever", ["bm25", "random"])
@pytest.mark.parametrize("order", ["identity", "shuffle", "reverse"])
def test_rows_account_for_every_token(tmp_path, corpus, retriever, order):
    documents, inputs = corpus
    config = splice.SpliceConfig(row_tokens=48, retriever=retriever, order=order, min_remainder_tokens=4)
    data = run_stage(splice, config, inputs, tmp_path / "out")
    rows = assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert {row["attention"] for row in rows} == {"causal"}
    assert artifact.counts["num_tokens_trimmed"] <= 3 * len(rows)
    assert artifact.counts["num_own_rows"] == sum(len(ids) // 47 for ids in documents.values())
    assert artifact.details["roots_per_row"] >= 1
    if retriever == "bm25":
        assert artifact.details["similarity_adjacent"] > 2 * artifact.details["similarity_random"]
        assert artifact.details["fallback_fraction"] < 0.5


def test_documents_are_followed_by_a_learnt_end_token(tmp_path):
    documents = {"d0": [100, 101, 102], "d1": [200, 201]}
    texts = {"d0": "hemp yarn", "d1": "hemp tar"}
    inputs = {"tokens": write_tokens(tmp_path / "t", documents), "documents": write_documents(tmp_path / "d", texts)}
    data = run_stage(splice, splice.SpliceConfig(row_tokens=10, seed=1), inputs, tmp_path / "out")
    (row,) = assert_rows_are_sound(data, documents)
    ends = [segment["row_start"] + segment["num_tokens"] for segment in row["segments"]]
    assert [row["input_ids"][end] for end in ends] == [EOS, EOS]
    assert row["loss_mask"] == [False, *[True] * 7, False, False]


@pytest.mark.parametrize("k", [1, 4])
def test_edges_say_who_brought_in_whom(tmp_path, corpus, k):
    documents, inputs = corpus
    data = run_stage(splice, splice.SpliceConfig(row_tokens=100, k=k), inputs, tmp_path / "out")
    rows = {row["row_id"]: row for row in assert_rows_are_sound(data, documents)}
    edges = read_table(data, "edges").to_pylist()
    assert edges
    children = [(edge["row_id"], edge["child_doc_id"]) for edge in edges]
    assert len(set(children)) == len(children)
    for edge in edges:
        inside = [segment["doc_id"] for segment in rows[edge["row_id"]]["segments"]]
        assert inside.index(edge["parent_doc_id"]) < inside.index(edge["child_doc_id"])
        assert edge["score"] > 0
    in_rows = {row_id: len(row["segments"]) for row_id, row in rows.items()}
    assert all(sum(row_id == child for child, _ in children) < in_rows[row_id] for row_id in rows), "a row has a root"
    alike = np.mean([topic_of(edge["parent_doc_id"]) == topic_of(edge["child_doc_id"]) for edge in edges])
    assert alike > 0.7


def test_the_last_row_is_dropped_when_asked_and_counted(tmp_path, corpus):
    documents, inputs = corpus
    config = splice.SpliceConfig(row_tokens=51, partial_row="drop")
    data = run_stage(splice, config, inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    counts = read_artifact(data).counts
    assert counts["num_tokens_padding"] == 0
    assert 0 < counts["num_tokens_dropped_partial_row"] < 51


def test_a_limit_keeps_the_first_rows_of_the_shuffle(tmp_path, corpus):
    documents, inputs = corpus
    every = run_stage(splice, splice.SpliceConfig(row_tokens=48), inputs, tmp_path / "all")
    five = run_stage(splice, splice.SpliceConfig(row_tokens=48, num_rows=5), inputs, tmp_path / "five")
    assert assert_rows_are_sound(five, documents) == assert_rows_are_sound(every, documents)[:5]
    kept = {row["row_id"] for row in read_table(five, "rows").to_pylist()}
    assert {edge["row_id"] for edge in read_table(five, "edges").to_pylist()} <= kept


def test_equal_configs_give_equal_bytes(tmp_path, corpus):
    _, inputs = corpus
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data = run_stage(splice, splice.SpliceConfig(row_tokens=48, seed=seed), inputs, tmp_path / name)
        runs.append({path.name: path.read_bytes() for path in data.iterdir()})
    assert runs[0] == runs[1]
    assert runs[0]["rows-00000.parquet"] != runs[2]["rows-00000.parquet"]
