"""Which piece of which document goes into which row: planners that see lengths only.

`best_fit` is best-fit decreasing (Ding et al., 2024, arXiv 2404.10830, algorithm 1 and appendix B): no document is cut
unless it is longer than a row. The paper finds the fullest row that still has room with a segment tree over
capacities; here two levels of bit sets answer the same question in two shifts, and give the same rows. Rows with equal
room are taken first in, first out.
`concatenate` lays documents end to end and cuts at each row's end.

In both, the end of a document takes one position more, for its separator, unless the row is full without it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WORD_BITS = 1024


class Piece(NamedTuple):
    """A run of one document's tokens."""

    document: int
    start: int
    num_tokens: int
    is_end: bool
    """The document's last token is in it, so a separator follows."""


Plan = list[list[Piece]]
"""The pieces of each row, in order."""


class RoomIndex:
    """The set of rooms that some row has left, and the smallest of them that is large enough."""

    def __init__(self, capacity: int) -> None:
        self._words = [0] * (capacity // WORD_BITS + 1)
        self._nonempty = 0

    def add(self, room: int) -> None:
        """Put a room into the set."""
        word, bit = divmod(room, WORD_BITS)
        self._words[word] |= 1 << bit
        self._nonempty |= 1 << word

    def discard(self, room: int) -> None:
        """Take a room out of the set."""
        word, bit = divmod(room, WORD_BITS)
        self._words[word] &= ~(1 << bit)
        if not self._words[word]:
            self._nonempty &= ~(1 << word)

    def at_least(self, size: int) -> int | None:
        """The smallest room that is `size` or more, None if there is none."""
        word, bit = divmod(size, WORD_BITS)
        if inside := self._words[word] >> bit:
            return size + _lowest_bit(inside)
        if not (above := self._nonempty >> (word + 1)):
            return None
        word += 1 + _lowest_bit(above)
        return word * WORD_BITS + _lowest_bit(self._words[word])


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def cut_long(lengths: Sequence[int], capacity: int) -> tuple[Plan, list[Piece]]:
    """Cut documents of `capacity` tokens or more into full rows. Returns those rows, and what is left of each document.

    Documents without tokens leave nothing.
    """
    full: Plan = []
    rest: list[Piece] = []
    for document, length in enumerate(lengths):
        start = 0
        while length - start >= capacity:
            full.append([Piece(document, start, capacity, start + capacity == length)])
            start += capacity
        if start < length:
            rest.append(Piece(document, start, length - start, True))
    return full, rest


def best_fit(lengths: Sequence[int], capacity: int) -> Plan:
    """Pack documents of these lengths, in tokens, into rows of `capacity` tokens, best fit in decreasing length.

    Documents of a row or more are first cut into full rows; what is left of them is packed with the others.
    """
    full, rest = cut_long(lengths, capacity)
    bins: Plan = []
    waiting: dict[int, deque[int]] = {}
    rooms = RoomIndex(capacity)
    for piece in sorted(rest, key=lambda piece: -piece.num_tokens):
        size = min(piece.num_tokens + 1, capacity)
        room = rooms.at_least(size)
        if room is None:
            chosen, room = len(bins), capacity
            bins.append([])
        else:
            chosen = waiting[room].popleft()
            if not waiting[room]:
                rooms.discard(room)
        bins[chosen].append(piece)
        if left := room - size:
            waiting.setdefault(left, deque()).append(chosen)
            rooms.add(left)
    return full + bins


def concatenate(lengths: Sequence[int], capacity: int, order: Iterable[int]) -> Plan:
    """Lay documents end to end in `order` and cut into rows of `capacity` tokens. Only the last row may have room."""
    plan: Plan = []
    room = 0
    for document in order:
        start = 0
        while start < lengths[document]:
            if room == 0:
                plan.append([])
                room = capacity
            taken = min(room, lengths[document] - start)
            plan[-1].append(Piece(document, start, taken, start + taken == lengths[document]))
            start += taken
            # Where there is room left the document has ended, and a separator follows.
            room = max(0, room - taken - 1)
    return plan


def room_left(pieces: Iterable[Piece], capacity: int) -> int:
    """Positions of a row that its pieces and their separators leave free."""
    return max(0, capacity - sum(piece.num_tokens + piece.is_end for piece in pieces))
