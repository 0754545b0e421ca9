from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbour_artifacts import pool_by_hand, topical_vectors

from ropewalk.stages.data.compiled.walk import AT_RANDOM, FROM_QUERY, draw, put_back, take
from ropewalk.stages.data.packing.bins import Piece, RowPlan
from ropewalk.stages.data.packing.walk import (
    FIT_CANDIDATES,
    Walk,
    adjacent_documents,
    make_unused,
    similarity_details,
    similarity_of,
    splice_documents,
)
from ropewalk.stages.data.retrieval.pool import Pool
from ropewalk.stages.schema import seeded_rng

quick = settings(deadline=None, max_examples=60)
MASK = 2**64 - 1


def lengths_of(*numbers):
    return np.asarray(numbers, np.int64)


def many_roots(order, draws, lengths=None):
    """The rows of walks over a pool by hand, one for each key."""
    lengths = lengths if lengths is not None else np.full(len(order), 5)
    pool = pool_by_hand([f"d{n}" for n in range(len(lengths))], order, 4)
    return [splice_documents(lengths, pool, 49, key=(key,)) for key in range(draws)]


class SlowRandom:
    """Uniform numbers below 2^53 from splitmix64, in whole numbers of Python."""

    def __init__(self, counter):
        self.counter = counter

    def __call__(self):
        self.counter = (self.counter + 0x9E3779B97F4A7C15) & MASK
        bits = self.counter
        bits = ((bits ^ bits >> 30) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ bits >> 27) * 0x94D049BB133111EB) & MASK
        return (bits ^ bits >> 31) >> 11


class SlowSplice:
    """SPLiCe on lists of (document, place) tokens, with all similarities at hand."""

    def __init__(self, lengths, pool, row_tokens, *, k, order, min_remainder, noise, overflow, key):
        rng = seeded_rng(*key)
        self.coming = rng.permutation(len(lengths)).tolist()
        self.random = SlowRandom(int(rng.integers(2**64, dtype=np.uint64)))
        self.capacity, self.k, self.order, self.pool = row_tokens - 1, k, order, pool
        self.min_remainder, self.noise, self.overflow = min_remainder, noise, overflow
        self.left, self.rows, self.edges = {}, [], []
        for document, length in enumerate(lengths):
            tokens = [(document, place) for place in range(length)]
            while len(tokens) >= self.capacity:
                self.rows.append(tokens[: self.capacity])
                tokens = tokens[self.capacity :]
            if tokens and (len(tokens) == length or len(tokens) >= min_remainder):
                self.left[document] = tokens
        while self.left:
            self.make_row()

    def ranked(self, parent):
        others = [d for d in range(len(self.pool.doc_ids)) if d != parent]
        return sorted(others, key=lambda d: (-self.pool.similarity(parent, d), self.pool.doc_ids[d]))

    def draw(self):
        while self.coming:
            document = self.coming.pop(0)
            if document in self.left:
                return document
        return None

    def put_back(self, document, tokens):
        self.left[document] = tokens
        if document not in self.coming:
            self.coming.insert(0, document)
            place = self.random() % len(self.coming)
            self.coming[0], self.coming[place] = self.coming[place], self.coming[0]

    def fitting(self, candidates, size):
        """The first that overflows by little; else the first."""
        room = self.capacity - size
        fits = [d for d in candidates if self.overflow is None or len(self.left[d]) - room <= self.overflow]
        return (fits or candidates)[0]

    def nearest(self, parent, size):
        ranked = self.ranked(parent)
        listed = [d for d in ranked[: self.pool.neighbours.shape[1]] if d in self.left]
        if listed:
            child = self.fitting(listed, size)
            return child, ranked.index(child)
        unused = [d for d in ranked if d in self.left]
        return self.fitting(unused[:FIT_CANDIDATES], size), FROM_QUERY

    def make_row(self):
        context, queue, size = [], [], 0
        brought = []

        def choose(document):
            nonlocal size
            context.append((document, self.left.pop(document)))
            queue.append(document)
            size += len(context[-1][1]) + 1

        while size < self.capacity and self.left:
            if not queue:
                choose(self.draw())
                continue
            parent = queue.pop(0)
            for _ in range(self.k):
                if not self.left:
                    break
                if self.noise > 0 and self.random() < self.noise * 2.0**53:
                    child, rank = self.draw(), AT_RANDOM
                else:
                    child, rank = self.nearest(parent, size)
                choose(child)
                brought.append((parent, child, rank))
        if self.order == "reverse":
            context = context[::-1]
        if self.order == "shuffle":
            for last in range(len(context) - 1, 0, -1):
                place = self.random() % (last + 1)
                context[last], context[place] = context[place], context[last]
        # A separator is ("end", document); only whole documents have one.
        laid = [token for document, tokens in context for token in [*tokens, ("end", document)]][: self.capacity]
        placed = {token[0] for token in laid if token[0] != "end"}
        self.edges += [(len(self.rows), *edge) for edge in brought if edge[1] in placed]
        self.rows.append([token for token in laid if token[0] != "end"])
        for document, tokens in context:
            left = [token for token in tokens if token not in laid]
            if left and (len(left) >= self.min_remainder or len(left) == len(tokens)):
                self.put_back(document, left)


