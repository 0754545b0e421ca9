"""Connected components of pairs, by union-find. The result does not depend on the order of the pairs."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def unite(roots: np.ndarray, pairs: np.ndarray) -> None:
    """Join the components of each pair `[k, 2]` in `roots` `[n]` int64, which begins as `arange(n)`.

    The root of a component is its smallest number, so every entry points to a number that is not larger.
    """
    for index in range(len(pairs)):
        left, right = pairs[index, 0], pairs[index, 1]
        while roots[left] != left:
            roots[left] = roots[roots[left]]
            left = roots[left]
        while roots[right] != right:
            roots[right] = roots[roots[right]]
            right = roots[right]
        if left < right:
            roots[right] = left
        else:
            roots[left] = right


@njit(cache=True)
def flatten(roots: np.ndarray) -> None:
    """Let every number point straight to the smallest of its component."""
    for number in range(len(roots)):
        roots[number] = roots[roots[number]]


@njit(cache=True)
def largest_members(roots: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[n]: for each number the largest of its component by `sizes`, of equal ones the first. `roots` is flat."""
    best = np.arange(len(roots))
    for number in range(len(roots)):
        root = roots[number]
        if sizes[number] > sizes[best[root]]:
            best[root] = number
    for number in range(len(roots) - 1, -1, -1):
        best[number] = best[roots[number]]
    return best
