from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ropewalk.stages.data import utk
from ropewalk.stages.data.packing import knot_rules
from ropewalk.stages.data.packing.knot_rules import KnotRules, RowKind
from ropewalk.stages.data.packing.knots import draw_knots, stream_key

quick = settings(deadline=None, max_examples=40)
PLAIN = RowKind(rows_fraction=0, chunk_probabilities=(1.0,))
THREE = (PLAIN, RowKind(rows_fraction=1, chunk_probabilities=(0, 0, 1.0)))
MIXED = (
    RowKind(rows_fraction=0.3, chunk_probabilities=(1.0,)),
    RowKind(rows_fraction=0.5, chunk_probabilities=(0.2, 0.3, 0.3, 0.2)),
    RowKind(rows_fraction=0.2, hop_tokens=5),
)


class Chunk(NamedTuple):
    document: int
    number: int
    start: int
    end: int
    is_last: bool


def drawn_rows(rows_of_lengths, indices, **fields):
    """For each row: its chunks in the order of their slots, and the ids of the slots."""
    rules = KnotRules(**fields)
    offsets = np.cumsum([0, *map(len, rows_of_lengths)])
    keys = [stream_key(0, "utk", index) for index in indices]
    drawn = draw_knots(rules, keys, offsets, np.array([length for row in rows_of_lengths for length in row], np.int64))
    found = []
    for begin, end in pairwise(offsets.tolist()):
        first, last = drawn.first_chunks[[begin, end]].tolist()
        chunks = []
        for document, (chunk, upper) in enumerate(pairwise(drawn.first_chunks[begin : end + 1].tolist())):
            bounds = [0, *drawn.ends[chunk:upper].tolist()]
            count = upper - chunk
            chunks += [Chunk(document, n, bounds[n], bounds[n + 1], n == count - 1) for n in range(count)]
        laid = [chunks[chunk] for chunk in drawn.slots[first:last].tolist()]
        assert bool(drawn.is_cut[len(found)]) == any(chunk.number for chunk in laid)
        found.append((laid, drawn.characters[first:last].tolist()))
    return found


def knotted(lengths, index=0, **fields):
    return drawn_rows([lengths], [index], **fields)[0][0]


def cuts(length, **fields):
    return [chunk.end for chunk in sorted(knotted([length], **fields))][:-1]


@quick
@given(st.lists(st.integers(1, 80), min_size=1, max_size=9), st.integers(0, 99), st.booleans())
def test_every_chunk_is_placed_once_and_the_last_stays_last(lengths, index, ordered):
    chunks = knotted(lengths, index=index, row_kinds=MIXED, preserve_partial_order=ordered)
    for document, length in enumerate(lengths):
        own = sorted(chunk for chunk in chunks if chunk.document == document)
        assert [chunk.number for chunk in own] == list(range(len(own)))
        assert [chunk.start for chunk in own] == [0, *(chunk.end for chunk in own[:-1])]
        assert own[-1].end == length and all(chunk.start < chunk.end for chunk in own)
    assert chunks[-1].document == len(lengths) - 1 and chunks[-1].is_last


@quick
@given(st.lists(st.integers(3, 80), min_size=2, max_size=9), st.integers(0, 99))
def test_partial_order_keeps_each_documents_chunks_in_order(lengths, index):
    chunks = knotted(lengths, index=index, row_kinds=THREE)
    for document in range(len(lengths)):
        assert [chunk.number for chunk in chunks if chunk.document == document] == [0, 1, 2]


def test_without_partial_order_chunks_come_in_any_order_and_documents_are_mixed():
    orders, interleaved = set(), 0
    for index in range(60):
        chunks = knotted([30, 30], index=index, row_kinds=THREE, preserve_partial_order=False)
        orders.add(tuple(chunk.number for chunk in chunks if chunk.document == 0))
        interleaved += [chunk.document for chunk in chunks] not in ([0] * 3 + [1] * 3, [1] * 3 + [0] * 3)
    assert len(orders) == 6
    assert interleaved > 30


