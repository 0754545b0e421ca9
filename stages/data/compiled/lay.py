"""Copies planned pieces of documents into rows."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def lay(
    row_offsets: np.ndarray,
    documents: np.ndarray,
    starts: np.ndarray,
    num_tokens: np.ndarray,
    is_end: np.ndarray,
    corpus_offsets: np.ndarray,
    ids: np.ndarray,
    targets: np.ndarray,
    bos: int,
    eos: int,
    input_ids: np.ndarray,
    loss_mask: np.ndarray,
    row_starts: np.ndarray,
    num_padding: np.ndarray,
) -> int:
    """Lay rows: the begin token, pieces, the end token behind a document's end if there is room, then end tokens.

    Tokens of documents are targets (with `targets`, those that it says), and so are the separators.

    Args:
        row_offsets: int64 `[num_rows + 1]`: where each row's pieces begin.
        documents: int32 `[num_pieces]`: items of the corpus.
        starts: int64 `[num_pieces]`: tokens into the item.
        num_tokens: int32 `[num_pieces]`.
        is_end: bool `[num_pieces]`: a separator follows.
        corpus_offsets: int64 `[num_items + 1]`.
        ids: int32, the items' tokens end to end.
        targets: bool, one for each of `ids`; or empty, and all are targets.
        bos: Id of the begin token.
        eos: Id of the end token.
        input_ids: int32 `[num_rows, row_tokens]`, written.
        loss_mask: bool `[num_rows, row_tokens]`, written.
        row_starts: int32 `[num_pieces]`, written: where each piece begins in its row.
        num_padding: int64 `[num_rows]`, written.

    Returns:
        -1; or the first piece that is outside its item or goes beyond its row's end, where it stopped.
    """
    row_tokens = input_ids.shape[1]
    for row in range(len(row_offsets) - 1):
        row_ids, row_mask = input_ids[row], loss_mask[row]
        row_ids[0], row_mask[0] = bos, False
        end = 1
        for piece in range(row_offsets[row], row_offsets[row + 1]):
            document, count = documents[piece], num_tokens[piece]
            source = corpus_offsets[document] + starts[piece]
            if starts[piece] < 0 or count < 0 or source + count > corpus_offsets[document + 1]:
                return piece
            if end + count > row_tokens:
                return piece
            row_starts[piece] = end
            row_ids[end : end + count] = ids[source : source + count]
            if len(targets):
                row_mask[end : end + count] = targets[source : source + count]
            else:
                row_mask[end : end + count] = True
            end += count
            if is_end[piece] and end < row_tokens:
                row_ids[end], row_mask[end] = eos, True
                end += 1
        row_ids[end:] = eos
        row_mask[end:] = False
        num_padding[row] = row_tokens - end
    return -1
