import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbour_artifacts import topical_vectors, write_neighbours
from row_invariants import assert_rows_are_sound, numbered_documents, run_stage, write_tokens

from ropewalk.stages.data import document_walk
from ropewalk.stages.data.compiled.walk import degrees
from ropewalk.stages.schema import read_artifact, seeded_rng

quick = settings(deadline=None, max_examples=60)
graphs = st.integers(1, 15).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, n - 1), max_size=4, unique=True), min_size=n, max_size=n)
)


def as_array(lists, width=4):
    found = np.full((len(lists), width), -1, np.int32)
    for document, others in enumerate(lists):
        others = [other for other in others if other != document]
        found[document, : len(others)] = others
    return found


def slow_path(neighbours, mask, key):
    """Algorithm 1 on sets."""
    edges = {frozenset((a, b)) for a, others in enumerate(neighbours.tolist()) for b in others if b >= 0}
    degree = [sum(document in edge for edge in edges) for document in range(len(neighbours))]
    shuffled = seeded_rng(*key).permutation(len(neighbours)).tolist()
    unseen = {document for document in range(len(neighbours)) if mask[document]}
    path, starts = [], 0
    while unseen:
        document = min(unseen, key=lambda d: (degree[d], shuffled.index(d)))
        starts += 1
        while document is not None:
            unseen.remove(document)
            path.append(document)
            following = [other for other in neighbours[document].tolist() if other in unseen]
            document = following[0] if following else None
    return path, starts


@quick
@given(graphs, st.integers(0, 5), st.data())
def test_paths_equal_those_of_sets(lists, seed, data):
    neighbours = as_array(lists)
    mask = np.asarray(data.draw(st.lists(st.booleans(), min_size=len(lists), max_size=len(lists))), np.bool_)
    path, starts = document_walk.walk_path(neighbours, mask, seed, "x")
    assert (path.tolist(), starts) == slow_path(neighbours, mask, (seed, "x"))


def test_a_degree_counts_every_joined_document_once():
    # 0 and 1 list each other; 2 lists 0; nobody knows 3.
    assert degrees(as_array([[1], [0], [0], []])).tolist() == [2, 1, 1, 0]


def test_a_path_starts_at_the_lowest_degree_and_goes_to_the_first_unvisited():
    # 3 is listed by nobody and lists 1: degree 1, all others have more.
    neighbours = as_array([[1, 2], [0, 2], [1, 0], [1]])
    path, starts = document_walk.walk_path(neighbours, np.ones(4, bool), "x")
    assert path.tolist() == [3, 1, 0, 2]
    assert starts == 1


@pytest.mark.parametrize("num_clusters", [1, 3])
def test_rows_are_the_path_laid_end_to_end(tmp_path, num_clusters):
    documents = numbered_documents([1 + 7 * n % 31 for n in range(40)] + [0, 200])
    vectors = dict(zip(documents, topical_vectors(len(documents)), strict=True))
    names = list(documents)
    clusters = [{name: vectors[name] for name in names[part::num_clusters]} for part in range(num_clusters)]
    inputs = {
        "tokens": write_tokens(tmp_path / "tokens", documents),
        "neighbours": write_neighbours(tmp_path / "neighbours", clusters),
    }
    config = document_walk.DocumentWalkConfig(row_tokens=32, num_neighbours=3)
    data = run_stage(document_walk, config, inputs, tmp_path / "out")
    document_walk.check(config, data)
    rows = assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert {row["attention"] for row in rows} == {"causal"}
    assert artifact.counts["num_tokens_kept"] == artifact.counts["num_tokens_in"]
    assert artifact.counts["num_tokens_padding"] < 32
    assert artifact.details["roots_per_row"] > 0
    assert artifact.details["requery_fraction"] == 0
    assert artifact.details["similarity_adjacent"] > artifact.details["similarity_random"]


def test_only_the_first_neighbours_are_edges(tmp_path):
    documents = numbered_documents([5] * 40)
    vectors = dict(zip(documents, topical_vectors(40), strict=True))
    inputs = {
        "tokens": write_tokens(tmp_path / "tokens", documents),
        "neighbours": write_neighbours(tmp_path / "neighbours", [vectors], 9),
    }
    roots = []
    for number in (1, 9):
        config = document_walk.DocumentWalkConfig(row_tokens=32, num_neighbours=number)
        data = run_stage(document_walk, config, inputs, tmp_path / str(number))
        roots.append(read_artifact(data).counts["num_roots"])
    assert roots[0] > 10 > roots[1]
