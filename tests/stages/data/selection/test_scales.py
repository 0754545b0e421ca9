import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from ropewalk.stages.data.selection.scales import fractional_ranks, min_max, rescale, softmax, standardise

numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30).map(np.asarray)


@given(numbers)
@settings(deadline=None, max_examples=50)
def test_every_scale_keeps_the_order(values):
    order = np.argsort(values, kind="stable")
    for name in ("softmax", "ranks", "standardised"):
        scaled = rescale(values, name)
        assert np.isfinite(scaled).all() and (np.diff(scaled[order]) >= 0).all()
    assert softmax(values).sum() == pytest.approx(1)
    np.testing.assert_allclose(fractional_ranks(values), (rankdata(values) - 1) / (len(values) - 1))


def test_an_outlier_is_clipped_before_min_max():
    values = np.asarray([*range(1, 100), 1e9])
    assert min_max(values)[:99].max() < 1e-6
    clipped = min_max(values, clip_percentile=90)
    assert clipped[0] == 0 and clipped[45] == pytest.approx(0.5, abs=0.02) and clipped[95] == clipped[99] == 1


def test_equal_values_are_no_division_by_zero():
    same = np.full(3, 0.1 + 0.2)
    assert min_max(same).tolist() == [0.5] * 3
    assert standardise(same).tolist() == [0.0] * 3
    assert fractional_ranks(same).tolist() == [0.5] * 3
    assert fractional_ranks(np.ones(1)).tolist() == [0.5]


def test_softmax_does_not_overflow():
    assert softmax(np.asarray([1e5, 0.0])).tolist() == [1.0, 0.0]
