"""Untie the Knots, the inner loop that lays rows.

Chunks of a batch of rows are numbered in the order of their rows, documents (pieces) and places in the document.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

NUM_TABLES = 2


@njit(cache=True, inline="always")
def _insert(row_ids: Any, row_mask: Any, place: int, tokens: Any, begin: int, end: int, is_target: bool) -> int:
    """Write tokens that are of no document, as far as there is room. Returns where the row goes on."""
    count = min(end - begin, len(row_ids) - place)
    for number in range(count):
        row_ids[place + number] = tokens[begin + number]
        row_mask[place + number] = is_target
    return place + count


@njit(cache=True, inline="always")
def _mark(row_ids: Any, row_mask: Any, place: int, tokens: Any, begin: int, end: int, pending: Any) -> int:
    """Write a marker. No target is the token behind it, which is written later: `pending` keeps its place."""
    place = _insert(row_ids, row_mask, place, tokens, begin, end, False)
    _settle(row_mask, place, pending)
    return place


@njit(cache=True, inline="always")
def _settle(row_mask: Any, place: int, pending: Any) -> None:
    """Make the token behind the marker before the last no target, now that it is written."""
    if pending[0] < len(row_mask):
        row_mask[pending[0]] = False
    pending[0] = place


@njit(cache=True)
def _list_ids(
    row_ids: Any, row_mask: Any, place: int, signs: Any, id_offsets: Any, ids: Any, slots: Any, pending: Any
) -> int:
    """Write `<S> id <s> id </S>`, the ids being those of `slots`."""
    place = _insert(row_ids, row_mask, place, signs, 2, 3, False)
    for number in range(len(slots)):
        if number > 0:
            place = _insert(row_ids, row_mask, place, signs, 3, 4, True)
        slot = slots[number]
        place = _insert(row_ids, row_mask, place, ids, id_offsets[slot], id_offsets[slot + 1], True)
    place = _insert(row_ids, row_mask, place, signs, 4, 5, True)
    _settle(row_mask, place, pending)
    return place


@njit(cache=True)
def _owners(first_chunks: Any, slots: Any, first: int) -> tuple[Any, Any]:
    """The document of each chunk of a row, and the slot of each, where the row's first slot is number `first`."""
    owners, slot_of = np.empty(len(slots), dtype=np.int64), np.empty(len(slots), dtype=np.int64)
    for document in range(len(first_chunks) - 1):
        owners[first_chunks[document] - first : first_chunks[document + 1] - first] = document
    for slot in range(len(slots)):
        slot_of[slots[slot]] = first + slot
    return owners, slot_of


