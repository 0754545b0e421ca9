"""Documents laid end to end in a seeded order, epoch after epoch, read through windows of any length.

Every document is framed as `bos document eos` (as `bos document` if the two marks are one token). A window never begins
with a mark: the row that takes it has its own `bos`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ropewalk.stages.schema import TokenizerInfo, iterate_table, seeded_rng

if TYPE_CHECKING:
    import numpy as np


class Piece(NamedTuple):
    """Consecutive tokens of one document inside a window or row."""

    document: int
    """Index into `RunningText.doc_ids`."""
    start: int
    """Offset in the document, in tokens."""
    num_tokens: int
    offset: int
    """Where the piece begins in the window or row."""


@dataclass(frozen=True)
class RunningText:
    """The text, as the documents in memory and the order in which they come."""

    doc_ids: Sequence[str]
    tokens: Sequence[np.ndarray]
    """`input_ids` of each document, int32."""
    order: Sequence[int]
    """Indices of the documents, in the order of the text; each epoch has every document once."""
    frames: Sequence[int]
    """Where each document of `order` begins in the text, its `bos` included, and, last, where the text ends."""
    num_epochs: int
    """Epochs begun."""
    num_documents: int
    """Documents of the corpus with at least one token, whether the text reached them or not."""
    bos_token_id: int
    eos_token_id: int

    @property
    def _num_marks(self) -> int:
        return 1 if self.bos_token_id == self.eos_token_id else 2

    def next_token(self, cursor: int) -> int:
        """The first position at or behind `cursor` that holds a document's token, not a mark."""
        number = bisect_right(self.frames, cursor) - 1
        begin, end = self.frames[number], self.frames[number + 1] - (self._num_marks - 1)
        if cursor == begin:
            return cursor + 1
        return cursor if cursor < end else self.frames[number + 1] + 1

    def window(self, cursor: int, num_tokens: int) -> tuple[np.ndarray, list[Piece]]:
        """`num_tokens` ids of the text from `cursor`, marks included, and the pieces of documents in them."""
        import numpy as np

        ids = np.full(num_tokens, self.eos_token_id, dtype=np.int32)
        pieces = []
        number = bisect_right(self.frames, cursor) - 1
        while self.frames[number] < cursor + num_tokens:
            document = self.order[number]
            first = self.frames[number] + 1
            if cursor < first:
                ids[first - 1 - cursor] = self.bos_token_id
            begin, end = max(first, cursor), min(first + len(self.tokens[document]), cursor + num_tokens)
            if begin < end:
                ids[begin - cursor : end - cursor] = self.tokens[document][begin - first : end - first]
                pieces.append(Piece(document, begin - first, end - begin, begin - cursor))
            number += 1
        return ids, pieces


def load_text(folder: Path, tokenizer: TokenizerInfo, min_tokens: int, seed: int) -> RunningText:
    """At least `min_tokens` of running text from a Tokens artifact.

    Memory holds the documents that the text reaches, and the lengths of all. Raises ValueError if there are none.
    """
    import numpy as np

    lengths = np.concatenate(
        [
            np.asarray(batch.column("input_ids").value_lengths(), dtype=np.int64)
            for batch in iterate_table(folder, "tokens", ["input_ids"])
        ]
    )
    usable = np.flatnonzero(lengths)
    if not len(usable):
        raise ValueError(f"{folder} holds no token")
    num_marks = 1 if tokenizer.bos_token_id == tokenizer.eos_token_id else 2
    order, total, epoch = [], 0, 0
    while total < min_tokens:
        shuffled = usable[seeded_rng("running-text", seed, epoch).permutation(len(usable))]
        ends = total + np.cumsum(lengths[shuffled] + num_marks)
        order.append(shuffled[: int(np.searchsorted(ends, min_tokens)) + 1])
        total, epoch = int(ends[-1]), epoch + 1
    rows = np.concatenate(order)
    reached, indices = np.unique(rows, return_inverse=True)
    doc_ids, tokens = _take(folder, reached)
    frames = np.concatenate([[0], np.cumsum(lengths[rows] + num_marks)])
    return RunningText(
        doc_ids,
        tokens,
        indices.tolist(),
        frames.tolist(),
        epoch,
        len(usable),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )


def _take(folder: Path, rows: np.ndarray) -> tuple[list[str], list[np.ndarray]]:
    import numpy as np

    doc_ids: list[str] = []
    tokens: list[np.ndarray] = []
    first = 0
    for batch in iterate_table(folder, "tokens", ["doc_id", "input_ids"]):
        low, high = np.searchsorted(rows, [first, first + batch.num_rows])
        wanted = batch.take(rows[low:high] - first)
        doc_ids += wanted.column("doc_id").to_pylist()
        tokens += [ids.values.to_numpy() for ids in wanted.column("input_ids")]
        first += batch.num_rows
    return doc_ids, tokens


def walk(text: RunningText, sizes: Sequence[int]) -> list[int]:
    """Where windows of these sizes begin when each follows the one before."""
    starts, cursor = [], 0
    for size in sizes:
        cursor = text.next_token(cursor)
        starts.append(cursor)
        cursor += size
    return starts
