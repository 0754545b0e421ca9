"""Finished rows as arrays: what the planners' choices become.

A row is the begin token, then pieces of documents, each document's end followed by the end token if there is room, then
padding (end tokens that are no targets). So a row holds up to `row_tokens - 1` other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ropewalk.stages.schema import TokenizerInfo, stable_id

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.data.packing.bins import RowPlan
    from ropewalk.stages.data.packing.rows import Corpus

BATCH_TOKENS = 2**20
"""Tokens of rows laid at a time: bounds memory, and stays within the cache."""


@dataclass(frozen=True)
class RowBatch:
    """R rows of L tokens with S segments, which are in order of rows and of places in them."""

    input_ids: np.ndarray
    """int32 `[R, L]`."""
    loss_mask: np.ndarray
    """bool `[R, L]`."""
    segment_offsets: np.ndarray
    """int64 `[R + 1]`: where each row's segments begin in the arrays below."""
    segment_documents: np.ndarray
    """int32 `[S]`: which document of the corpus."""
    segment_starts: np.ndarray
    """int64 `[S]`: tokens of that corpus's document before the segment."""
    segment_tokens: np.ndarray
    """int32 `[S]`."""
    segment_row_starts: np.ndarray
    """int32 `[S]`."""
    num_padding: np.ndarray
    """int64 `[R]`."""

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.input_ids)

    def row_ids(self, method: str, seed: int, indices: Sequence[int], corpus: Corpus) -> list[str]:
        """An id for each row that differs between methods, seeds, indices and corpora."""
        names: list[str] = [corpus.doc_ids[int(document)] for document in self.segment_documents]
        starts = (self.segment_starts + corpus.starts[self.segment_documents]).tolist()
        pieces = zip(names, starts, self.segment_tokens.tolist(), strict=True)
        parts: list[str | int] = [value for piece in pieces for value in piece]
        bounds = (3 * self.segment_offsets).tolist()
        return [
            stable_id(method, seed, index, *parts[bounds[row] : bounds[row + 1]]) for row, index in enumerate(indices)
        ]


def lay_rows(plan: RowPlan, corpus: Corpus, info: TokenizerInfo, row_tokens: int) -> RowBatch:
    """Lay the planned pieces into rows.

    Pieces and the separators behind them are targets (of a corpus with `targets` only the tokens that are, and
    separators); begin token and padding are not. Raises RuntimeError if the plan does not fit the corpus or the rows.
    """
    import numpy as np

    from ropewalk.stages.data.compiled.lay import lay

    num_rows, num_pieces = plan.num_rows, len(plan.documents)
    input_ids = np.empty((num_rows, row_tokens), np.int32)
    loss_mask = np.empty((num_rows, row_tokens), np.bool_)
    row_starts = np.empty(num_pieces, np.int32)
    padding = np.empty(num_rows, np.int64)
    wrong = lay(
        plan.row_offsets,
        plan.documents,
        plan.starts,
        plan.num_tokens,
        plan.is_end,
        corpus.offsets,
        corpus.ids,
        np.zeros(0, np.bool_) if corpus.targets is None else corpus.targets,
        info.bos_token_id,
        info.eos_token_id,
        input_ids,
        loss_mask,
        row_starts,
        padding,
    )
    if wrong >= 0:
        raise RuntimeError(f"piece {wrong} of the plan leaves its document or its row")
    return RowBatch(
        input_ids,
        loss_mask,
        plan.row_offsets,
        plan.documents,
        plan.starts,
        plan.num_tokens,
        row_starts,
        padding,
    )


def batches_of_rows(num_rows: int, row_tokens: int) -> Iterator[np.ndarray]:
    """Consecutive row numbers, so many at a time that `BATCH_TOKENS` are not exceeded."""
    import numpy as np

    step = max(1, BATCH_TOKENS // row_tokens)
    for begin in range(0, num_rows, step):
        yield np.arange(begin, min(begin + step, num_rows))
