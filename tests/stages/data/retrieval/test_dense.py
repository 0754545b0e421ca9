import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.retrieval.dense import (
    DenseRequery,
    DenseSearch,
    assign,
    choose_index,
    fine_lists,
    pq_bytes,
    tie_order,
    unit_vectors,
)
from ropewalk.stages.data.retrieval.pool import Pool

quick = settings(deadline=None, max_examples=40)
ALL_LISTS = 1_000_000


def clustered(num_documents, num_dimensions=24, num_topics=30, seed=0):
    rng = np.random.default_rng(seed)
    topics = rng.standard_normal((num_topics, num_dimensions))
    return topics[rng.integers(0, num_topics, num_documents)] + 0.7 * rng.standard_normal(
        (num_documents, num_dimensions)
    )


def shuffled_ids(num_documents):
    return [f"d{(number * 7) % 10_007:05d}" for number in range(num_documents)]


def slow_ranking(vectors, doc_ids, query, allowed):
    """All allowed others by cosine in double precision, rounded so that copies tie, then by id; zeros left out."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not norms[query]:
        return []
    unit = vectors / np.where(norms, norms, 1)[:, None]
    scores = np.round(unit @ unit[query], 5)
    others = [n for n in range(len(doc_ids)) if n != query and norms[n] and allowed[n]]
    return sorted(others, key=lambda n: (-scores[n], doc_ids[n]))


def test_lists_are_the_exact_ranking_by_cosine_in_double_precision():
    vectors, ids = clustered(700), shuffled_ids(700)
    pool = Pool.from_vectors(ids, vectors, 12)
    for query in range(0, 700, 13):
        assert pool.neighbours[query].tolist() == slow_ranking(vectors, ids, query, np.ones(700, bool))[:12]
        one = vectors[query] / np.linalg.norm(vectors[query])
        other = vectors[pool.neighbours[query, 0]]
        assert pool.scores[query, 0] == pytest.approx(one @ other / np.linalg.norm(other), abs=1e-5)
        assert pool.similarity(query, pool.neighbours[query, 0]) == pool.scores[query, 0]


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 8))
def test_copies_are_found_in_the_order_of_ids_and_nobody_finds_itself(kinds, k):
    vectors = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8], [0, 0, 0]])[kinds]
    ids = shuffled_ids(len(kinds))
    pool = Pool.from_vectors(ids, vectors, k)
    everything = np.ones(len(kinds), bool)
    for query in range(len(kinds)):
        found = [n for n in pool.neighbours[query].tolist() if n >= 0]
        assert found == slow_ranking(vectors, ids, query, everything)[:k]
        assert (pool.neighbours[query, len(found) :] == -1).all()


def test_a_vector_of_zeros_has_no_neighbours_and_is_nobodys():
    vectors = clustered(50)
    vectors[[3, 20]] = 0
    pool = Pool.from_vectors(shuffled_ids(50), vectors, 50)
    assert (pool.neighbours[3] == -1).all()
    assert not np.isin(pool.neighbours, [3, 20]).any()
    assert len(pool.requery(20, 5, np.ones(50, bool))[0]) == 0
    assert 3 not in pool.requery(0, 50, np.ones(50, bool))[0]
    assert pool.similarity(3, 4) == 0


def test_one_document_has_no_neighbours():
    pool = Pool.from_vectors(["only"], np.ones((1, 4)), 3)
    assert pool.neighbours.tolist() == [[-1, -1, -1]]
    assert len(pool.requery(0, 2, np.ones(1, bool))[0]) == 0


@quick
@given(st.integers(0, 2**32), st.floats(0.0, 1.0), st.integers(1, 6))
def test_a_requery_of_all_lists_is_the_ranking_of_the_unused(seed, fraction, k):
    rng = np.random.default_rng(seed)
    vectors, ids = clustered(400, seed=1), shuffled_ids(400)
    unused = rng.random(400) < fraction
    pool = Pool.from_vectors(ids, vectors, 1, num_probes=ALL_LISTS)
    for query in rng.integers(0, 400, 5).tolist():
        found, scores = pool.requery(query, k, unused)
        assert found.dtype == np.int64
        assert found.tolist() == slow_ranking(vectors, ids, query, unused)[:k]
        assert scores.tolist() == [pytest.approx(pool.similarity(query, n), abs=0) for n in found.tolist()]


def test_a_requery_goes_on_to_further_lists_until_it_has_found_enough():
    vectors, ids = clustered(900), shuffled_ids(900)
    unused = np.zeros(900, bool)
    unused[[5, 77, 400, 899]] = True
    pool = Pool.from_vectors(ids, vectors, 1, num_probes=1)
    for query in (0, 5, 300):
        assert pool.requery(query, 9, unused)[0].tolist() == slow_ranking(vectors, ids, query, unused)
    unused[:] = False
    assert len(pool.requery(0, 3, unused)[0]) == 0


def test_requeries_do_not_depend_on_those_before_though_documents_come_back():
    vectors, ids = clustered(600), shuffled_ids(600)
    unit, order = unit_vectors(vectors), tie_order(ids)
    lists = fine_lists(unit, order, seed=0)
    assert lists.max() > 10
    seasoned = DenseRequery(unit, lists, order, num_probes=3)
    rng = np.random.default_rng(0)
    for fraction in (1.0, 0.3, 0.02, 0.6, 0.1, 0.9):
        unused = rng.random(600) < fraction
        for query in range(0, 600, 40):
            fresh = DenseRequery(unit, lists, order, num_probes=3)
            for old, new in zip(seasoned(query, 4, unused), fresh(query, 4, unused), strict=True):
                assert old.tolist() == new.tolist()


def test_few_probes_find_nearly_what_all_find():
    vectors, ids = clustered(4000, num_topics=300), shuffled_ids(4000)
    unit, order = unit_vectors(vectors), tie_order(ids)
    lists = fine_lists(unit, order, seed=0)
    few, every = DenseRequery(unit, lists, order, 4), DenseRequery(unit, lists, order, ALL_LISTS)
    unused = np.random.default_rng(0).random(4000) < 0.5
    pairs = [(set(few(query, 8, unused)[0]), set(every(query, 8, unused)[0])) for query in range(0, 4000, 20)]
    assert 0.7 < np.mean([len(one & other) / 8 for one, other in pairs]) < 1


def test_when_few_documents_are_left_all_of_them_are_compared():
    vectors, ids = clustered(4000), shuffled_ids(4000)
    unit, order = unit_vectors(vectors), tie_order(ids)
    lists = fine_lists(unit, order, seed=0)
    few, every = DenseRequery(unit, lists, order, 8), DenseRequery(unit, lists, order, ALL_LISTS)
    unused = np.random.default_rng(0).random(4000) < 0.02
    assert unused.sum() > 60
    for query in range(0, 4000, 40):
        assert few(query, 2, unused)[0].tolist() == every(query, 2, unused)[0].tolist()


@pytest.mark.parametrize(("kind", "recall"), [("ivf", 0.97), ("ivfpq", 0.95)])
def test_an_index_finds_most_of_the_exact_lists_with_the_exact_scores(kind, recall):
    vectors = unit_vectors(clustered(3000, num_dimensions=32))
    order = tie_order(shuffled_ids(3000))
    lists = fine_lists(vectors, order, seed=0)
    exact, exact_scores = DenseSearch(vectors, lists, order, "exact", 1)(0, 3000, 10)
    found, scores = DenseSearch(vectors, lists, order, kind, 16)(0, 3000, 10)
    shares = [len(set(one) & set(other)) / 10 for one, other in zip(exact.tolist(), found.tolist(), strict=True)]
    assert recall < np.mean(shares) < 1
    for query in range(0, 3000, 100):
        known = dict(zip(exact[query].tolist(), exact_scores[query].tolist(), strict=True))
        pairs = list(zip(found[query].tolist(), scores[query].tolist(), strict=True))
        assert all(known.get(n, score) == score for n, score in pairs)
        assert pairs == sorted(pairs, key=lambda pair: (-pair[1], order[pair[0]]))
        assert query not in found[query]


def test_with_all_lists_probed_an_inverted_file_is_exact_even_among_copies():
    vectors = unit_vectors(np.repeat(clustered(600), 2, axis=0))
    order = tie_order(shuffled_ids(1200))
    lists = fine_lists(vectors, order, seed=0)
    exact = DenseSearch(vectors, lists, order, "exact", 1)(0, 1200, 9)
    found = DenseSearch(vectors, lists, order, "ivf", ALL_LISTS)(0, 1200, 9)
    assert exact[0].tolist() == found[0].tolist()
    assert exact[1].tolist() == found[1].tolist()


def test_ranges_of_queries_give_what_all_at_once_give():
    vectors = unit_vectors(clustered(300))
    order = tie_order(shuffled_ids(300))
    search = DenseSearch(vectors, fine_lists(vectors, order, 0), order, "exact", 1)
    whole = search(0, 300, 5)
    for start, stop in ((0, 7), (7, 300), (120, 121)):
        assert search(start, stop, 5)[0].tolist() == whole[0][start:stop].tolist()


def test_scores_do_not_depend_on_the_place_of_a_document():
    vectors = clustered(200)
    turned = vectors[::-1]
    ids = shuffled_ids(200)
    one, other = Pool.from_vectors(ids, vectors, 6), Pool.from_vectors(ids[::-1], turned, 6)
    for query in range(200):
        there = other.neighbours[199 - query]
        assert [ids[n] for n in one.neighbours[query]] == [ids[199 - n] for n in there]
        assert one.scores[query].tolist() == other.scores[199 - query].tolist()


def test_fine_lists_do_not_depend_on_the_order_of_the_corpus():
    vectors, ids = unit_vectors(clustered(500)), shuffled_ids(500)
    turned = np.random.default_rng(3).permutation(500)
    lists = fine_lists(vectors, tie_order(ids), seed=0)
    others = fine_lists(vectors[turned], tie_order([ids[number] for number in turned]), seed=0)
    assert lists.max() > 15
    assert lists[turned].tolist() == others.tolist()


def test_auto_chooses_the_index_by_size_and_small_clusters_are_always_exact():
    sizes = (1, 1023, 1024, 16_384, 16_385, 1_000_000, 1_000_001)
    assert [choose_index(n, "auto") for n in sizes] == ["exact"] * 4 + ["ivf", "ivf", "ivfpq"]
    assert choose_index(1023, "ivfpq") == "exact"
    assert choose_index(1024, "ivfpq") == "ivfpq"
    assert choose_index(10**8, "exact") == "exact"


def test_quantised_vectors_divide_the_dimensions():
    assert [pq_bytes(d) for d in (3, 64, 100, 256, 384, 768)] == [1, 16, 25, 64, 64, 64]


def test_unit_vectors_survive_huge_and_tiny_numbers():
    units = unit_vectors(np.array([[3e30, 4e30], [3e-30, 4e-30], [0, 0]]))
    np.testing.assert_allclose(units, [[0.6, 0.8], [0.6, 0.8], [0, 0]], rtol=1e-6)


def test_documents_go_to_the_nearest_centroid_the_first_of_equals():
    centroids = unit_vectors(np.array([[1, 0], [0, 1], [0, 1]]))
    vectors = unit_vectors(np.array([[0.2, 0.9], [0.9, 0.2], [0, 0]]))
    assert assign(vectors, centroids).tolist() == [1, 0, 0]
