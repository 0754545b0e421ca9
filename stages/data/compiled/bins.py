"""Planners' inner loops: which row each document goes into, from lengths alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_LOWEST_BIT = np.zeros(64, dtype=np.int64)
for _bit in range(64):
    _LOWEST_BIT[(int(_DE_BRUIJN) << _bit & (2**64 - 1)) >> 58] = _bit


@njit(cache=True, inline="always")
def _lowest_bit(bits: Any) -> int:
    """The number of the lowest bit that is set; one must be."""
    lowest = bits & (~bits + np.uint64(1))
    return _LOWEST_BIT[np.int64((lowest * _DE_BRUIJN) >> np.uint64(58))]


@njit(cache=True)
def _levels(num_values: int) -> np.ndarray:
    """Where each level of a tree of 64-bit words begins that marks values below `num_values`, and the tree's end."""
    begins = [0]
    width = num_values
    while True:
        width = (width + 63) >> 6
        begins.append(begins[-1] + width)
        if width == 1:
            return np.array(begins)


@njit(cache=True)
def _mark(words: np.ndarray, levels: np.ndarray, value: Any) -> None:
    for level in range(len(levels) - 1):
        words[levels[level] + (value >> 6)] |= np.uint64(1) << np.uint64(value & 63)
        value >>= 6


@njit(cache=True)
def _unmark(words: np.ndarray, levels: np.ndarray, value: Any) -> None:
    for level in range(len(levels) - 1):
        place = levels[level] + (value >> 6)
        words[place] &= ~(np.uint64(1) << np.uint64(value & 63))
        if words[place] != 0:
            return
        value >>= 6


@njit(cache=True)
def _smallest_marked(words: np.ndarray, levels: np.ndarray, least: Any) -> int:
    """The smallest marked value that is `least` or more, -1 if there is none."""
    value = least
    for level in range(len(levels) - 1):
        if levels[level] + (value >> 6) >= levels[level + 1]:
            return -1
        bits = words[levels[level] + (value >> 6)] >> np.uint64(value & 63)
        if bits != 0:
            value += _lowest_bit(bits)
            for below in range(level - 1, -1, -1):
                value = (value << 6) + _lowest_bit(words[levels[below] + value])
            return value
        value = (value >> 6) + 1
    return -1


@njit(cache=True)
def decreasing(lengths: np.ndarray, longest: int) -> np.ndarray:
    """The items from the longest to the shortest, equal ones in their order. None is longer than `longest`."""
    begins = np.zeros(longest + 2, dtype=np.int64)
    for length in lengths:
        begins[longest - length + 1] += 1
    for place in range(1, len(begins)):
        begins[place] += begins[place - 1]
    order = np.empty(len(lengths), dtype=np.int64)
    for item in range(len(lengths)):
        place = longest - lengths[item]
        order[begins[place]] = item
        begins[place] += 1
    return order


@njit(cache=True)
def best_fit(sizes: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each item, where each in turn goes into the fullest row with room for it; and the number of rows.

    Of rows with equal room that takes the item whose room has been so small for the longest time. No size is above
    `capacity`.
    """
    levels = _levels(capacity + 1)
    marked = np.zeros(levels[-1], dtype=np.uint64)
    # The rows with each room, as queues through `behind`.
    first = np.full(capacity + 1, -1, dtype=np.int32)
    last = np.full(capacity + 1, -1, dtype=np.int32)
    behind = np.full(len(sizes), -1, dtype=np.int32)
    rows = np.empty(len(sizes), dtype=np.int32)
    num_rows = 0
    for item in order:
        size = sizes[item]
        room = _smallest_marked(marked, levels, size)
        if room < 0:
            row, room = num_rows, capacity
            num_rows += 1
        else:
            row = first[room]
            first[room] = behind[row]
            behind[row] = -1
            if first[room] < 0:
                _unmark(marked, levels, room)
        rows[item] = row
        left = room - size
        if left > 0:
            if first[left] < 0:
                first[left] = row
                _mark(marked, levels, left)
            else:
                behind[last[left]] = row
            last[left] = row
    return rows, num_rows


@njit(cache=True)
def first_fit(sizes: np.ndarray, order: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The row of each item, where each in turn goes into the first row with room for it; and the number of rows.

    A tree of the largest rooms finds it. No size is above `capacity`.
    """
    # Two neighbouring rows together hold more than one row's worth, or the second would not have been opened.
    most = min(len(sizes), 2 * (sizes.sum() // capacity) + 2)
    leaves = 1
    while leaves < most:
        leaves *= 2
    rooms = np.full(2 * leaves, capacity, dtype=np.int64)
    rows = np.empty(len(sizes), dtype=np.int32)
    num_rows = 0
    for item in order:
        size = sizes[item]
        node = 1
        while node < leaves:
            node *= 2
            if rooms[node] < size:
                node += 1
        rows[item] = node - leaves
        num_rows = max(num_rows, node - leaves + 1)
        rooms[node] -= size
        while node > 1:
            node //= 2
            largest = max(rooms[2 * node], rooms[2 * node + 1])
            if rooms[node] == largest:
                break
            rooms[node] = largest
    return rows, num_rows


@njit(cache=True)
def group(rows: np.ndarray, num_rows: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items of each row in the order they came in: where each row's begin, and the items row after row."""
    offsets = np.zeros(num_rows + 1, dtype=np.int64)
    for row in rows:
        offsets[row + 1] += 1
    for row in range(num_rows):
        offsets[row + 1] += offsets[row]
    filled = offsets[:-1].copy()
    items = np.empty(len(rows), dtype=np.int64)
    for item in order:
        items[filled[rows[item]]] = item
        filled[rows[item]] += 1
    return offsets, items


@njit(cache=True)
def concatenate(
    lengths: np.ndarray, capacity: int, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Items laid end to end, each followed by a separator if there is room, and cut into rows of `capacity`.

    Returns the rows' offsets and the pieces' items, starts, lengths, and whether each ends its item.
    """
    total = 0
    for item in order:
        total += lengths[item] + 1
    most_rows = total // capacity + 1
    most = len(order) + most_rows
    offsets = np.zeros(most_rows + 1, dtype=np.int64)
    items, starts = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.int64)
    taken, ends = np.empty(most, dtype=np.int32), np.empty(most, dtype=np.bool_)
    num_rows = num_pieces = room = 0
    for item in order:
        start = 0
        while start < lengths[item]:
            if room == 0:
                offsets[num_rows] = num_pieces
                num_rows += 1
                room = capacity
            length = min(room, lengths[item] - start)
            items[num_pieces], starts[num_pieces], taken[num_pieces] = item, start, length
            start += length
            ends[num_pieces] = start == lengths[item]
            num_pieces += 1
            # Where there is room left the item has ended, and a separator follows.
            room = max(0, room - length - 1)
    offsets[num_rows] = num_pieces
    return (
        offsets[: num_rows + 1],
        items[:num_pieces],
        starts[:num_pieces],
        taken[:num_pieces],
        ends[:num_pieces],
    )
