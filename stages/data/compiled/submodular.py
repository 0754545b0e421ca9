"""Inner loops of selection by similarity: cosines, facility location, graph cut.

Sums run over the entries in their order, one number after the other, so that the bits, and with them the choice between
equals, are the same on every machine; a BLAS would give other last bits on another processor.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_TILE = 256  # Columns at a time: 256 columns of 1024 dimensions fill 1 MiB, which a core's cache holds.


@njit(cache=True)
def unit_rows(vectors: np.ndarray, lengths: np.ndarray) -> None:
    """Divide the rows of `vectors` (float32 [n, d]) by their lengths, which are written to `lengths` (float64 [n]).

    A row of length 0 stays as it is.
    """
    for row in range(vectors.shape[0]):
        total = 0.0
        for entry in vectors[row]:
            total += np.float64(entry) * np.float64(entry)
        lengths[row] = np.sqrt(total)
        if total > 0:
            for place in range(vectors.shape[1]):
                vectors[row, place] = np.float32(vectors[row, place] / lengths[row])


@njit(cache=True)
def add_rows(vectors: np.ndarray, groups: np.ndarray, sums: np.ndarray) -> None:
    """Add each row of `vectors` (float32 [n, d]) to the row of `sums` (float64 [g, d]) that `groups` names."""
    for row in range(vectors.shape[0]):
        for place in range(vectors.shape[1]):
            sums[groups[row], place] += vectors[row, place]


@njit(cache=True)
def products(rows: np.ndarray, columns: np.ndarray, out: np.ndarray) -> None:
    """`out` = `rows` [a, d] times `columns` [d, b], all float32."""
    for begin in range(0, columns.shape[1], _TILE):
        end = min(begin + _TILE, columns.shape[1])
        for row in range(rows.shape[0]):
            sums = np.zeros(end - begin, dtype=np.float32)
            for place in range(rows.shape[1]):
                factor = rows[row, place]
                column = columns[place, begin:end]
                for number in range(end - begin):
                    sums[number] += factor * column[number]
            out[row, begin:end] = sums


@njit(cache=True)
def keep_distinct(similar: np.ndarray, dropped: np.ndarray, limit: float, room: int) -> int:
    """Walk a block in order and drop what is too like one that was kept in it.

    Args:
        similar: float32 [a, a], the similarities inside the block.
        dropped: bool [a], True for what is too like one kept before the block; more are set here.
        limit: The similarity that may not be exceeded.
        room: How many may be kept.

    Returns how many were walked over: fewer than all once `room` are kept.
    """
    kept = 0
    for number in range(len(dropped)):
        if kept == room:
            return number
        for earlier in range(number):
            if not dropped[number] and not dropped[earlier] and similar[number, earlier] > limit:
                dropped[number] = True
        if not dropped[number]:
            kept += 1
    return len(dropped)


@njit(cache=True)
def _gain(kernel: np.ndarray, covered: np.ndarray, candidate: int) -> float:
    """What a candidate adds to how well everything is covered. Rounding never makes it grow as `covered` grows."""
    total = 0.0
    for number in range(kernel.shape[0]):
        more = np.float64(kernel[candidate, number]) - covered[number]
        if more > 0:
            total += more
    return total


@njit(cache=True, inline="always")
def _before(bounds: np.ndarray, one: int, other: int) -> bool:
    return bounds[one] > bounds[other] or (bounds[one] == bounds[other] and one < other)


@njit(cache=True)
def _sink(heap: np.ndarray, size: int, bounds: np.ndarray, place: int) -> None:
    """Let the entry at `place` of a heap (best first) down to where it belongs."""
    item = heap[place]
    while True:
        below = 2 * place + 1
        if below >= size:
            break
        if below + 1 < size and _before(bounds, heap[below + 1], heap[below]):
            below += 1
        if not _before(bounds, heap[below], item):
            break
        heap[place] = heap[below]
        place = below
    heap[place] = item


@njit(cache=True)
def facility_location(kernel: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Greedy maximum of sum_i max(0, max_{j chosen} kernel[j, i]), by lazy evaluation (Minoux).

    `kernel` is float32 [n, n]. Returns the chosen in order, their gains, and how many gains were computed. Equal gains
    go to the smaller number, as in the plain greedy algorithm: a stale gain is never too small.
    """
    size = kernel.shape[0]
    covered = np.zeros(size, dtype=np.float64)
    bounds = np.empty(size, dtype=np.float64)
    heap = np.arange(size)
    for number in range(size):
        bounds[number] = _gain(kernel, covered, number)
    for place in range(size // 2 - 1, -1, -1):
        _sink(heap, size, bounds, place)
    fresh = np.zeros(size, dtype=np.int64)
    chosen = np.empty(budget, dtype=np.int64)
    gains = np.empty(budget, dtype=np.float64)
    evaluations = size
    for turn in range(budget):
        while fresh[heap[0]] != turn:
            top = heap[0]
            bounds[top] = _gain(kernel, covered, top)
            fresh[top] = turn
            evaluations += 1
            _sink(heap, size, bounds, 0)
        best = heap[0]
        chosen[turn], gains[turn] = best, bounds[best]
        for number in range(kernel.shape[0]):
            covered[number] = max(covered[number], np.float64(kernel[best, number]))
        size -= 1
        heap[0] = heap[size]
        if size:
            _sink(heap, size, bounds, 0)
    return chosen, gains, evaluations


@njit(cache=True)
def graph_cut(kernel: np.ndarray, budget: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Greedy maximum of sum_{i, j chosen} kernel[i, j] - penalty * sum_{j, k chosen} kernel[j, k].

    `kernel` is float32 [n, n], symmetric. All gains are kept up to date, which costs n operations a choice: as cheap as
    lazy evaluation, and right where cosines are negative and a stale gain is no bound. Equal gains go to the smaller
    number. Returns the chosen in order and their gains.
    """
    size = kernel.shape[0]
    open_gains = np.empty(size, dtype=np.float64)
    for number in range(size):
        total = 0.0
        for other in range(size):
            total += kernel[number, other]
        open_gains[number] = total - penalty * kernel[number, number]
    chosen = np.empty(budget, dtype=np.int64)
    gains = np.empty(budget, dtype=np.float64)
    for turn in range(budget):
        best = 0
        for number in range(size):
            if open_gains[number] > open_gains[best]:
                best = number
        chosen[turn], gains[turn] = best, open_gains[best]
        for number in range(size):
            open_gains[number] -= 2 * penalty * kernel[best, number]
        open_gains[best] = -np.inf
    return chosen, gains
