"""Inner loops of the walks through a neighbour graph: documents that no row has yet, and rows filled from document to
document.

Random numbers come from a counter of 64 bits (splitmix64), so that a walk gives the same bits on every machine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

DONE, ASK = 0, 1
"""What `splice_rows` returns: no document is left, or it needs the answer of a masked query."""

FROM_QUERY, AT_RANDOM = -1, -2
"""Ranks of edges that no list made in advance has."""

IDENTITY, SHUFFLE, REVERSE = 0, 1, 2

(
    NUM_ROWS,
    NUM_PIECES,
    NUM_EDGES,
    FIRST_EDGE,
    SIZE,
    NUM_CHOSEN,
    HEAD,
    WANTED,
    DECIDED,
    NUM_ANSWERS,
    NUM_ROOTS,
    NUM_LOOKUPS,
    NUM_REQUERIES,
    NUM_TRIMMED,
    NUM_STATES,
) = range(15)
"""Places in the state of `splice_rows`."""


class Unused(NamedTuple):
    """The documents, or what is left of them, that no row has."""

    lengths: np.ndarray
    """int64 `[n]`: tokens of each whole document."""
    starts: np.ndarray
    """int64 `[n]`: the first token not yet placed."""
    mask: np.ndarray
    """bool `[n]`: true for those that can be taken."""
    order: np.ndarray
    """int32 `[n]`: a random permutation. Used documents in it are skipped when they come up, and as what is taken never
    depends on what is still to come, the next unused one is uniformly random among them, at no cost a document."""
    passed: np.ndarray
    """bool `[n]`: true for those that the cursor went past."""
    counters: np.ndarray
    """int64 `[2]`: the cursor in `order`, and how many documents are unused."""
    random: np.ndarray
    """uint64 `[1]`: the random numbers' counter."""


class Rows(NamedTuple):
    """Where `splice_rows` writes: pieces of rows, and the edges between documents."""

    ends: np.ndarray
    """int64 `[rows]`: the pieces of each row and those before it."""
    documents: np.ndarray
    starts: np.ndarray
    num_tokens: np.ndarray
    is_end: np.ndarray
    edge_rows: np.ndarray
    parents: np.ndarray
    children: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    last_rows: np.ndarray
    """int32 `[n]`: the last row that got a piece of each document, -1 before."""


@njit(cache=True)
def next_random(counter: np.ndarray) -> int:
    """A uniform number below 2^53."""
    counter[0] += np.uint64(0x9E3779B97F4A7C15)
    bits = counter[0]
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    return int(bits >> np.uint64(11))


@njit(cache=True)
def draw(unused: Unused) -> int:
    """An unused document, uniformly; -1 if there is none. It is not yet taken."""
    cursor, found = int(unused.counters[0]), -1
    while cursor < len(unused.order) and found < 0:
        document = unused.order[cursor]
        unused.passed[document] = True
        cursor += 1
        if unused.mask[document]:
            found = int(document)
    unused.counters[0] = cursor
    return found


@njit(cache=True)
def take(unused: Unused, document: int) -> int:
    """Take a document out. Returns the tokens left of it."""
    unused.mask[document] = False
    unused.counters[1] -= 1
    return unused.lengths[document] - unused.starts[document]


@njit(cache=True)
def put_back(unused: Unused, document: int, start: int) -> None:
    """Put back what is left of a document from `start` on."""
    unused.mask[document] = True
    unused.starts[document] = start
    unused.counters[1] += 1
    if unused.passed[document]:
        # At a uniformly random place of what is still to come, whose order so stays uniformly random.
        unused.passed[document] = False
        unused.counters[0] -= 1
        cursor = unused.counters[0]
        place = cursor + next_random(unused.random) % (len(unused.order) - cursor)
        unused.order[cursor] = unused.order[place]
        unused.order[place] = document


