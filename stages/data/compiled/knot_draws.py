"""What is drawn for knots, by NumPy's Philox generator in compiled code.

The draws are those of `numpy.random.Generator(numpy.random.Philox(key=key))`: Philox4x64-10 (Salmon et al., SC 2011,
"Parallel random numbers: as easy as 1, 2, 3") with NumPy's ways to make floats, bounded integers (Lemire 2019, arXiv
1805.10941), permutations and samples of its words. A call of a Generator's method from Python takes microseconds, and
a row of many short documents needs hundreds of draws. Generator and knots are in one file, as numba's cache of compiled
code looks only at the file of the function that is called.

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


@njit(cache=True)
def _cut(state: Any, length: int, hop: int, cumulative: Any, is_equal: bool, ends: Any) -> int:
    """Draw how a document of `length` tokens is cut, and write where its chunks end. Returns how many there are."""
    if hop > 0:
        num_chunks = (length + hop - 1) // hop
        for chunk in range(num_chunks):
            ends[chunk] = min(length, (chunk + 1) * hop)
        return num_chunks
    num_chunks = weighted(state, cumulative) + 1
    if length < num_chunks:
        num_chunks = 1
    if num_chunks > 1 and is_equal:
        for chunk in range(num_chunks - 1):
            ends[chunk] = length // num_chunks * (chunk + 1)
    elif num_chunks > 1:
        cuts = sample(state, length - 1, num_chunks - 1)
        _sort(cuts)
        ends[: num_chunks - 1] = cuts + 1
    ends[num_chunks - 1] = length
    return num_chunks


@njit(cache=True)
def _sort(values: Any) -> None:
    """Sort in place; there are hardly ever more than a few."""
    if len(values) > 32:
        values[:] = np.sort(values)
        return
    for place in range(1, len(values)):
        value, other = values[place], place - 1
        while other >= 0 and values[other] > value:
            values[other + 1] = values[other]
            other -= 1
        values[other + 1] = value


@njit(cache=True)
def _tie(state: Any, counts: Any, preserve_partial_order: bool, slots: Any) -> None:
    """Shuffle the chunks of documents with these many; write the chunk in each slot. The last chunk stays last."""
    num_free = counts.sum() - 1
    shuffled = permutation(state, num_free)
    if preserve_partial_order:
        owners = np.empty(num_free, dtype=np.int64)
        upcoming = np.empty(len(counts), dtype=np.int64)
        place = 0
        for document in range(len(counts)):
            upcoming[document] = place
            for _ in range(min(counts[document], num_free - place)):
                owners[shuffled[place]] = document
                place += 1
        for slot in range(num_free):
            slots[slot] = upcoming[owners[slot]]
            upcoming[owners[slot]] += 1
    else:
        for chunk in range(num_free):
            slots[shuffled[chunk]] = chunk
    slots[num_free] = num_free


@njit(cache=True)
def _take_turns(counts: Any, slots: Any) -> None:
    """Write the chunk in each slot: the first chunk of every document, then the second of those that have one, ..."""
    slot = 0
    for number in range(counts.max()):
        begin = 0
        for count in counts:
            if number < count:
                slots[slot] = begin + number
                slot += 1
            begin += count


@njit(cache=True)
def draw(
    keys: Any,
    row_offsets: Any,
    lengths: Any,
    kind_cumulative: Any,
    chunk_offsets: Any,
    chunk_cumulative: Any,
    hops: Any,
    takes_turns: Any,
    is_equal: bool,
    preserve_partial_order: bool,
    num_characters: int,
    alphabet_size: int,
    first_chunks: Any,
    ends: Any,
    slots: Any,
    characters: Any,
    kinds: Any,
    cut_rows: Any,
) -> int:
    """Decide everything about some rows, each from a random stream of its own.

    Drawn in this order: the row's kind; for each document the number of chunks, unless they are hops, and its cuts;
    the order of all chunks, if any document is cut; the ids, slot by slot.

    Args:
        keys: uint64 `[R, 2]`: of each row's stream.
        row_offsets: int64 `[R + 1]`: where each row's documents begin.
        lengths: int64 `[P]`: of each document, in tokens, its separator included. None is 0.
        kind_cumulative: float64 `[K]`: cumulative shares of the kinds of rows.
        chunk_offsets: int64 `[K + 1]`: where each kind's distribution begins.
        chunk_cumulative: float64: the cumulative distributions of the number of chunks.
        hops: int64 `[K]`: length of chunks, or 0.
        takes_turns: bool `[K]`: the documents take turns instead of a shuffle, and there are no ids.
        is_equal: Cut into chunks of equal lengths.
        preserve_partial_order: Keep each document's chunks in their order.
        num_characters: Of an id; 0: there are none.
        alphabet_size: Different characters.
        first_chunks: int64 `[P + 1]`, written: each document's first chunk.
        ends: int64 `[C]`, written: where each chunk ends in its document.
        slots: int64 `[C]`, written: the chunk in each slot, counted from its row's first.
        characters: uint8 `[C, num_characters]`, written: the id of each slot.
        kinds: int64 `[R]`, written: kind of each row.
        cut_rows: bool `[R]`, written: some document has several chunks.

    Returns:
        How many chunks there are. C must be large enough; the caller knows the most that can be.
    """
    state = np.empty(STATE_WORDS, dtype=np.uint64)
    num_chunks = 0
    first_chunks[0] = 0
    for row in range(len(row_offsets) - 1):
        begin, end, first = row_offsets[row], row_offsets[row + 1], num_chunks
        start(state, keys[row])
        kind = weighted(state, kind_cumulative)
        cumulative = chunk_cumulative[chunk_offsets[kind] : chunk_offsets[kind + 1]]
        for piece in range(begin, end):
            num_chunks += _cut(state, lengths[piece], hops[kind], cumulative, is_equal, ends[num_chunks:])
            first_chunks[piece + 1] = num_chunks
        kinds[row], cut_rows[row] = kind, num_chunks - first > end - begin
        own = slots[first:num_chunks]
        counts = first_chunks[begin + 1 : end + 1] - first_chunks[begin:end]
        if not cut_rows[row]:
            own[:] = np.arange(len(own))
        elif takes_turns[kind]:
            _take_turns(counts, own)
        else:
            _tie(state, counts, preserve_partial_order, own)
        if num_characters and not takes_turns[kind]:
            for slot in range(first, num_chunks):
                for place in range(num_characters):
                    characters[slot, place] = up_to(state, alphabet_size - 1)
    return num_chunks