def tokens_of(plan):
    return [[(p.document, p.start + place) for p in row for place in range(p.num_tokens)] for row in plan.to_rows()]


@quick
@given(
    st.lists(st.integers(0, 45), min_size=12, max_size=12),
    st.integers(2, 30),
    st.integers(1, 3),
    st.sampled_from(["identity", "shuffle", "reverse"]),
    st.integers(1, 6),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.sampled_from([None, 0, 4]),
    st.integers(0, 50),
)
def test_walks_equal_those_of_plain_lists(
    lengths, row_tokens, k, order, min_remainder, num_listed, noise, overflow, seed
):
    # Vectors of few values, so that scores tie; ids in another order than numbers.
    vectors = np.random.default_rng(seed).integers(1, 3, size=(12, 2))
    pool = Pool.from_vectors([f"d{(7 * n) % 12:02d}" for n in range(12)], vectors, num_listed)
    walk = splice_documents(
        lengths_of(*lengths),
        pool,
        row_tokens - 1,
        k=k,
        order=order,
        noise=noise,
        max_overflow_tokens=overflow,
        min_remainder_tokens=min_remainder,
        key=(seed, "walk"),
    )
    slow = SlowSplice(
        lengths,
        pool,
        row_tokens,
        k=k,
        order=order,
        min_remainder=min_remainder,
        noise=noise,
        overflow=overflow,
        key=(seed, "walk"),
    )
    assert tokens_of(walk.plan) == slow.rows
    columns = (walk.edges.rows, walk.edges.parents, walk.edges.children, walk.edges.ranks)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == slow.edges
    assert walk.counts["num_tokens_trimmed"] == sum(lengths) - sum(map(len, slow.rows))


@quick
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(2, 30),
    st.integers(1, 3),
    st.sampled_from([None, 3]),
)
def test_every_row_but_the_last_is_full(lengths, row_tokens, k, overflow):
    pool = Pool.from_vectors([f"d{n:02d}" for n in range(len(lengths))], topical_vectors(len(lengths)), 3)
    walk = splice_documents(
        lengths_of(*lengths), pool, row_tokens - 1, k=k, max_overflow_tokens=overflow, min_remainder_tokens=3
    )
    assert not walk.plan.room(row_tokens - 1)[:-1].any()


@quick
@given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 9))
def test_the_length_of_the_lists_does_not_change_the_rows(k, num_listed, seed):
    vectors = topical_vectors(20, seed=seed)
    lengths = 7 + 3 * np.arange(20)
    plans = [
        splice_documents(lengths, Pool.from_vectors([f"d{n:02d}" for n in range(20)], vectors, number), 39, k=k).plan
        for number in (num_listed, 19)
    ]
    assert plans[0].to_rows() == plans[1].to_rows()


def test_a_path_by_hand():
    # 0 -> 1 -> 3 (0 is used) -> nothing is like 3, so 2 is the next root.
    order = {0: [1, 2], 1: [0, 3], 2: [0], 3: [1]}
    walks = [walk for walk in many_roots(order, 20) if walk.plan.documents[0] == 0]
    assert walks
    for walk in walks:
        assert walk.plan.documents.tolist() == [0, 1, 3, 2]
        assert list(zip(walk.edges.parents, walk.edges.children, strict=True)) == [(0, 1), (1, 3)]
        assert walk.counts["num_roots"] == 2