@njit(cache=True)
def lay(
    row_offsets: Any,
    documents: Any,
    starts: Any,
    num_tokens: Any,
    first_chunks: Any,
    ends: Any,
    slots: Any,
    tables: Any,
    head_offsets: Any,
    heads: Any,
    tail_offsets: Any,
    tails: Any,
    id_offsets: Any,
    ids: Any,
    signs: Any,
    corpus_offsets: Any,
    corpus_ids: Any,
    targets: Any,
    bos: int,
    eos: int,
    input_ids: Any,
    loss_mask: Any,
    segment_offsets: Any,
    segment_documents: Any,
    segment_starts: Any,
    segment_tokens: Any,
    segment_row_starts: Any,
    num_padding: Any,
) -> None:
    """Lay the chunks with their markers, ids and listings; what does not fit is cut off.

    Args:
        row_offsets: int64 `[R + 1]`: where each row's documents begin.
        documents: int32 `[P]`: items of the corpus.
        starts: int64 `[P]`: tokens into the item.
        num_tokens: int32 `[P]`: without the separator.
        first_chunks: int64 `[P + 1]`: see `knot_draws.draw`.
        ends: int64 `[C]`: see `knot_draws.draw`.
        slots: int64 `[C]`: see `knot_draws.draw`.
        tables: int64 `[R]`: which table of markers the row uses; -1: no markers.
        head_offsets: int64 `[T * N + 1]`: where in `heads` the head of chunk n begins, for table t at t * N + n.
        heads: int32: tokens that stand before a chunk.
        tail_offsets: int64 `[T * N + 1]`: the same for tails.
        tails: int32: tokens that stand behind a chunk.
        id_offsets: int64 `[C + 1]`: where each slot's id begins in `ids`. A document of which a slot has none has
            neither ids nor a listing.
        ids: int32: the tokens of all ids.
        signs: int32 `[5]`: `<D>`, `</D>`, `<S>`, `<s>`, `</S>`.
        corpus_offsets: int64 `[num_items + 1]`.
        corpus_ids: int32, the items' tokens end to end.
        targets: bool, one for each of `corpus_ids`; or empty, and all are targets.
        bos: Id of the begin token.
        eos: Id of the end token.
        input_ids: int32 `[R, L]`, written.
        loss_mask: bool `[R, L]`, written.
        segment_offsets: int64 `[R + 1]`, written.
        segment_documents: int32 `[C]`, written as far as there are segments; the next three likewise.
        segment_starts: int64 `[C]`.
        segment_tokens: int32 `[C]`.
        segment_row_starts: int32 `[C]`.
        num_padding: int64 `[R]`, written.
    """
    row_tokens, num_numbers = input_ids.shape[1], (len(head_offsets) - 1) // NUM_TABLES
    pending = np.empty(1, dtype=np.int64)
    num_segments = 0
    for row in range(len(row_offsets) - 1):
        row_ids, row_mask, table = input_ids[row], loss_mask[row], tables[row] * num_numbers
        row_ids[0], row_mask[0] = bos, False
        place, pending[0] = 1, row_tokens
        first_piece, end_piece = row_offsets[row], row_offsets[row + 1]
        first, last = first_chunks[first_piece], first_chunks[end_piece]
        owners, slot_of = _owners(first_chunks[first_piece : end_piece + 1], slots[first:last], first)
        unplaced = np.diff(first_chunks[first_piece : end_piece + 1])
        segment_offsets[row] = num_segments
        for slot in range(first, last):
            if place >= row_tokens:
                break
            chunk, piece = first + slots[slot], first_piece + owners[slots[slot]]
            number = chunk - first_chunks[piece]
            has_id, has_markers = id_offsets[slot + 1] > id_offsets[slot], tables[row] >= 0
            if has_id:
                place = _insert(row_ids, row_mask, place, signs, 0, 1, False)
                place = _insert(row_ids, row_mask, place, ids, id_offsets[slot], id_offsets[slot + 1], False)
                place = _mark(row_ids, row_mask, place, signs, 1, 2, pending)
            if has_markers and number > 0:
                begin, end = head_offsets[table + number], head_offsets[table + number + 1]
                place = _mark(row_ids, row_mask, place, heads, begin, end, pending)
            begin = ends[chunk - 1] if number > 0 else 0
            count = min(min(ends[chunk], num_tokens[piece]) - begin, row_tokens - place)
            if count > 0:
                source = corpus_offsets[documents[piece]] + starts[piece] + begin
                row_ids[place : place + count] = corpus_ids[source : source + count]
                if len(targets):
                    row_mask[place : place + count] = targets[source : source + count]
                else:
                    row_mask[place : place + count] = True
                segment_documents[num_segments] = documents[piece]
                segment_starts[num_segments] = starts[piece] + begin
                segment_tokens[num_segments] = count
                segment_row_starts[num_segments] = place
                num_segments += 1
                place += count
            if ends[chunk] > num_tokens[piece] and place < row_tokens:
                row_ids[place], row_mask[place] = eos, True
                place += 1
            if has_markers and chunk + 1 < first_chunks[piece + 1]:
                begin, end = tail_offsets[table + number], tail_offsets[table + number + 1]
                place = _mark(row_ids, row_mask, place, tails, begin, end, pending)
            unplaced[piece - first_piece] -= 1
            if has_id and unplaced[piece - first_piece] == 0:
                own = slot_of[first_chunks[piece] - first : first_chunks[piece + 1] - first]
                place = _list_ids(row_ids, row_mask, place, signs, id_offsets, ids, own, pending)
        _settle(row_mask, place, pending)
        row_ids[place:] = eos
        row_mask[place:] = False
        num_padding[row] = row_tokens - place
    segment_offsets[len(row_offsets) - 1] = num_segments