def test_cuts_are_distinct_and_uniform():
    counts = np.zeros(10)
    for chunks, _ in drawn_rows([[10]] * 3000, range(3000), row_kinds=THREE):
        first, second = sorted(chunk.end for chunk in chunks)[:2]
        assert 1 <= first < second <= 9
        counts[[first, second]] += 1
    assert all(abs(counts[1:] - 3000 * 2 / 9) < 100)


def test_cuts_by_hand():
    assert cuts(11, row_kinds=THREE, cuts="equal") == [3, 6]
    assert cuts(2, row_kinds=THREE, cuts="equal") == []
    hops = (RowKind(rows_fraction=1, hop_tokens=4),)
    assert cuts(12, row_kinds=hops) == [4, 8]
    assert cuts(4, row_kinds=hops) == []


def test_a_document_can_be_cut_into_hundreds_of_chunks():
    many = (RowKind(rows_fraction=1, chunk_probabilities=(*[0] * 299, 1)),)
    for length in (300, 400, 12_000):
        found = cuts(length, row_kinds=many)
        assert len(set(found)) == 299 and min(found) >= 1 and max(found) < length


def test_documents_take_turns():
    kinds = (RowKind(rows_fraction=1, hop_tokens=4, arrangement="turns"),)
    turns = [(chunk.document, chunk.number) for chunk in knotted([10, 3, 5], row_kinds=kinds)]
    assert turns == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]


def test_the_share_of_cut_rows_is_the_share_asked_for():
    rows = drawn_rows([[40, 50]] * 3000, range(3000))
    assert 0.27 < sum(len(chunks) > 2 for chunks, _ in rows) / 3000 < 0.33


def test_a_row_in_which_nothing_is_cut_stays_as_it_is():
    kinds = (RowKind(rows_fraction=1, chunk_probabilities=(1.0, 0)),)
    for chunks, _ in drawn_rows([[5, 6, 7, 8]] * 10, range(10), row_kinds=kinds):
        assert [chunk.document for chunk in chunks] == [0, 1, 2, 3]


def test_a_row_depends_on_its_key_and_not_on_the_rows_beside_it():
    fields = {"row_kinds": MIXED, "enable_backtracing": True}
    alone = drawn_rows([[40, 9]], [17], **fields)
    many = drawn_rows([[40, 9]] * 20, range(20), **fields)
    assert many[17:18] == alone
    assert len({str(row) for row in many}) > 10


def test_ids_are_drawn_from_the_whole_alphabet_and_differ():
    rows = drawn_rows([[30] * 20] * 50, range(50), row_kinds=THREE, enable_backtracing=True)
    ids = [tuple(name) for _, names in rows for name in names]
    assert len(set(ids)) == len(ids) == 50 * 60
    assert {place for name in ids for place in name} == set(range(62))


def test_added_tokens_are_those_that_the_config_inserts():
    assert knot_rules.marker_tokens(1) == ()
    assert knot_rules.marker_tokens(3) == ("<|tail0|>", "<|head1|>", "<|tail1|>", "<|head2|>")
    assert len(set(knot_rules.marker_tokens(9))) == 16
    assert utk.added_tokens(utk.UtkConfig(row_tokens=99)) == knot_rules.marker_tokens(3)
    everything = utk.UtkConfig(row_tokens=99, row_kinds=MIXED, enable_backtracing=True)
    expected = (*knot_rules.marker_tokens(4), *knot_rules.HOP_TOKENS, *knot_rules.BACKTRACING_TOKENS)
    assert utk.added_tokens(everything) == expected
    turns = RowKind(rows_fraction=1, chunk_probabilities=(0, 1), arrangement="turns")
    assert utk.added_tokens(utk.UtkConfig(row_tokens=99, row_kinds=(turns,))) == ()


EITHER = "either chunk_probabilities or hop_tokens"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows_fraction": 1}, EITHER),
        ({"rows_fraction": 1, "hop_tokens": 4, "chunk_probabilities": (1,)}, EITHER),
        ({"rows_fraction": 1, "chunk_probabilities": (0.5, 0.4)}, "chunk_probabilities must be"),
        ({"rows_fraction": 0.5, "hop_tokens": 4}, "rows_fraction of row_kinds must be non-negative and add up"),
    ],
)
def test_bad_row_kinds_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        utk.UtkConfig(row_tokens=99, row_kinds=(RowKind(**fields),))
