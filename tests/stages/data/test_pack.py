import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import (
    EOS,
    assert_rows_are_sound,
    numbered_documents,
    run_stage,
    tokenizer_info,
    write_tokens,
)

from ropewalk.stages.data import pack
from ropewalk.stages.data.bins import RoomIndex, best_fit, concatenate, cut_long, room_left
from ropewalk.stages.data.rows import check_counts
from ropewalk.stages.schema import Artifact, read_artifact, write_artifact

quick = settings(deadline=None, max_examples=60)
LENGTHS = [30, 3, 17, 0, 64, 9, 9, 12, 1, 25]


def slow_best_fit(lengths, capacity):
    """Best fit decreasing by trying every row for every document."""
    rows, items = [], []
    for document, length in enumerate(lengths):
        begin = 0
        while length - begin >= capacity:
            rows.append({"items": [(document, begin, capacity)], "room": 0, "since": 0})
            begin += capacity
        if length > begin:
            items.append((document, begin, length - begin))
    items.sort(key=lambda item: item[2], reverse=True)
    for clock, item in enumerate(items, start=1):
        need = item[2] + 1
        fitting = [row for row in rows if row["room"] >= need]
        if fitting:
            row = min(fitting, key=lambda row: (row["room"], row["since"]))
        else:
            row = {"items": [], "room": capacity}
            rows.append(row)
        row["items"].append(item)
        row["room"] -= need
        row["since"] = clock
    return [row["items"] for row in rows]


def bare(plan):
    return [[(piece.document, piece.start, piece.num_tokens) for piece in row] for row in plan]


@quick
@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 40))
def test_best_fit_equals_trying_every_row(lengths, capacity):
    assert bare(best_fit(lengths, capacity)) == slow_best_fit(lengths, capacity)


def test_best_fit_equals_trying_every_row_when_rooms_span_many_words():
    import random

    draw = random.Random(5)
    lengths = [draw.randint(1, 9000) for _ in range(400)]
    assert bare(best_fit(lengths, 5000)) == slow_best_fit(lengths, 5000)


def test_best_fit_by_hand():
    # Rows of 10, one position for each separator: 6 opens a row and leaves 3; 5 leaves 4; 3 fills the second
    # row (room 4, not the room of 3 into which it does not fit with its separator); 2 fills the first.
    assert bare(best_fit([2, 6, 3, 5], 10)) == [[(1, 0, 6), (0, 0, 2)], [(3, 0, 5), (2, 0, 3)]]


@quick
@given(st.lists(st.integers(0, 60), max_size=40), st.integers(2, 40))
def test_best_fit_cuts_only_documents_longer_than_a_row(lengths, capacity):
    for row in best_fit(lengths, capacity):
        assert sum(piece.num_tokens + piece.is_end for piece in row) <= capacity + (len(row) == 1)
        for piece in row:
            if lengths[piece.document] <= capacity:
                assert (piece.start, piece.num_tokens) == (0, lengths[piece.document])


@quick
@given(st.sets(st.integers(0, 5000)), st.integers(0, 5000))
def test_room_index_finds_the_smallest_room_that_is_large_enough(rooms, size):
    index = RoomIndex(5000)
    for room in rooms:
        index.add(room)
    assert index.at_least(size) == min((room for room in rooms if room >= size), default=None)
    for room in list(rooms)[::2]:
        index.discard(room)
        rooms.discard(room)
    assert index.at_least(size) == min((room for room in rooms if room >= size), default=None)


@quick
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 20), st.randoms(use_true_random=False))
def test_concatenate_lays_documents_in_order_and_fills_every_row_but_the_last(lengths, capacity, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    plan = concatenate(lengths, capacity, order)
    pieces = [piece for row in plan for piece in row]
    placed = [(piece.document, piece.start + i) for piece in pieces for i in range(piece.num_tokens)]
    assert placed == [(document, i) for document in order for i in range(lengths[document])]
    assert [piece.document for piece in pieces if piece.is_end] == [d for d in order if lengths[d]]
    assert all(room_left(row, capacity) == 0 for row in plan[:-1])


@quick
@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 30))
def test_long_documents_are_cut_into_full_rows_and_a_rest(lengths, capacity):
    full, rest = cut_long(lengths, capacity)
    pieces = [piece for row in full for piece in row] + rest
    assert all(len(row) == 1 and row[0].num_tokens == capacity for row in full)
    assert all(piece.num_tokens < capacity and piece.is_end for piece in rest)
    for document, length in enumerate(lengths):
        own = sorted(piece for piece in pieces if piece.document == document)
        assert sum(piece.num_tokens for piece in own) == length
        assert [piece.is_end for piece in own] == [False] * (len(own) - 1) + [True] * bool(own)


@pytest.fixture
def corpus(tmp_path):
    documents = numbered_documents(LENGTHS)
    return documents, {"tokens": write_tokens(tmp_path / "tokens", documents)}


