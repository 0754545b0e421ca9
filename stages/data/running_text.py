"""Documents laid end to end in a seeded order, epoch after epoch, read through windows of any length.

Every document is followed by the end token. A window never begins with one: the row that takes it begins with its own
begin token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.schema import seeded_rng

if TYPE_CHECKING:
    import numpy as np


class PlacedPiece(NamedTuple):
    """Consecutive tokens of one document inside a window or row."""

    document: int
    """Index into `Corpus.doc_ids`."""
    start: int
    """Offset in the document, in tokens."""
    num_tokens: int
    offset: int
    """Where the piece begins in the window or row."""


@dataclass(frozen=True)
class RunningText:
    """The text, as a corpus and the order in which its documents come."""

    corpus: Corpus
    eos_token_id: int
    order: Sequence[int]
    """Indices of documents; each epoch has every document once, empty ones excepted."""
    ends: Sequence[int]
    """Where each document of `order` ends in the text, its end token included."""
    num_epochs: int
    """Epochs begun."""

    def next_token(self, cursor: int) -> int:
        """The first position at or behind `cursor` that holds a document's token."""
        return cursor + (self.ends[bisect_right(self.ends, cursor)] == cursor + 1)

    def window(self, cursor: int, num_tokens: int) -> tuple[np.ndarray, list[PlacedPiece]]:
        """`num_tokens` ids of the text from `cursor`, end tokens included, and the pieces of documents in them."""
        import numpy as np

        ids = np.full(num_tokens, self.eos_token_id, dtype=np.int32)
        pieces = []
        number, filled = bisect_right(self.ends, cursor), 0
        while filled < num_tokens:
            document = self.order[number]
            length = int(self.corpus.offsets[document + 1] - self.corpus.offsets[document])
            start = length + 1 - (self.ends[number] - cursor - filled)
            taken = min(length - start, num_tokens - filled)
            if taken > 0:
                ids[filled : filled + taken] = self.corpus.piece(document, start, taken)
                pieces.append(PlacedPiece(document, start, taken, filled))
            number, filled = number + 1, filled + taken + 1
        return ids, pieces

    def walk(self, sizes: Sequence[int]) -> list[int]:
        """Where windows of these sizes begin when each follows the one before."""
        starts, cursor = [], 0
        for size in sizes:
            starts.append(self.next_token(cursor))
            cursor = starts[-1] + size
        return starts


def lay_out(corpus: Corpus, eos_token_id: int, min_tokens: int, seed: int) -> RunningText:
    """At least `min_tokens` of running text. Raises ValueError if the corpus has no token."""
    import numpy as np

    lengths = np.diff(corpus.offsets)
    usable = np.flatnonzero(lengths)
    if not len(usable):
        raise ValueError("the input `tokens` holds no token")
    order: list[int] = []
    ends: list[int] = []
    epoch = 0
    while not ends or ends[-1] < min_tokens:
        shuffled = usable[seeded_rng("running-text", seed, epoch).permutation(len(usable))]
        reached = (ends[-1] if ends else 0) + np.cumsum(lengths[shuffled] + 1)
        needed = int(np.searchsorted(reached, min_tokens)) + 1
        order += shuffled[:needed].tolist()
        ends += reached[:needed].tolist()
        epoch += 1
    return RunningText(corpus, eos_token_id, order, ends, epoch)
