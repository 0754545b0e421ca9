"""Intervals and tests for proportions, means and paired differences. Pure functions, seeded by the caller.

Proportions: Wilson (1927), which keeps its coverage near 0 and 1 and at the twenty to sixty samples of a cell, where a
percentile bootstrap covers too little. Two models on the same samples: Newcombe's paired interval (1998, method 10,
built from Wilson's; a bootstrap of differences has no width where one model gets all and the other none) and the
exact McNemar test. Losses and their paired differences: percentile bootstrap over documents, the unit that was sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its interval."""

    mean: float
    low: float
    high: float


def wilson(successes: float, num_samples: int, confidence: float) -> Estimate:
    """Wilson score interval of a proportion: the p for which |p - mean| <= z sqrt(p (1 - p) / n)."""
    mean = successes / num_samples
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    scale = 1 + z * z / num_samples
    centre = (mean + z * z / (2 * num_samples)) / scale
    half = z / scale * math.sqrt(mean * (1 - mean) / num_samples + z * z / (4 * num_samples**2))
    # The bounds are exactly 0 and 1 for no and only successes; rounding must not put them beside the estimate.
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def paired_difference(both: int, only_first: int, only_second: int, neither: int, confidence: float) -> Estimate:
    """Share that the second got right minus share that the first did, with Newcombe's paired interval (method 10)."""
    num = both + only_first + only_second + neither
    first, second = wilson(both + only_first, num, confidence), wilson(both + only_second, num, confidence)
    agreement = both * neither - only_first * only_second
    if agreement > 0:
        agreement = max(agreement - num / 2, 0)
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = agreement / math.sqrt(product) if product else 0.0
    difference = second.mean - first.mean

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return Estimate(
        difference,
        difference - reach(second.mean - second.low, first.high - first.mean),
        difference + reach(second.high - second.mean, first.mean - first.low),
    )


def bootstrap_ratio(
    sums: Sequence[float], weights: Sequence[float], rng: np.random.Generator, num_resamples: int, confidence: float
) -> Estimate:
    """Percentile bootstrap of sum(sums) / sum(weights), resampling clusters (documents).

    Differences of sums over equal weights give the paired interval of a difference of means.
    """
    import numpy as np

    numerators, denominators = np.asarray(sums, float), np.asarray(weights, float)
    drawn = rng.integers(len(numerators), size=(num_resamples, len(numerators)))
    resampled = numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1)
    point = float(numerators.sum() / denominators.sum())
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(point, float(low), float(high))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar p-value from the numbers of pairs that only one of the two got right."""
    num, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(num, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num)


def detectable_difference(num_pairs: int, discordant_fraction: float, confidence: float, power: float = 0.8) -> float:
    """The smallest difference of two paired proportions that a test at this confidence finds with this power.

    Normal approximation with the variance under no difference, `discordant_fraction / num_pairs`.
    """
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + confidence / 2) + normal.inv_cdf(power)
    return min(1.0, z * math.sqrt(discordant_fraction / num_pairs))


def effective_length(lengths: Sequence[int], values: Sequence[float], threshold: float) -> int:
    """The largest length whose value, and that of every shorter length, is at least the threshold; 0 if none is."""
    passed = 0
    for length, value in sorted(zip(lengths, values, strict=True)):
        if value < threshold:
            break
        passed = length
    return passed