def test_a_tree_is_filled_breadth_first():
    # 0 brings in 1 and 2; 1 brings in 3 and 4 before 2 brings in 5.
    order = {0: [1, 2], 1: [3, 4, 0], 2: [5, 0], 3: [], 4: [], 5: []}
    pool = pool_by_hand([f"d{n}" for n in range(6)], order, 4)
    walks = [splice_documents(np.full(6, 5), pool, 49, k=2, key=(key,)) for key in range(30)]
    walks = [walk for walk in walks if walk.plan.documents[0] == 0]
    assert walks
    assert walks[0].plan.documents.tolist() == [0, 1, 2, 3, 4, 5]
    edges = list(zip(walks[0].edges.parents, walks[0].edges.children, strict=True))
    assert edges == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)]


def test_a_used_up_list_is_asked_again_among_the_unused():
    # The lists hold one entry; 3's nearest, 1, is used when 3 is reached, and the query finds 2.
    order = {0: [1], 1: [3], 2: [3], 3: [1, 2]}
    pool = pool_by_hand(["d0", "d1", "d2", "d3"], order, 1)
    walks = [splice_documents(np.full(4, 5), pool, 49, key=(key,)) for key in range(20)]
    (walk, *_) = [walk for walk in walks if walk.plan.documents[0] == 0]
    assert walk.plan.documents.tolist() == [0, 1, 3, 2]
    assert walk.edges.ranks.tolist() == [0, 0, FROM_QUERY]
    assert walk.counts["num_requeries"] == 1 and walk.counts["num_roots"] == 1


def test_what_the_cut_leaves_of_a_document_comes_in_a_later_row():
    pool = pool_by_hand(["d0", "d1"], {0: [1], 1: [0]}, 1)
    walk = splice_documents(lengths_of(7, 8), pool, 10, min_remainder_tokens=2)
    (first, second), (rest,) = walk.plan.to_rows()
    assert (first.start, second.start, second.is_end) == (0, 0, False)
    assert (rest.document, rest.start, rest.is_end) == (second.document, second.num_tokens, True)
    assert walk.counts["num_tokens_trimmed"] == 0


def test_a_document_that_fits_is_preferred_to_a_nearer_one_that_does_not():
    pool = pool_by_hand(["d0", "d1", "d2", "d3"], {0: [1, 2, 3]}, 3)
    lengths = lengths_of(5, 9, 8, 4)
    documents = {}
    for overflow in (None, 3, 2, 0):
        walks = [splice_documents(lengths, pool, 11, max_overflow_tokens=overflow, key=(key,)) for key in range(30)]
        documents[overflow] = next(walk.plan.to_rows()[0][1] for walk in walks if walk.plan.documents[0] == 0)
    # Six positions are taken, five are left: 1 overflows by four tokens, 2 by three, 3 by none.
    assert [documents[overflow].document for overflow in (None, 3, 2, 0)] == [1, 2, 3, 3]
    assert documents[0].is_end and not documents[3].is_end


def test_where_nothing_fits_the_nearest_is_cut():
    pool = pool_by_hand(["d0", "d1", "d2"], {0: [1, 2]}, 3)
    walks = [splice_documents(lengths_of(5, 9, 8), pool, 11, max_overflow_tokens=0, key=(key,)) for key in range(30)]
    walk = next(walk for walk in walks if walk.plan.documents[0] == 0)
    assert walk.plan.to_rows()[0] == [Piece(0, 0, 5, True), Piece(1, 0, 5, False)]


def test_documents_longer_than_a_row_become_rows_of_their_own_and_a_rest():
    pool = pool_by_hand(["d0", "d1"], {0: [1], 1: [0]}, 1)
    walk = splice_documents(lengths_of(1_000_003, 2), pool, 9, min_remainder_tokens=2)
    assert walk.num_own_rows == 1_000_003 // 9
    assert {piece.document for row in walk.plan.to_rows()[walk.num_own_rows :] for piece in row} == {0, 1}
    assert walk.plan.num_tokens.sum() == 1_000_005


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_a_pool_without_tokens_has_no_rows(lengths):
    walk = splice_documents(lengths_of(*lengths), None, 9)
    assert walk.plan.num_rows == 0


