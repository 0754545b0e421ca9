"""Which piece of which document goes into which row: planners that see lengths only.

`best_fit` is best-fit decreasing (Ding et al., 2024, arXiv 2404.10830, algorithm 1 and appendix B): no document is cut
unless it is longer than a row. The paper finds the fullest row that still has room with a segment tree over
capacities; here a tree of 64-bit words answers the same question, and gives the same rows. Rows with equal room are
taken first in, first out, as in OLMo-core's `InstancePacker`.
`first_fit` takes documents in a given order and puts each into the first row with room: a segment tree over rows.
`concatenate` lays documents end to end and cuts at each row's end.

In all, the end of a document takes one position more, for its separator, unless the row is full without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

MAX_DOCUMENTS = 2**31 - 1


class Piece(NamedTuple):
    """A run of one document's tokens."""

    document: int
    start: int
    num_tokens: int
    is_end: bool
    """The document's last token is in it, so a separator follows."""


@dataclass(frozen=True)
class RowPlan:
    """The pieces of all rows, row after row."""

    row_offsets: np.ndarray
    """int64 `[num_rows + 1]`: where each row's pieces begin."""
    documents: np.ndarray
    """int32 `[num_pieces]`."""
    starts: np.ndarray
    """int64 `[num_pieces]`: tokens into the document."""
    num_tokens: np.ndarray
    """int32 `[num_pieces]`."""
    is_end: np.ndarray
    """bool `[num_pieces]`: the document's last token is in it, so a separator follows, if there is room."""

    @property
    def num_rows(self) -> int:
        """Rows, those without pieces included."""
        return len(self.row_offsets) - 1

    def rows(self, selection: np.ndarray | Sequence[int]) -> RowPlan:
        """The rows of these numbers, in that order."""
        import numpy as np

        selection = np.asarray(selection, dtype=np.int64)
        begins, counts = self.row_offsets[selection], np.diff(self.row_offsets)[selection]
        offsets = _offsets(counts)
        pieces = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        return RowPlan(
            offsets, self.documents[pieces], self.starts[pieces], self.num_tokens[pieces], self.is_end[pieces]
        )

    def tokens(self) -> np.ndarray:
        """int64 `[num_rows]`: tokens of documents in each row."""
        return self._sums(self.num_tokens)

    def room(self, capacity: int) -> np.ndarray:
        """int64 `[num_rows]`: positions that the pieces of a row of `capacity` and their separators leave free."""
        import numpy as np

        return np.maximum(0, capacity - self._sums(self.num_tokens + self.is_end))

    def _sums(self, values: np.ndarray) -> np.ndarray:
        sums = _offsets(values)
        return sums[self.row_offsets[1:]] - sums[self.row_offsets[:-1]]

    @classmethod
    def concatenate(cls, plans: Sequence[RowPlan]) -> RowPlan:
        """The rows of all plans, one plan after the other."""
        import numpy as np

        plans = [cls.from_rows([]), *plans]
        counts = np.concatenate([np.diff(plan.row_offsets) for plan in plans])
        names = ("documents", "starts", "num_tokens", "is_end")
        return cls(_offsets(counts), *(np.concatenate([getattr(plan, name) for plan in plans]) for name in names))

    @classmethod
    def from_rows(cls, rows: Iterable[Iterable[Piece]]) -> RowPlan:
        """The plan of rows that are lists of pieces."""
        listed = [list(row) for row in rows]
        columns = list(zip(*(piece for row in listed for piece in row), strict=True)) or [(), (), (), ()]
        return cls.from_columns(_offsets([len(row) for row in listed]), *columns)

    @classmethod
    def from_columns(cls, row_offsets: Any, documents: Any, starts: Any, num_tokens: Any, is_end: Any) -> RowPlan:
        """The plan of these columns, which need not have its types yet."""
        import numpy as np

        return cls(
            np.asarray(row_offsets, np.int64),
            np.asarray(documents, np.int32),
            np.asarray(starts, np.int64),
            np.asarray(num_tokens, np.int32),
            np.asarray(is_end, np.bool_),
        )

    def to_rows(self) -> list[list[Piece]]:
        """Each row as a list of pieces."""
        columns = (self.documents, self.starts, self.num_tokens, self.is_end)
        pieces = [Piece(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
        return [pieces[begin:end] for begin, end in pairwise(self.row_offsets.tolist())]


def _offsets(counts: Any) -> np.ndarray:
    import numpy as np

    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def cut_long(lengths: Any, capacity: int) -> tuple[RowPlan, np.ndarray, np.ndarray]:
    """Cut documents of `capacity` tokens or more into full rows, in the documents' order.

    Returns those rows; and of the rests, which are shorter than a row: their documents (int64) and where they start
    (int64). Documents without tokens, and those that fill their rows, leave none.
    """
    import numpy as np

    lengths = _checked(lengths, capacity)
    num_full = lengths // capacity
    documents = np.repeat(np.arange(len(lengths)), num_full)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(num_full) - num_full, num_full)) * capacity
    ends = starts + capacity == lengths[documents]
    full = RowPlan.from_columns(
        np.arange(len(documents) + 1), documents, starts, np.full(len(documents), capacity), ends
    )
    rests = np.flatnonzero(lengths % capacity)
    return full, rests, num_full[rests] * capacity