@njit(cache=True)
def nearest(unused: Unused, candidates: np.ndarray, room: int, max_overflow: int) -> int:
    """The place of the first unused candidate; with `max_overflow` >= 0, if there is one, of the first whose tokens
    exceed `room` by no more than that. -1 if all are used."""
    first = -1
    for place in range(len(candidates)):
        document = candidates[place]
        if document < 0:
            break
        if unused.mask[document]:
            if max_overflow < 0 or unused.lengths[document] - unused.starts[document] - room <= max_overflow:
                return place
            if first < 0:
                first = place
    return first


@njit(cache=True)
def splice_rows(
    unused: Unused,
    neighbours: np.ndarray,
    scores: np.ndarray,
    capacity: int,
    k: int,
    order: int,
    max_overflow: int,
    min_remainder: int,
    noise: float,
    chosen: np.ndarray,
    answers: np.ndarray,
    answer_scores: np.ndarray,
    state: np.ndarray,
    rows: Rows,
) -> int:
    """Fill rows until no document is left (DONE) or a document's list is used up (ASK).

    Then the caller asks for the `state[WANTED]` or more nearest unused documents of `chosen[state[HEAD] - 1]`, writes
    them to `answers`, their number to `state[NUM_ANSWERS]`, and calls again.

    Args:
        unused: What there is to place; changed.
        neighbours: int32 `[n, k']`: best first, -1 behind the last.
        scores: float32 `[n, k']`.
        capacity: Positions of a row, at least 1.
        k: How many documents each brings in.
        order: IDENTITY, SHUFFLE or REVERSE.
        max_overflow: See `nearest`; below 0 the nearest is taken whatever its length.
        min_remainder: Shorter tails of cut documents are trimmed.
        noise: Probability that a document brought in is a random one instead.
        chosen: int32 `[n]`, scratch: the documents of the row being filled, and the queue of those to expand.
        answers: int32, best first.
        answer_scores: float32.
        state: int64 `[NUM_STATES]`, 0 at first but NUM_ANSWERS -1.
        rows: Written.
    """
    while True:
        while state[SIZE] < capacity or state[WANTED] > 0:
            if state[WANTED] == 0:
                if state[HEAD] < state[NUM_CHOSEN]:
                    state[HEAD] += 1
                    state[WANTED] = k
                    state[NUM_LOOKUPS] += 1
                    continue
                root = draw(unused)
                if root < 0:
                    break
                state[NUM_ROOTS] += 1
                _choose(unused, chosen, state, root)
                continue
            if unused.counters[1] == 0:
                state[WANTED], state[NUM_ANSWERS] = 0, -1
                break
            parent = chosen[state[HEAD] - 1]
            child, rank, score = -1, AT_RANDOM, np.float32(0)
            if not state[DECIDED] and noise > 0 and next_random(unused.random) < noise * 2.0**53:
                child = draw(unused)
            else:
                room = capacity - state[SIZE]
                rank = nearest(unused, neighbours[parent], room, max_overflow)
                if rank >= 0:
                    child, score = neighbours[parent, rank], scores[parent, rank]
                elif state[NUM_ANSWERS] < 0:
                    state[DECIDED] = 1
                    state[NUM_REQUERIES] += 1
                    return ASK
                else:
                    place = nearest(unused, answers[: state[NUM_ANSWERS]], room, max_overflow)
                    if place >= 0:
                        child, rank, score = answers[place], FROM_QUERY, answer_scores[place]
            state[DECIDED] = 0
            state[WANTED] -= 1
            if child < 0:
                state[WANTED] = 0
            else:
                _choose(unused, chosen, state, child)
                edge = state[NUM_EDGES]
                rows.parents[edge], rows.children[edge] = parent, child
                rows.ranks[edge], rows.scores[edge] = rank, score
                state[NUM_EDGES] += 1
            if state[WANTED] == 0:
                state[NUM_ANSWERS] = -1
        if state[NUM_CHOSEN] == 0:
            return DONE
        _finish_row(unused, chosen[: state[NUM_CHOSEN]], state, rows, capacity, order, min_remainder)


