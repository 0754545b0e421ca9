"""Facility location, graph cut and the walk over distinct samples, against plain float64 computations."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.compiled import submodular as compiled
from ropewalk.stages.data.selection.submodular import (
    cross_similarities,
    distinct_order,
    facility_location_order,
    graph_cut_order,
    similarity_kernel,
    split_parts,
    unit_vectors,
)

SHORT = settings(deadline=None, max_examples=40)


def drawn_units(seed, num_samples, num_dimensions=5):
    """Unit vectors with some exact duplicates among them."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_samples, num_dimensions))
    vectors[rng.random(num_samples) < 0.2] = vectors[0]
    return unit_vectors(vectors)[0]


def covered(kernel, chosen):
    """Facility location's value, as it is defined."""
    return sum(max([0.0, *(float(kernel[i, j]) for j in chosen)]) for i in range(len(kernel)))


def cut(kernel, chosen, penalty):
    """Graph cut's value, as it is defined."""
    exact = kernel.astype(np.float64)
    return exact[:, chosen].sum() - penalty * exact[np.ix_(chosen, chosen)].sum()


def greedy(size, budget, value):
    """The plain greedy algorithm with every gain computed anew; ties within rounding go to the smaller number."""
    chosen, gains = [], []
    for _ in range(budget):
        found = {j: value([*chosen, j]) - value(chosen) for j in range(size) if j not in chosen}
        best = max(found.values())
        chosen.append(next(j for j in sorted(found) if found[j] >= best - 1e-9))
        gains.append(best)
    return chosen, gains


def test_rows_get_length_one_and_zero_rows_stay_zero():
    units, lengths = unit_vectors(np.array([[3, 4], [0, 0], [1e-3, 0]], dtype=np.float16))
    assert np.allclose(units[:2], [[0.6, 0.8], [0, 0]], atol=1e-7)
    assert lengths[0] == 5 and lengths[1] == 0
    assert np.allclose(np.linalg.norm(units[2]), 1)


@SHORT
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 600), st.integers(1, 9))
def test_cosines_are_those_of_float64(seed, num_rows, num_others, num_dimensions):
    rows, others = drawn_units(seed, num_rows, num_dimensions), drawn_units(seed + 1, num_others, num_dimensions)
    found = cross_similarities(rows, others)
    assert np.abs(found - rows.astype(np.float64) @ others.astype(np.float64).T).max() < 1e-6
    assert (found == cross_similarities(others, rows).T).all()


def test_euclidean_similarity_orders_as_submodlibs_does():
    units = drawn_units(3, 50, 384)
    distances = np.linalg.norm(units[:, None].astype(np.float64) - units[None], axis=2)
    similar = similarity_kernel(units, "euclidean")
    assert np.abs(similar - (1 - distances / 2)).max() < 1e-3
    published = np.exp(-distances / 384)
    line = 1 - distances / 384
    assert np.abs(published - line).max() < 384**-2 * 2
    order = np.argsort(-published[0], kind="stable")[1:]
    assert (np.diff(similar[0][order]) < 1e-3).all()


@SHORT
@given(st.integers(0, 2**32), st.integers(1, 24), st.data())
def test_lazy_greedy_chooses_what_plain_greedy_does(seed, size, data):
    kernel = similarity_kernel(drawn_units(seed, size), data.draw(st.sampled_from(["cosine", "euclidean"])))
    budget = data.draw(st.integers(0, size))
    chosen, gains = facility_location_order(kernel, budget)
    expected, expected_gains = greedy(size, budget, lambda picked: covered(kernel, picked))
    assert chosen.tolist() == expected
    assert np.allclose(gains, expected_gains, atol=1e-9)