def best_fit(lengths: Any, capacity: int) -> RowPlan:
    """Pack documents of these lengths, in tokens, into rows of `capacity` tokens, best fit in decreasing length.

    Documents of a row or more are first cut into full rows; what is left of them is packed with the others.
    """
    from ropewalk.stages.data.compiled import bins

    full, documents, starts, sizes = _rests(lengths, capacity)
    order = bins.decreasing(sizes, capacity)
    rows, num_rows = bins.best_fit(sizes, order, capacity)
    return RowPlan.concatenate([full, _whole(rows, num_rows, order, documents, starts, sizes)])


def first_fit(lengths: Any, capacity: int, order: Any) -> RowPlan:
    """Pack documents, in `order` (all their numbers), each into the first row with room for it.

    Documents of a row or more are first cut into full rows; what is left of them is packed with the others.
    """
    import numpy as np

    from ropewalk.stages.data.compiled import bins

    full, documents, starts, sizes = _rests(lengths, capacity)
    # The place of each rest among the rests, in the order of the documents that have one.
    order = np.asarray(order, dtype=np.int64)
    if len(order) != len(lengths) or (np.bincount(order, minlength=len(lengths)) != 1).any():
        raise ValueError("order must name every document once")
    place = np.full(len(lengths), -1, dtype=np.int64)
    place[documents] = np.arange(len(documents))
    places = place[order]
    places = places[places >= 0]
    rows, num_rows = bins.first_fit(sizes, places, capacity)
    return RowPlan.concatenate([full, _whole(rows, num_rows, places, documents, starts, sizes)])


def _rests(lengths: Any, capacity: int) -> tuple[RowPlan, np.ndarray, np.ndarray, np.ndarray]:
    """Full rows, and the rests' documents, starts and sizes, which count the separator."""
    import numpy as np

    lengths = np.asarray(lengths, dtype=np.int64)
    full, documents, starts = cut_long(lengths, capacity)
    return full, documents, starts, lengths[documents] - starts + 1


def _whole(
    rows: np.ndarray, num_rows: int, order: np.ndarray, documents: np.ndarray, starts: np.ndarray, sizes: np.ndarray
) -> RowPlan:
    """The plan of rests that nothing cuts, from the row of each."""
    import numpy as np

    from ropewalk.stages.data.compiled import bins

    offsets, items = bins.group(rows, num_rows, order)
    ends = np.ones(len(items), np.bool_)
    return RowPlan.from_columns(offsets, documents[items], starts[items], sizes[items] - 1, ends)


def concatenate(lengths: Any, capacity: int, order: Any) -> RowPlan:
    """Lay documents end to end in `order` and cut into rows of `capacity` tokens. Only the last row may have room."""
    import numpy as np

    from ropewalk.stages.data.compiled import bins

    columns = bins.concatenate(_checked(lengths, capacity), capacity, np.asarray(order, dtype=np.int64))
    return RowPlan(*columns)


def _checked(lengths: Any, capacity: int) -> np.ndarray:
    import numpy as np

    lengths = np.asarray(lengths, dtype=np.int64)
    if capacity < 1:
        raise ValueError(f"row_tokens is {capacity + 1}: a row needs room for a token behind its begin token")
    if len(lengths) > MAX_DOCUMENTS:
        raise ValueError(f"{len(lengths)} documents are too many for one plan: make units of fewer shards")
    if len(lengths) and int(lengths.min()) < 0:
        raise ValueError("a document has a negative number of tokens")
    return lengths