def test_one_document_and_copies_of_one_document_are_packed():
    one = splice_documents(lengths_of(4), Pool.from_vectors(["only"], np.ones((1, 4)), 2), 9)
    assert one.plan.to_rows() == [[Piece(0, 0, 4, True)]]
    copies = splice_documents(
        np.full(30, 4), Pool.from_vectors([f"d{n:02d}" for n in range(30)], np.ones((30, 4)), 2), 9
    )
    assert sorted(copies.plan.documents.tolist()) == sorted([*range(30), *_cut_twice(copies.plan)])
    assert copies.plan.num_tokens.sum() == 120


def _cut_twice(plan):
    return plan.documents[~plan.is_end].tolist()


def test_roots_are_uniform_also_after_documents_were_put_back():
    counts = np.zeros(5)
    for key in range(4000):
        unused = make_unused(np.full(5, 9), np.zeros(5, np.int64), np.ones(5, bool), key)
        first = draw(unused)
        take(unused, first)
        take(unused, (first + 1) % 5)
        put_back(unused, first, 3)
        counts[(draw(unused) - first) % 5] += 1
    assert counts[1] == 0
    # 1000 each, standard deviation 27.
    assert np.abs(counts[[0, 2, 3, 4]] - 1000).max() < 120


def test_nothing_is_drawn_twice_while_it_is_used():
    unused = make_unused(np.full(50, 9), np.zeros(50, np.int64), np.arange(50) % 3 > 0, "x")
    drawn = []
    while (document := draw(unused)) >= 0:
        take(unused, document)
        drawn.append(document)
    assert sorted(drawn) == [n for n in range(50) if n % 3]
    assert unused.counters[1] == 0


def test_documents_of_a_topic_come_together_and_noise_undoes_it():
    lengths = np.full(120, 20)
    pool = Pool.from_vectors([f"d{n:03d}" for n in range(120)], topical_vectors(120), 8)
    shares = {}
    for noise in (0.0, 0.5, 1.0):
        rows = splice_documents(lengths, pool, 199, noise=noise).plan.to_rows()
        pairs = [(a.document, b.document) for row in rows for a, b in pairwise(row)]
        shares[noise] = np.mean([a % 4 == b % 4 for a, b in pairs])
    random_rows = splice_documents(lengths, None, 199).plan.to_rows()
    assert random_rows == splice_documents(lengths, pool, 199, noise=1.0).plan.to_rows()
    assert shares[0.0] > 0.9 > 0.75 > shares[0.5] > 0.45 > shares[1.0]


def test_adjacent_documents_are_those_of_one_row_by_quarter():
    rows = [[(0, 9)], [(1, 2), (2, 3)], [(2, 1), (2, 1)], [(3, 1), (4, 1), (5, 1)], [(6, 1), (7, 1)]]
    plan = RowPlan.from_rows([[Piece(document, 0, size, True) for document, size in row] for row in rows])
    left, right, quarters = adjacent_documents(plan, 1)
    assert left.tolist() == [1, 3, 4, 6]
    assert right.tolist() == [2, 4, 5, 7]
    assert quarters.tolist() == [0, 2, 2, 3]


def test_similarity_is_the_mean_over_pairs_of_all_units():
    order = {0: [1], 2: [3]}
    pool = pool_by_hand([f"d{n}" for n in range(5)], order, 1)
    plan = RowPlan.from_rows([[Piece(n, 0, 1, True) for n in range(5)]])
    unit = similarity_of(Walk(plan), pool, "key")
    assert unit[0] == [4, 0.5]
    details = similarity_details([unit, [[4, 1.0], [0, 0.0], [0, 0.0], [8, 0.25], [10, 0.5]]])
    assert details["num_pairs"] == 16
    assert details["similarity_adjacent"] == pytest.approx((2 + 4 + 2) / 16)
    assert details["similarity_by_quarter"] == [0.75, None, None, 0.25]
    assert 0 <= details["similarity_random"] < 0.5


def test_popular_documents_are_used_first():
    lengths = np.full(2000, 50)
    pool = Pool.from_vectors([f"d{n:04d}" for n in range(2000)], topical_vectors(2000, 40, spread=0.6), 16)
    quarters = similarity_details([similarity_of(splice_documents(lengths, pool, 999), pool, 0)])
    assert quarters["similarity_by_quarter"][0] > quarters["similarity_by_quarter"][3]
    assert quarters["similarity_adjacent"] > quarters["similarity_random"] + 0.4
