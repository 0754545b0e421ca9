import random
from itertools import pairwise

import numpy as np
import pytest
from neighbour_artifacts import topical_vectors, write_neighbours
from row_invariants import EOS, assert_rows_are_sound, numbered_documents, run_stage, write_tokens

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data import splice
from ropewalk.stages.schema import read_artifact, read_table, tokens_schema, write_artifact, write_table

NUM_TOPICS = 4


def topic_of(doc_id):
    return int(doc_id[1:]) % NUM_TOPICS


def vectors_of(doc_ids, seed=0):
    """Vectors by id; the topic is told by the number in it."""
    vectors = topical_vectors(1 + max(int(doc_id[1:]) for doc_id in doc_ids), NUM_TOPICS, seed)
    return {doc_id: vectors[int(doc_id[1:])] for doc_id in doc_ids}


def divided(vectors, num_clusters):
    """The vectors in clusters of documents whose topics are near in number."""
    names = sorted(vectors, key=lambda doc_id: (topic_of(doc_id), doc_id))
    bounds = [len(names) * cluster // num_clusters for cluster in range(num_clusters + 1)]
    return [{doc_id: vectors[doc_id] for doc_id in names[begin:end]} for begin, end in pairwise(bounds)]


def make_inputs(folder, documents, num_clusters=1, others=()):
    """Slots `tokens` and `neighbours`; the neighbours know `others`, too."""
    vectors = vectors_of([*documents, *others])
    return {
        "tokens": write_tokens(folder / "tokens", documents),
        "neighbours": write_neighbours(folder / "neighbours", divided(vectors, num_clusters)),
    }


@pytest.fixture
def documents():
    draw = random.Random(1)
    return numbered_documents([draw.randint(1, 70) for _ in range(32)])


@pytest.fixture(params=[1, 3])
def inputs(tmp_path, documents, request):
    return make_inputs(tmp_path, documents, request.param, others=["d900", "d901"])


@pytest.mark.parametrize("order", ["identity", "shuffle", "reverse"])
@pytest.mark.parametrize("overflow", [None, 2])
def test_rows_account_for_every_token(tmp_path, documents, inputs, order, overflow):
    config = splice.SpliceConfig(row_tokens=48, order=order, min_remainder_tokens=4, max_overflow_tokens=overflow)
    data = run_stage(splice, config, inputs, tmp_path / "out")
    splice.check(config, data)
    rows = assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert {row["attention"] for row in rows} == {"causal"}
    assert artifact.counts["num_documents_in"] == 32
    assert artifact.counts["num_tokens_trimmed"] <= 3 * len(rows)
    assert artifact.counts["num_own_rows"] == sum(len(ids) // 47 for ids in documents.values())
    assert artifact.counts["num_tokens_padding"] < 48
    assert artifact.details["retriever"] == "dense"
    assert artifact.details["roots_per_row"] > 0
    assert artifact.details["similarity_adjacent"] > artifact.details["similarity_random"]
    assert 0 < artifact.details["requery_fraction"] < 1


def test_noise_makes_rows_less_alike(tmp_path):
    inputs = make_inputs(tmp_path, numbered_documents([9] * 300))
    found = []
    for noise in (0.0, 1.0):
        config = splice.SpliceConfig(row_tokens=100, noise_fraction=noise)
        data = run_stage(splice, config, inputs, tmp_path / str(noise))
        found.append(read_artifact(data).details["similarity_adjacent"])
    at_random = read_artifact(data).details["similarity_random"]
    assert found[0] > at_random + 0.3 > at_random + 0.1 > found[1]


@pytest.mark.parametrize("with_neighbours", [False, True])
def test_the_random_control_needs_no_neighbours(tmp_path, documents, with_neighbours):
    inputs = make_inputs(tmp_path, documents)
    if not with_neighbours:
        del inputs["neighbours"]
    config = splice.SpliceConfig(row_tokens=48, retriever="random")
    data = run_stage(splice, config, inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert artifact.details["retriever"] == "random"
    assert ("similarity_adjacent" in artifact.details) == with_neighbours
    assert {edge["rank"] for edge in read_table(data, "edges").to_pylist()} == {-2}


def test_units_of_the_random_control_are_packed_once_more(tmp_path, documents, monkeypatch):
    monkeypatch.setattr(splice, "GROUP_TOKENS", 300)
    tokens = write_tokens(tmp_path / "tokens", documents)
    config = splice.SpliceConfig(row_tokens=48, retriever="random")
    data = run_stage(splice, config, {"tokens": tokens}, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert artifact.details["num_units"] > 2
    assert artifact.counts["num_tokens_padding"] < 48


def test_documents_are_followed_by_a_learnt_end_token(tmp_path):
    documents = {"d0": [100, 101, 102], "d1": [200, 201]}
    inputs = make_inputs(tmp_path, documents)
    data = run_stage(splice, splice.SpliceConfig(row_tokens=10, seed=1), inputs, tmp_path / "out")
    (row,) = assert_rows_are_sound(data, documents)
    ends = [segment["row_start"] + segment["num_tokens"] for segment in row["segments"]]
    assert [row["input_ids"][end] for end in ends] == [EOS, EOS]
    assert row["loss_mask"] == [False, *[True] * 7, False, False]


@pytest.mark.parametrize("k", [1, 4])
def test_edges_say_who_brought_in_whom(tmp_path, documents, inputs, k):
    data = run_stage(splice, splice.SpliceConfig(row_tokens=100, k=k), inputs, tmp_path / "out")
    rows = {row["row_id"]: row for row in assert_rows_are_sound(data, documents)}
    edges = read_table(data, "edges").to_pylist()
    assert len(edges) > 10
    children = [(edge["row_id"], edge["child_doc_id"]) for edge in edges]
    assert len(set(children)) == len(children)
    for edge in edges:
        inside = [segment["doc_id"] for segment in rows[edge["row_id"]]["segments"]]
        assert inside.index(edge["parent_doc_id"]) < inside.index(edge["child_doc_id"])
        assert -1 <= edge["rank"] < 4
    in_rows = {row_id: len(row["segments"]) for row_id, row in rows.items()}
    assert all(sum(row_id == child for child, _ in children) < in_rows[row_id] for row_id in rows), "a row has a root"
    alike = np.mean([topic_of(edge["parent_doc_id"]) == topic_of(edge["child_doc_id"]) for edge in edges])
    assert alike > 0.6


def test_what_clusters_leave_shares_rows(tmp_path):
    documents = numbered_documents([20] * 24)
    config = splice.SpliceConfig(row_tokens=72, min_remainder_tokens=2)
    data = run_stage(splice, config, make_inputs(tmp_path, documents, 6), tmp_path / "out")
    rows = assert_rows_are_sound(data, documents)
    counts = read_artifact(data).counts
    # Six clusters of 84 positions fill a row each and leave 13 more, which go into two.
    assert (counts["num_rows"], counts["num_rows_of_left_overs"]) == (8, 2)
    assert sum(len({topic_of(segment["doc_id"]) for segment in row["segments"]}) > 1 for row in rows) >= 2


def test_the_last_row_is_dropped_when_asked_and_counted(tmp_path, documents, inputs):
    config = splice.SpliceConfig(row_tokens=51, partial_row="drop")
    data = run_stage(splice, config, inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    counts = read_artifact(data).counts
    assert counts["num_tokens_padding"] == 0
    assert 0 < counts["num_tokens_dropped_partial_row"] < 51


def test_a_limit_keeps_the_first_rows_of_the_shuffle(tmp_path, documents, inputs):
    every = run_stage(splice, splice.SpliceConfig(row_tokens=48), inputs, tmp_path / "all")
    five = run_stage(splice, splice.SpliceConfig(row_tokens=48, num_rows=5), inputs, tmp_path / "five")
    assert assert_rows_are_sound(five, documents) == assert_rows_are_sound(every, documents)[:5]
    kept = {row["row_id"] for row in read_table(five, "rows").to_pylist()}
    edges = {edge["row_id"] for edge in read_table(five, "edges").to_pylist()}
    assert edges and edges <= kept


class Backwards(LocalContext):
    """Works on the last item first, like a cluster whose first worker is slow."""

    def map(self, function, items, *, resources=None):
        results = [function(item) for item in reversed(list(items))]
        return iter(results[::-1])


def files_of(data):
    return {path.name: path.read_bytes() for path in data.iterdir()}


def run_backwards(config, inputs, folder):
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    splice.run(config, inputs, output, Backwards(folder / "work"))
    return output.data


def test_bytes_depend_on_the_seed_but_not_on_workers_or_shards(tmp_path, documents):
    inputs = make_inputs(tmp_path, documents, 3)
    config = splice.SpliceConfig(row_tokens=48)
    first = files_of(run_stage(splice, config, inputs, tmp_path / "first"))
    assert files_of(run_backwards(config, inputs, tmp_path / "backwards")) == first
    whole = tmp_path / "whole"
    records = ({"doc_id": name, "source": "test", "input_ids": ids} for name, ids in reversed(documents.items()))
    write_table(whole, "tokens", tokens_schema(), records)
    write_artifact(whole, read_artifact(inputs["tokens"]))
    assert files_of(run_stage(splice, config, inputs | {"tokens": whole}, tmp_path / "cut")) == first
    other = files_of(run_stage(splice, splice.SpliceConfig(row_tokens=48, seed=1), inputs, tmp_path / "seed"))
    assert other["rows-00000.parquet"] != first["rows-00000.parquet"]


@pytest.mark.parametrize("lengths", [[5], [1000], [8] * 40, [0, 3, 0]])
def test_odd_corpora_are_packed(tmp_path, lengths):
    documents = numbered_documents(lengths)
    inputs = {
        "tokens": write_tokens(tmp_path / "tokens", documents),
        "neighbours": write_neighbours(tmp_path / "neighbours", [dict.fromkeys(documents, np.ones(4))]),
    }
    data = run_stage(splice, splice.SpliceConfig(row_tokens=12), inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)


def test_missing_neighbours_and_neighbours_of_another_corpus_are_named(tmp_path, documents):
    inputs = make_inputs(tmp_path, documents)
    config = splice.SpliceConfig(row_tokens=48)
    with pytest.raises(ValueError, match="splice needs slot neighbours"):
        run_stage(splice, config, {"tokens": inputs["tokens"]}, tmp_path / "without")
    others = make_inputs(tmp_path / "others", dict(list(documents.items())[:-1]))
    with pytest.raises(ValueError, match="slot neighbours lacks 'd031'"):
        run_stage(splice, config, inputs | {"neighbours": others["neighbours"]}, tmp_path / "foreign")


def test_a_corpus_without_tokens_is_named(tmp_path):
    inputs = make_inputs(tmp_path, {"d0": [], "d1": []})
    with pytest.raises(ValueError, match="no tokens to lay into rows"):
        run_stage(splice, splice.SpliceConfig(row_tokens=48), inputs, tmp_path / "out")
