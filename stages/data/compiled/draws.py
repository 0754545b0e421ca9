"""NumPy's Philox generator for compiled code: the same draws as `numpy.random.Generator(numpy.random.Philox(key=key))`.

Philox4x64-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3") with NumPy's ways to make
floats, bounded integers (Lemire 2019, arXiv 1805.10941), permutations and samples of its words. A call of a Generator's
method from Python takes microseconds; a row of many short documents needs hundreds of draws.

`state` is uint64 `[13]`: the key (2), the counter (4), the block that is being read (4), how many words of it were
read, whether half a word is left, and that half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

STATE_WORDS = 13
_COUNTER, _BLOCK, _READ, _HAS_HALF, _HALF = 2, 6, 10, 11, 12
_MULTIPLIERS = (np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157))
_WEYL = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B))
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_BITS = np.uint64(32)
_ONE, _ZERO, _FOUR = np.uint64(1), np.uint64(0), np.uint64(4)


@njit(cache=True)
def start(state: np.ndarray, key: np.ndarray) -> None:
    """Begin the stream of a key, uint64 `[2]`."""
    state[:] = _ZERO
    state[0], state[1] = key[0], key[1]
    state[_READ] = _FOUR


@njit(cache=True, inline="always")
def _high_half(a: np.uint64, b: np.uint64) -> np.uint64:
    """The upper 64 bits of a product."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _BITS, b & _LOW, b >> _BITS
    middle = a_high * b_low + ((a_low * b_low) >> _BITS)
    other = a_low * b_high + (middle & _LOW)
    return a_high * b_high + (middle >> _BITS) + (other >> _BITS)


@njit(cache=True)
def _next_block(state: np.ndarray) -> None:
    for word in range(_COUNTER, _BLOCK):
        state[word] += _ONE
        if state[word] != _ZERO:
            break
    key0, key1 = state[0], state[1]
    a, b, c, d = state[_COUNTER], state[_COUNTER + 1], state[_COUNTER + 2], state[_COUNTER + 3]
    for _ in range(_ROUNDS):
        high0, low0 = _high_half(_MULTIPLIERS[0], a), _MULTIPLIERS[0] * a
        high1, low1 = _high_half(_MULTIPLIERS[1], c), _MULTIPLIERS[1] * c
        a, b, c, d = high1 ^ b ^ key0, low1, high0 ^ d ^ key1, low0
        key0 += _WEYL[0]
        key1 += _WEYL[1]
    state[_BLOCK], state[_BLOCK + 1], state[_BLOCK + 2], state[_BLOCK + 3] = a, b, c, d
    state[_READ] = _ZERO


@njit(cache=True)
def _word(state: np.ndarray) -> np.uint64:
    if state[_READ] == _FOUR:
        _next_block(state)
    found = state[_BLOCK + np.int64(state[_READ])]
    state[_READ] += _ONE
    return found


@njit(cache=True)
def _half_word(state: np.ndarray) -> np.uint64:
    if state[_HAS_HALF] != _ZERO:
        state[_HAS_HALF] = _ZERO
        return state[_HALF]
    found = _word(state)
    state[_HAS_HALF], state[_HALF] = _ONE, found >> _BITS
    return found & _LOW


@njit(cache=True)
def uniform(state: np.ndarray) -> float:
    """`random()`: a float in [0, 1)."""
    return np.float64(_word(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True)
def up_to(state: Any, largest: int) -> Any:
    """`integers(largest + 1)`: a whole number from 0 to `largest`, which is below 2**32 - 1."""
    if largest == 0:
        return 0
    count = np.uint64(largest) + _ONE
    product = _half_word(state) * count
    if product & _LOW < count:
        threshold = (_LOW - np.uint64(largest)) % count
        while product & _LOW < threshold:
            product = _half_word(state) * count
    return np.int64(product >> _BITS)


@njit(cache=True)
def weighted(state: Any, cumulative: Any) -> Any:
    """`choice(len(p), p=p)`, where `cumulative` is the normalised cumulative sum of p."""
    return np.searchsorted(cumulative, uniform(state), side="right")


@njit(cache=True)
def permutation(state: np.ndarray, count: int) -> np.ndarray:
    """`permutation(count)`: it draws bounded integers in another way than `integers`, under a mask."""
    values = np.arange(count)
    mask = np.uint64(1)
    while mask < count:
        mask = (mask << _ONE) | _ONE
    for place in range(count - 1, 0, -1):
        while (mask >> _ONE) >= place:
            mask >>= _ONE
        other = _half_word(state) & mask
        while other > place:
            other = _half_word(state) & mask
        values[place], values[other] = values[other], values[place]
    return values


@njit(cache=True)
def _shuffle(state: np.ndarray, values: np.ndarray, first: int) -> None:
    """Exchange each value, from the last to number `first`, with one at or before it."""
    for place in range(len(values) - 1, first - 1, -1):
        other = up_to(state, place)
        values[place], values[other] = values[other], values[place]


@njit(cache=True)
def sample(state: np.ndarray, count: int, size: int) -> np.ndarray:
    """`choice(count, size=size, replace=False)`: distinct whole numbers below `count`."""
    if count > 10_000 and size > count // 50:
        values = np.arange(count)
        _shuffle(state, values, max(count - size, 1))
        return values[count - size :]
    return _few(state, count, size) if size <= 16 else _many(state, count, size)


@njit(cache=True)
def _few(state: np.ndarray, count: int, size: int) -> np.ndarray:
    """Floyd's algorithm: a number that was drawn before becomes the largest that it could have been."""
    values = np.empty(size, dtype=np.int64)
    for place in range(size):
        values[place] = up_to(state, count - size + place)
        for other in range(place):
            if values[other] == values[place]:
                values[place] = count - size + place
                break
    _shuffle(state, values, 1)
    return values


@njit(cache=True)
def _many(state: np.ndarray, count: int, size: int) -> np.ndarray:
    """The same with a set."""
    values = np.empty(size, dtype=np.int64)
    seen = {np.int64(-1)}
    for place in range(size):
        values[place] = up_to(state, count - size + place)
        if values[place] in seen:
            values[place] = count - size + place
        seen.add(values[place])
    _shuffle(state, values, 1)
    return values
