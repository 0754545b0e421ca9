"""Intervals and tests against independent derivations, published examples and simulated coverage."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.evaluation.intervals import (
    bootstrap_ratio,
    detectable_difference,
    effective_length,
    mcnemar,
    paired_difference,
    wilson,
)


def bisect(function, low, high):
    """Where an increasing function crosses zero."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


def normal_quantile(probability):
    return bisect(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))) - probability, -9, 9)


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 300), share=st.floats(0, 1), confidence=st.floats(0.6, 0.999))
def test_wilson_bounds_solve_the_score_equation(num, share, confidence):
    successes = round(share * num)
    estimate = wilson(successes, num, confidence)
    mean, z = successes / num, normal_quantile(0.5 + confidence / 2)

    def excess(p):  # increasing in |p - mean| on either side of it
        return abs(p - mean) - z * math.sqrt(p * (1 - p) / num)

    low = 0.0 if successes == 0 else bisect(lambda p: -excess(p), 0, mean)
    high = 1.0 if successes == num else bisect(excess, mean, 1)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((mean, low, high), abs=1e-9)


def test_wilson_covers_near_one_where_it_says_so():
    # Exact coverage by summing the binomial: nominal 95 %, 95.7 % at p = 0.9 and n = 20.
    num, p = 20, 0.9
    covered = sum(
        math.comb(num, k) * p**k * (1 - p) ** (num - k)
        for k in range(num + 1)
        if wilson(k, num, 0.95).low <= p <= wilson(k, num, 0.95).high
    )
    assert 0.94 < covered < 0.97
    assert wilson(20, 20, 0.95).low == pytest.approx(0.84, abs=0.005)


def test_paired_difference_equals_the_published_example():
    # Newcombe 1998, Statistics in Medicine 17, 2635-2650, cells 36, 12, 2, 0: method 10 gives 0.0569 to 0.3404.
    estimate = paired_difference(36, 2, 12, 0, 0.95)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    mirrored = paired_difference(36, 12, 2, 0, 0.95)
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))


def test_paired_difference_corrects_a_positive_correlation_for_continuity():
    # Cells 20, 4, 6, 10 by hand: phi = (20 * 10 - 4 * 6 - 40 / 2) / sqrt(24 * 16 * 26 * 14), not 176 over that.
    phi = 156 / math.sqrt(24 * 16 * 26 * 14)
    first, second = wilson(24, 40, 0.95), wilson(26, 40, 0.95)
    down, up = second.mean - second.low, first.high - first.mean
    low = 0.05 - math.sqrt(down**2 - 2 * phi * down * up + up**2)
    assert paired_difference(20, 4, 6, 10, 0.95).low == pytest.approx(low)


def test_paired_difference_has_a_width_where_one_model_gets_all_and_the_other_none():
    estimate = paired_difference(0, 0, 56, 0, 0.95)
    assert estimate.mean == estimate.high == 1.0
    assert 0.85 < estimate.low < 0.95


@pytest.mark.parametrize("cells", [(0.85, 0.03, 0.10, 0.02), (0.3, 0.05, 0.5, 0.15), (0.02, 0.01, 0.9, 0.07)])
def test_paired_difference_covers(cells):
    rng, hits = random.Random(0), 0
    for _ in range(800):
        drawn = rng.choices(range(4), weights=cells, k=56)
        estimate = paired_difference(*(drawn.count(cell) for cell in range(4)), 0.95)
        hits += estimate.low <= cells[2] - cells[1] <= estimate.high
    assert 0.93 <= hits / 800 <= 0.985


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (0, 6), (2, 7), (5, 5), (8, 3)])
def test_mcnemar_equals_the_enumeration_of_all_coin_tosses(only_first, only_second):
    num = only_first + only_second
    distance = abs(only_first - num / 2)
    tosses = list(itertools.product((0, 1), repeat=num))
    extreme = sum(abs(sum(toss) - num / 2) >= distance for toss in tosses)
    assert mcnemar(only_first, only_second) == pytest.approx(extreme / len(tosses))


def test_the_bootstrap_covers_the_true_mean():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(300):
        values = rng.gamma(4.0, 0.5, size=40)  # skewed, mean 2
        estimate = bootstrap_ratio(values, [1.0] * 40, rng, 300, 0.95)
        hits += estimate.low <= 2.0 <= estimate.high
    assert 0.89 <= hits / 300 <= 0.985


def test_the_bootstrap_weighs_tokens_and_resamples_documents():
    rng = np.random.default_rng(0)
    estimate = bootstrap_ratio([10.0, 90.0], [10.0, 30.0], rng, 2000, 0.95)
    assert estimate.mean == pytest.approx(100 / 40)
    assert (estimate.low, estimate.high) == (1.0, 3.0)  # one document or the other, drawn twice


def test_pairing_narrows_the_interval_of_a_difference():
    rng = np.random.default_rng(0)
    base = rng.normal(3, 1, size=30)
    model = base - 0.2 + rng.normal(0, 0.05, size=30)
    ones = [1.0] * 30
    paired = bootstrap_ratio(model - base, ones, np.random.default_rng(1), 1000, 0.95)
    singles = [bootstrap_ratio(x, ones, np.random.default_rng(1), 1000, 0.95) for x in (base, model)]
    assert paired.high < 0
    assert paired.high - paired.low < 0.2 * min(single.high - single.low for single in singles)


def test_the_detectable_difference_is_found_four_times_in_five():
    num, discordant = 300, 0.1
    difference = detectable_difference(num, discordant, 0.95)
    rng, found = random.Random(0), 0
    for _ in range(600):
        up = sum(rng.random() < (discordant + difference) / 2 for _ in range(num))
        down = sum(rng.random() < (discordant - difference) / 2 for _ in range(num))
        found += mcnemar(down, up) < 0.05
    assert 0.72 < found / 600 < 0.88


def test_effective_length_wants_all_shorter_lengths_to_pass():
    assert effective_length([4096, 256, 1024, 512], [0.99, 1.0, 0.5, 0.9], 0.85) == 512
    assert effective_length([256, 512], [0.2, 1.0], 0.85) == 0
    assert effective_length([256, 512], [0.85, 0.85], 0.85) == 512