@njit(cache=True)
def _choose(unused: Unused, chosen: np.ndarray, state: np.ndarray, document: int) -> None:
    """Add a document to the row."""
    state[SIZE] += take(unused, document) + 1
    chosen[state[NUM_CHOSEN]] = document
    state[NUM_CHOSEN] += 1


@njit(cache=True)
def _finish_row(
    unused: Unused, chosen: np.ndarray, state: np.ndarray, rows: Rows, capacity: int, order: int, min_remainder: int
) -> None:
    """Order the chosen documents, cut them to the row, put back what is left, keep the edges of those placed."""
    if order == REVERSE:
        chosen[:] = chosen[::-1].copy()
    elif order == SHUFFLE:
        for last in range(len(chosen) - 1, 0, -1):
            place = next_random(unused.random) % (last + 1)
            chosen[last], chosen[place] = chosen[place], chosen[last]
    row, room, piece = state[NUM_ROWS], capacity, state[NUM_PIECES]
    for document in chosen:
        start = unused.starts[document]
        left = unused.lengths[document] - start
        taken = min(room, left)
        if taken == 0:
            put_back(unused, document, int(start))
            continue
        left -= taken
        rows.documents[piece], rows.starts[piece] = document, start
        rows.num_tokens[piece], rows.is_end[piece] = taken, left == 0
        rows.last_rows[document] = row
        piece += 1
        room -= min(room, taken + (left == 0))
        if left >= min_remainder:
            put_back(unused, document, int(start + taken))
        else:
            state[NUM_TRIMMED] += left
    rows.ends[row] = state[NUM_PIECES] = piece
    _keep_edges(rows, state, row)
    state[NUM_ROWS] += 1
    state[SIZE] = state[NUM_CHOSEN] = state[HEAD] = 0


@njit(cache=True)
def _keep_edges(rows: Rows, state: np.ndarray, row: int) -> None:
    """Drop the row's edges whose child got no place in it."""
    kept = state[FIRST_EDGE]
    for edge in range(state[FIRST_EDGE], state[NUM_EDGES]):
        if rows.last_rows[rows.children[edge]] == row:
            rows.edge_rows[kept] = row
            rows.parents[kept], rows.children[kept] = rows.parents[edge], rows.children[edge]
            rows.ranks[kept], rows.scores[kept] = rows.ranks[edge], rows.scores[edge]
            kept += 1
    state[NUM_EDGES] = state[FIRST_EDGE] = kept


@njit(cache=True)
def path_by_degree(
    neighbours: np.ndarray, mask: np.ndarray, starts: np.ndarray, path: np.ndarray, is_start: np.ndarray
) -> int:
    """Walk to the first unseen neighbour; where all are seen, go on at the first unseen document of `starts`.

    Args:
        neighbours: int32 `[n, k]`: best first, -1 behind the last.
        mask: bool `[n]`: the documents to visit; false for all of them afterwards.
        starts: int32 `[n]`: all documents, in the order in which paths start.
        path: int32 `[n]`, written.
        is_start: bool `[n]`, written: the document of `path` was not walked to.

    Returns:
        The length of the path.
    """
    visited = 0
    for start in starts:
        document, fresh = start, True
        while document >= 0 and mask[document]:
            mask[document] = False
            path[visited], is_start[visited] = document, fresh
            visited += 1
            fresh = False
            following = -1
            for other in neighbours[document]:
                if other < 0:
                    break
                if mask[other]:
                    following = other
                    break
            document = following
    return visited


@njit(cache=True)
def degrees(neighbours: np.ndarray) -> np.ndarray:
    """int64 `[n]`: with how many documents each shares an edge, in either direction."""
    found = np.zeros(len(neighbours), np.int64)
    for document in range(len(neighbours)):
        for other in neighbours[document]:
            if other < 0:
                break
            found[document] += 1
            # An edge that goes both ways is counted by the end that lists it.
            is_mutual = False
            for back in neighbours[other]:
                if back == document:
                    is_mutual = True
                    break
            if not is_mutual:
                found[other] += 1
    return found