@pytest.mark.parametrize("method", ["best_fit", "concatenate"])
@pytest.mark.parametrize("attention", ["document", "anchor", "causal"])
def test_rows_keep_every_token(tmp_path, corpus, method, attention):
    documents, inputs = corpus
    config = pack.PackConfig(row_tokens=24, method=method, attention=attention)
    data = run_stage(pack, config, inputs, tmp_path / "out")
    rows = assert_rows_are_sound(data, documents)
    counts = read_artifact(data).counts
    assert counts["num_tokens_kept"] == sum(LENGTHS)
    assert counts["num_documents_empty"] == 1
    assert {row["attention"] for row in rows} == {attention}


def test_a_document_is_followed_by_a_learnt_end_token_and_padding_is_not_learnt(tmp_path):
    documents = {"a": [100, 101, 102], "b": [200, 201]}
    inputs = {"tokens": write_tokens(tmp_path / "tokens", documents)}
    data = run_stage(pack, pack.PackConfig(row_tokens=10), inputs, tmp_path / "out")
    (row,) = assert_rows_are_sound(data, documents)
    assert row["input_ids"] == [0, 100, 101, 102, EOS, 200, 201, EOS, EOS, EOS]
    assert row["loss_mask"] == [False, *[True] * 7, False, False]


def test_dropping_the_partial_row_counts_its_tokens(tmp_path, corpus):
    documents, inputs = corpus
    config = pack.PackConfig(row_tokens=24, method="concatenate", partial_row="drop")
    data = run_stage(pack, config, inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    counts = read_artifact(data).counts
    assert counts["num_tokens_padding"] == 0
    assert 0 < counts["num_tokens_dropped_partial_row"] < 24


def test_a_limit_keeps_the_first_rows_of_the_shuffle(tmp_path, corpus):
    documents, inputs = corpus
    config = pack.PackConfig(row_tokens=24)
    every = assert_rows_are_sound(run_stage(pack, config, inputs, tmp_path / "all"), documents)
    limited = pack.PackConfig(row_tokens=24, num_rows=3)
    data = run_stage(pack, limited, inputs, tmp_path / "three")
    assert assert_rows_are_sound(data, documents) == every[:3]
    assert read_artifact(data).counts["num_tokens_dropped_over_limit"] > 0


def test_rows_are_shuffled_by_the_seed_and_by_nothing_else(tmp_path, corpus):
    documents, inputs = corpus
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        data = run_stage(pack, pack.PackConfig(row_tokens=24, seed=seed), inputs, tmp_path / name)
        texts.append({path.name: path.read_bytes() for path in data.iterdir()})
    assert texts[0] == texts[1]
    assert texts[0]["rows-00000.parquet"] != texts[2]["rows-00000.parquet"]
    rows = assert_rows_are_sound(data, documents)
    longest = [max(segment["num_tokens"] for segment in row["segments"]) for row in rows]
    assert longest != sorted(longest, reverse=True), "best fit puts long documents first"


def test_best_fit_refuses_to_drop_rows():
    with pytest.raises(ValueError, match='partial_row="drop" needs method="concatenate"'):
        pack.PackConfig(row_tokens=24, partial_row="drop")


@pytest.mark.parametrize(
    ("documents", "info", "message"),
    [
        ({"a": []}, tokenizer_info(), "holds no tokens"),
        ({"a": [100, 1000]}, tokenizer_info(), "outside the vocabulary"),
    ],
)
def test_bad_tokens_are_refused(tmp_path, documents, info, message):
    inputs = {"tokens": write_tokens(tmp_path / "tokens", documents, info)}
    with pytest.raises(ValueError, match=message):
        run_stage(pack, pack.PackConfig(row_tokens=24), inputs, tmp_path / "out")


def test_a_doc_id_that_occurs_twice_is_refused(tmp_path):
    folder = write_tokens(tmp_path / "tokens", {"a": [100], "b": [101]})
    (folder / "tokens-00000.parquet").rename(folder / "tokens-00001.parquet")
    write_tokens(folder, {"a": [100]})
    with pytest.raises(ValueError, match="more than once"):
        run_stage(pack, pack.PackConfig(row_tokens=24), {"tokens": folder}, tmp_path / "out")


def test_tokens_without_a_tokenizer_are_refused(tmp_path):
    folder = write_tokens(tmp_path / "tokens", {"a": [100]})
    write_artifact(folder, Artifact(kind="tokens"))
    with pytest.raises(ValueError, match="names no tokenizer"):
        run_stage(pack, pack.PackConfig(row_tokens=24), {"tokens": folder}, tmp_path / "out")


def test_counts_that_do_not_add_up_stop_the_stage():
    with pytest.raises(RuntimeError, match="10 tokens came in, 9 are accounted for"):
        check_counts({"num_tokens_in": 10, "num_tokens_kept": 5, "num_tokens_trimmed": 1, "num_tokens_dropped_x": 3})
