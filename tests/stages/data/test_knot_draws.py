import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data.compiled import knot_draws
from ropewalk.stages.data.packing.knots import stream_key
from ropewalk.stages.schema import seeded_rng

BELOW = [0, 1, 2, 5, 61, 1000, 2**31 - 2, 2**32 - 2]
COUNTS = [1, 2, 7, 100, 9999, 10_001, 20_000]
SIZES = [1, 2, 3, 16, 17, 100, 200, 201, 399, 401, 1000]
draw = st.one_of(
    st.just(("uniform",)),
    st.tuples(st.just("up_to"), st.sampled_from(BELOW)),
    st.tuples(st.just("permutation"), st.sampled_from([0, 1, 2, 3, 7, 8, 9, 300])),
    st.tuples(st.just("weighted"), st.lists(st.integers(1, 9), min_size=1, max_size=6)),
    st.tuples(st.just("sample"), st.sampled_from(COUNTS), st.sampled_from(SIZES)),
)


def state_of(*parts):
    state = np.zeros(knot_draws.STATE_WORDS, np.uint64)
    knot_draws.start(state, np.frombuffer(stream_key(*parts), "<u8"))
    return state


def numpys(rng, kind, *values):
    if kind == "uniform":
        return [rng.random()]
    if kind == "up_to":
        return [rng.integers(values[0] + 1)]
    if kind == "permutation":
        return rng.permutation(values[0]).tolist()
    if kind == "weighted":
        weights = np.array(values[0]) / sum(values[0])
        return [rng.choice(len(weights), p=weights)]
    return rng.choice(values[0], size=min(values), replace=False).tolist()


def ours(state, kind, *values):
    if kind == "uniform":
        return [knot_draws.uniform(state)]
    if kind == "up_to":
        return [knot_draws.up_to(state, values[0])]
    if kind == "permutation":
        return knot_draws.permutation(state, values[0]).tolist()
    if kind == "weighted":
        sums = np.cumsum(np.array(values[0]) / sum(values[0]))
        return [knot_draws.weighted(state, sums / sums[-1])]
    return knot_draws.sample(state, values[0], min(values)).tolist()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.lists(draw, max_size=30))
def test_draws_are_numpys_in_any_order(seed, asked):
    rng, state = seeded_rng("draws", seed), state_of("draws", seed)
    for kind, *values in asked:
        assert ours(state, kind, *values) == numpys(rng, kind, *values)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("size", SIZES)
def test_samples_are_numpys(count, size):
    rng, state = seeded_rng(count, size), state_of(count, size)
    assert ours(state, "sample", count, size) == numpys(rng, "sample", count, size)
    assert ours(state, "uniform") == numpys(rng, "uniform"), "as many words were drawn"


def test_many_small_integers_are_numpys():
    rng, state = seeded_rng("ids"), state_of("ids")
    assert rng.integers(62, size=(500, 6)).ravel().tolist() == [knot_draws.up_to(state, 61) for _ in range(3000)]
