"""Puts numbers of a whole data set on one scale, so that parts of a score can be added. float64, numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Scale = Literal["softmax", "ranks", "standardised"]


def softmax(values: np.ndarray) -> np.ndarray:
    """exp(v) / sum exp(v): positive, sums to 1. Over n values their mean is 1/n, whatever the values are."""
    import numpy as np

    powers = np.exp(values - values.max(initial=-np.inf))
    return powers / powers.sum()


def min_max(values: np.ndarray, *, clip_percentile: float = 100.0) -> np.ndarray:
    """(v - min) / (max - min), after values above the percentile were set to it; 0.5 everywhere if all are equal.

    One outlier would otherwise press all others against 0.
    """
    import numpy as np

    clipped = np.minimum(values, np.percentile(values, clip_percentile))
    low, high = clipped.min(), clipped.max()
    return (clipped - low) / (high - low) if high > low else np.full(len(values), 0.5)


def fractional_ranks(values: np.ndarray) -> np.ndarray:
    """The place of each value in ascending order, 0 to 1; equal values share the mean of their places."""
    import numpy as np

    if len(values) < 2:
        return np.full(len(values), 0.5)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((2 * ends - counts - 1) / 2 / (len(values) - 1))[inverse]


def standardise(values: np.ndarray) -> np.ndarray:
    """(v - mean) / standard deviation; 0 everywhere if all are equal."""
    import numpy as np

    # What rounding leaves of equal values is no spread.
    spread = values.std() if values.max() > values.min() else 0.0
    return (values - values.mean()) / spread if spread > 0 else np.zeros(len(values))


def rescale(values: np.ndarray, scale: Scale) -> np.ndarray:
    """The values on the scale of that name."""
    return {"softmax": softmax, "ranks": fractional_ranks, "standardised": standardise}[scale](values)