@SHORT
@given(st.integers(0, 2**32), st.integers(1, 20), st.floats(0, 1), st.data())
def test_graph_cut_chooses_what_plain_greedy_does(seed, size, penalty, data):
    kernel = similarity_kernel(drawn_units(seed, size), "cosine")
    budget = data.draw(st.integers(0, size))
    chosen, gains = graph_cut_order(kernel, budget, penalty)
    expected, expected_gains = greedy(size, budget, lambda picked: cut(kernel, picked, penalty))
    assert chosen.tolist() == expected
    assert np.allclose(gains, expected_gains, atol=1e-9)


@SHORT
@given(st.integers(0, 2**32), st.integers(2, 9), st.integers(1, 4))
def test_greedy_coverage_is_within_its_guarantee_of_the_optimum(seed, size, budget):
    budget = min(budget, size)
    kernel = similarity_kernel(drawn_units(seed, size), "euclidean")
    best = max(covered(kernel, picked) for picked in combinations(range(size), budget))
    chosen, gains = facility_location_order(kernel, budget)
    assert np.isclose(gains.sum(), covered(kernel, chosen.tolist()))
    assert best * (1 - (1 - 1 / budget) ** budget) - 1e-9 <= gains.sum() <= best + 1e-9


def test_lazy_evaluation_computes_few_gains():
    kernel = similarity_kernel(drawn_units(1, 400), "cosine")
    _, _, evaluations = compiled.facility_location(kernel, 100)
    assert evaluations < 400 * 100 / 4


def test_more_than_there_are_cannot_be_chosen():
    kernel = similarity_kernel(drawn_units(1, 3), "cosine")
    with pytest.raises(ValueError, match="4 of 3 cannot be chosen"):
        facility_location_order(kernel, 4)


@SHORT
@given(st.integers(0, 2**32), st.integers(1, 700), st.floats(0.2, 0.99), st.integers(1, 300), st.integers(1, 400))
def test_the_walk_keeps_what_is_unlike_all_kept(seed, size, limit, budget, block):
    units = drawn_units(seed, size, 3)
    cosines = units.astype(np.float64) @ units.astype(np.float64).T
    if (np.abs(cosines - limit) < 1e-5).any():
        return
    expected = []
    for number in range(size):
        if len(expected) < budget and all(cosines[number, earlier] <= limit for earlier in expected):
            expected.append(number)
    blocks = (units[begin : begin + block] for begin in range(0, size, block))
    kept, walked = distinct_order(blocks, limit, budget)
    assert kept == expected
    assert walked == (expected[-1] + 1 if len(expected) == budget else size)


def test_what_is_like_a_dropped_sample_alone_is_kept():
    angles = np.deg2rad([0, 20, 40])
    units = unit_vectors(np.stack([np.cos(angles), np.sin(angles)], axis=1))[0]
    # 20 degrees apart is too like (0.94), 40 is not (0.77): the third is like the second, which is not kept.
    assert distinct_order([units], 0.9, 3) == ([0, 2], 3)


def test_duplicates_leave_one():
    units = unit_vectors(np.ones((1000, 4)))[0]
    assert distinct_order([units], 0.9, 1000) == ([0], 1000)


def test_duplicates_of_thousands_of_kept_samples_are_found():
    units = unit_vectors(np.random.default_rng(0).normal(size=(5000, 24)))[0]
    again = np.random.default_rng(1).permutation(5000)
    kept, walked = distinct_order([units[:2600], units[2600:], units[again]], 0.995, 6000)
    assert kept == list(range(5000)) and walked == 10_000


@SHORT
@given(st.integers(1, 200), st.integers(1, 30))
def test_parts_are_bounded_even_and_cover_all(size, limit):
    ids = [f"s{number}" for number in range(size)]
    parts = split_parts(ids, limit)
    assert sorted(np.concatenate(parts).tolist()) == list(range(size))
    assert max(map(len, parts)) <= limit
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts) == -(-size // limit)
    backwards = split_parts(ids[::-1], limit)
    assert {frozenset(ids[n] for n in part) for part in parts} == {
        frozenset(ids[::-1][n] for n in part) for part in backwards
    }
