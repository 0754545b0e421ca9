import hashlib
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import (
    BOS,
    EOS,
    assert_rows_are_sound,
    numbered_documents,
    run_stage,
    tokenizer_info,
    write_tokens,
)

from ropewalk.stages.data import utk
from ropewalk.stages.schema import read_artifact, seeded_rng

quick = settings(deadline=None, max_examples=40)
CHARACTERS = string.ascii_letters + string.digits
FIRST_CHARACTER_ID = 20
EVERY_TOKEN = (*utk.marker_tokens(4), *utk.HOP_TOKENS, *utk.BACKTRACING_TOKENS)
LENGTHS = [40, 3, 90, 17, 0, 1, 28, 150, 9, 2, 33]
PLAIN = utk.RowKind(rows_fraction=0, chunk_probabilities=(1.0,))


def always(**kind):
    return (PLAIN, utk.RowKind(rows_fraction=1, **kind))


THREE = always(chunk_probabilities=(0, 0, 1.0))
MIXED = (
    utk.RowKind(rows_fraction=0.3, chunk_probabilities=(1.0,)),
    utk.RowKind(rows_fraction=0.5, chunk_probabilities=(0.2, 0.3, 0.3, 0.2)),
    utk.RowKind(rows_fraction=0.2, hop_tokens=5),
)


def character_ids(text):
    return [FIRST_CHARACTER_ID + CHARACTERS.index(character) for character in text]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer folder, one token a character, and its description."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {character: FIRST_CHARACTER_ID + place for place, character in enumerate(CHARACTERS)}
    engine = Tokenizer(models.WordLevel(vocabulary | {"?": 99}, unk_token="?"))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    engine.save(str(folder / "tokenizer.json"))
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    return folder, tokenizer_info(EVERY_TOKEN, digest=digest)


def make_rows(folder, tokenizer, lengths=LENGTHS, **fields):
    documents = numbered_documents(lengths)
    where, info = tokenizer
    inputs = {"tokens": write_tokens(folder / "tokens", documents, info), "tokenizer": where}
    data = run_stage(utk, utk.UtkConfig(**fields), inputs, folder / "out")
    return assert_rows_are_sound(data, documents), read_artifact(data), documents


# The description in plain lists: a token is (kind, value), a row a list of them, a chunk a list of them.


def slow_stream_rows(documents, row_tokens, seed):
    """Documents end to end, cut into rows; each row is a list of documents, each a list of tokens."""
    names = list(documents)
    stream = []
    for number in seeded_rng(seed, "utk", "documents").permutation(len(names)):
        tokens = [("text", token) for token in documents[names[number]]]
        stream += [*tokens, ("separator", EOS)] if tokens else []
    rows = []
    while stream:
        row, stream = stream[: row_tokens - 1], stream[row_tokens - 1 :]
        if stream and stream[0][0] == "separator":
            stream = stream[1:]  # It would open the next row.
        pieces = [[]]
        for token in row:
            pieces[-1].append(token)
            if token[0] == "separator":
                pieces.append([])
        rows.append([piece for piece in pieces if piece])
    return rows


def slow_chunks(document, kind, cuts, rng):
    if kind.hop_tokens:
        bounds = list(range(0, len(document), kind.hop_tokens))
    else:
        count = rng.choice(len(kind.chunk_probabilities), p=kind.chunk_probabilities) + 1
        bounds = [0]
        if len(document) >= count > 1 and cuts == "uniform":
            bounds += sorted(rng.choice(len(document) - 1, size=count - 1, replace=False) + 1)
        elif len(document) >= count > 1:
            bounds += [len(document) // count * number for number in range(1, count)]
    chunks = [document[begin:end] for begin, end in zip(bounds, [*bounds[1:], len(document)], strict=True)]
    marked = []
    for number, chunk in enumerate(chunks):
        head, tail = [f"<|head{number}|>"], [f"<|tail{number}|>"]
        if kind.hop_tokens:
            head = ["<|hop_head|>", *str(number), "<|/hop_head|>"]
            tail = ["<|hop_tail|>", *str(number), "<|/hop_tail|>"]
        before = [("marker", text) for text in head] if number else []
        after = [("marker", text) for text in tail] if number < len(chunks) - 1 else []
        marked.append(before + chunk + after)
    return marked


def slow_row(pieces, config, index):
    """The whole of one row, as tokens."""
    rng = seeded_rng(config.seed, "utk", index)
    kind = config.row_kinds[rng.choice(len(config.row_kinds), p=[kind.rows_fraction for kind in config.row_kinds])]
    chunks = [slow_chunks(piece, kind, config.cuts, rng) for piece in pieces]
    total = sum(map(len, chunks))
    if total == len(chunks):
        order = [(number, 0) for number in range(total)]
    else:
        places = list(rng.permutation(total - 1))
        at = {total - 1: (len(chunks) - 1, len(chunks[-1]) - 1)}
        for number, own in enumerate(chunks):
            mine = [places.pop(0) for _ in range(len(own) - (number == len(chunks) - 1))]
            for chunk, place in enumerate(sorted(mine) if config.preserve_partial_order else mine):
                at[place] = (number, chunk)
        order = [at[place] for place in range(total)]
    if not config.enable_backtracing:
        return [token for number, chunk in order for token in chunks[number][chunk]]
    ids = ["".join(CHARACTERS[c] for c in row) for row in rng.integers(62, size=(total, 6))]
    name = {key: [("id", character) for character in ids[slot]] for slot, key in enumerate(order)}
    laid, open_chunks = [], [len(own) for own in chunks]
    for number, chunk in order:
        open_chunks[number] -= 1
        if len(chunks[number]) == 1:
            laid += chunks[number][0]
            continue
        laid += [("marker", "<D>"), *(("marker", c) for _, c in name[number, chunk]), ("marker", "</D>")]
        laid += chunks[number][chunk]
        if open_chunks[number] == 0:
            laid.append(("start of listing", "<S>"))
            for other in range(len(chunks[number])):
                laid += [("listed", "<s>")] * (other > 0) + name[number, other]
            laid.append(("end of listing", "</S>"))
    return laid


def slow_record(laid, row_tokens, info):
    """Ids and loss mask of a row: no targets are markers, and what follows a marker or a listing."""
    laid = [("begin", BOS), *laid][:row_tokens]
    laid += [("padding", EOS)] * (row_tokens - len(laid))
    ids, mask = [], []
    for place, (kind, value) in enumerate(laid):
        if isinstance(value, str):
            value = info.added_tokens[value] if len(value) > 1 else character_ids(value)[0]
        ids.append(value)
        after = place > 0 and laid[place - 1][0] in ("marker", "end of listing")
        mask.append(kind not in ("begin", "padding", "marker", "start of listing") and not after)
    return ids, mask


@quick
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=12).filter(any),
    st.integers(64, 130),
    st.sampled_from([THREE, MIXED, always(hop_tokens=4)]),
    st.sampled_from(["uniform", "equal"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_rows_equal_those_of_plain_lists(
    tmp_path_factory, tokenizer, lengths, row_tokens, kinds, cuts, ordered, backtracing, seed
):
    fields = {"row_tokens": row_tokens, "row_kinds": kinds, "cuts": cuts, "seed": seed}
    fields |= {"preserve_partial_order": ordered, "enable_backtracing": backtracing}
    rows, _, documents = make_rows(tmp_path_factory.mktemp("rows"), tokenizer, lengths, **fields)
    config = utk.UtkConfig(**fields)
    slow = [
        slow_record(slow_row(pieces, config, index), row_tokens, tokenizer[1])
        for index, pieces in enumerate(slow_stream_rows(documents, row_tokens, seed))
    ]
    order = seeded_rng(seed, "utk", "rows").permutation(len(slow))
    assert [(row["input_ids"], row["loss_mask"]) for row in rows] == [slow[index] for index in order]


def knotted(lengths, seed=0, index=0, **fields):
    return utk.draw_knot(utk.UtkConfig(row_tokens=99, seed=seed, **fields), index, lengths)


@quick
@given(st.lists(st.integers(1, 80), min_size=1, max_size=9), st.integers(0, 99), st.booleans())
def test_every_chunk_is_placed_once_and_the_last_stays_last(lengths, index, ordered):
    knot = knotted(lengths, index=index, row_kinds=MIXED, preserve_partial_order=ordered)
    for document, length in enumerate(lengths):
        own = sorted((chunk for chunk in knot.chunks if chunk.document == document), key=lambda chunk: chunk.number)
        assert [chunk.number for chunk in own] == list(range(len(own)))
        assert [chunk.start for chunk in own] == [0, *(chunk.end for chunk in own[:-1])]
        assert own[-1].end == length and all(chunk.start < chunk.end for chunk in own)
        assert [chunk.is_last for chunk in own] == [False] * (len(own) - 1) + [True]
    last = knot.chunks[-1]
    assert last.document == len(lengths) - 1 and last.is_last


@quick
@given(st.lists(st.integers(3, 80), min_size=2, max_size=9), st.integers(0, 99))
def test_partial_order_keeps_each_documents_chunks_in_order(lengths, index):
    knot = knotted(lengths, index=index, row_kinds=THREE)
    for document in range(len(lengths)):
        own = [chunk.number for chunk in knot.chunks if chunk.document == document]
        assert own == [0, 1, 2]


def test_without_partial_order_chunks_come_in_any_order_and_documents_are_mixed():
    orders, interleaved = set(), 0
    for index in range(60):
        knot = knotted([30, 30], index=index, row_kinds=THREE, preserve_partial_order=False)
        orders.add(tuple(chunk.number for chunk in knot.chunks if chunk.document == 0))
        interleaved += [chunk.document for chunk in knot.chunks] not in ([0] * 3 + [1] * 3, [1] * 3 + [0] * 3)
    assert len(orders) == 6
    assert interleaved > 30


def test_cuts_are_distinct_and_uniform():
    config = utk.UtkConfig(row_tokens=99, row_kinds=THREE)
    rng = np.random.default_rng(0)
    counts = np.zeros(10)
    for _ in range(3000):
        first, second = utk.draw_cuts(config, THREE[1], 10, rng)
        assert 1 <= first < second <= 9
        counts[[first, second]] += 1
    assert all(abs(counts[1:] - 3000 * 2 / 9) < 100)


def test_cuts_by_hand():
    rng = np.random.default_rng(0)
    equal = utk.UtkConfig(row_tokens=99, row_kinds=THREE, cuts="equal")
    assert utk.draw_cuts(equal, THREE[1], 11, rng) == [3, 6]
    assert utk.draw_cuts(equal, THREE[1], 2, rng) == []
    hops = utk.RowKind(rows_fraction=1, hop_tokens=4)
    assert utk.draw_cuts(equal, hops, 12, rng) == [4, 8]
    assert utk.draw_cuts(equal, hops, 4, rng) == []


def test_the_share_of_cut_rows_is_the_share_asked_for():
    config = utk.UtkConfig(row_tokens=99)
    cut = sum(utk.draw_knot(config, index, [40, 50]).is_cut for index in range(3000))
    assert 0.27 < cut / 3000 < 0.33


def test_a_row_depends_on_its_index_and_not_on_how_many_there_are():
    config = utk.UtkConfig(row_tokens=99, row_kinds=MIXED, enable_backtracing=True)
    alone = utk.draw_knot(config, 17, [40, 9])
    many = [utk.draw_knot(config, index, [40, 9]) for index in range(20)]
    assert many[17] == alone
    assert len({str(knot) for knot in many}) > 10


def test_markers_stand_at_the_cuts_and_differ(tmp_path, tokenizer):
    (row,), artifact, _ = make_rows(tmp_path, tokenizer, [12], row_tokens=64, row_kinds=THREE)
    names = {number: token for token, number in tokenizer[1].added_tokens.items()}
    first, second, third = row["segments"]
    ends = [segment["row_start"] + segment["num_tokens"] for segment in row["segments"]]
    assert names[row["input_ids"][ends[0]]] == "<|tail0|>"
    assert names[row["input_ids"][second["row_start"] - 1]] == "<|head1|>"
    assert names[row["input_ids"][ends[1]]] == "<|tail1|>"
    assert names[row["input_ids"][third["row_start"] - 1]] == "<|head2|>"
    assert first["row_start"] == 1
    assert artifact.counts["num_rows_cut"] == 1


def test_listings_name_the_chunks_in_their_original_order_after_the_last_placed(tmp_path, tokenizer):
    fields = {"row_kinds": THREE, "preserve_partial_order": False, "enable_backtracing": True}
    rows, _, _ = make_rows(tmp_path, tokenizer, [40, 30, 50], row_tokens=400, **fields)
    open_id, close_id, listing, between, end = (tokenizer[1].added_tokens[token] for token in utk.BACKTRACING_TOKENS)
    (row,) = rows
    ids = row["input_ids"]
    assert ids.count(listing) == ids.count(end) == 3, "the last document is listed too"
    for doc_id in ("d000", "d001", "d002"):
        segments = [segment for segment in row["segments"] if segment["doc_id"] == doc_id]
        name_of = {}
        for segment in segments:
            opened = max(place for place in range(segment["row_start"]) if ids[place] == open_id)
            name_of[segment["start"]] = ids[opened + 1 : ids.index(close_id, opened)]
        expected = [name_of[start] for start in sorted(name_of)]
        begin = ids.index(listing, segments[-1]["row_start"])
        assert begin - segments[-1]["row_start"] - segments[-1]["num_tokens"] <= 2, "it follows the last chunk"
        found = ids[begin + 1 : ids.index(end, begin)]
        assert found == [*expected[0], between, *expected[1], between, *expected[2]]
        assert all(row["loss_mask"][begin + 1 : ids.index(end, begin) + 1]), "listings are learnt"
        assert not row["loss_mask"][begin]


def test_no_target_follows_a_listing_even_where_text_follows(tmp_path, tokenizer):
    fields = {"row_kinds": THREE, "enable_backtracing": True}
    rows, _, _ = make_rows(tmp_path, tokenizer, [30, 1, 1, 1] * 12, row_tokens=400, **fields)
    end = tokenizer[1].added_tokens["</S>"]
    followed = [
        (row["loss_mask"][place + 1], row["input_ids"][place + 1])
        for row in rows
        for place in range(399)
        if row["input_ids"][place] == end
    ]
    assert not any(target for target, _ in followed)
    assert any(token >= 100 for _, token in followed), "the case occurred"


def test_a_row_in_which_nothing_is_cut_stays_as_it_is():
    kinds = (utk.RowKind(rows_fraction=1, chunk_probabilities=(1.0, 0)),)
    for index in range(10):
        knot = knotted([5, 6, 7, 8], index=index, row_kinds=kinds)
        assert [chunk.document for chunk in knot.chunks] == [0, 1, 2, 3]
        assert not knot.is_cut


def test_documents_that_are_not_cut_get_neither_markers_nor_ids(tmp_path, tokenizer):
    kinds = always(chunk_probabilities=(0, 0, 1.0))
    rows, _, _ = make_rows(tmp_path, tokenizer, [1] * 40, row_tokens=64, row_kinds=kinds, enable_backtracing=True)
    assert all(token in (BOS, EOS) or token >= 100 for row in rows for token in row["input_ids"])


def test_plain_rows_are_the_concatenated_documents(tmp_path, tokenizer):
    kinds = (utk.RowKind(rows_fraction=1, chunk_probabilities=(1.0,)),)
    rows, artifact, _ = make_rows(tmp_path, tokenizer, row_tokens=70, row_kinds=kinds)
    assert artifact.counts["num_tokens_trimmed"] == artifact.counts["num_rows_cut"] == 0
    assert artifact.counts["num_tokens_kept"] == sum(LENGTHS)
    assert {row["attention"] for row in rows} == {"causal"}


def test_what_markers_push_over_the_end_is_counted(tmp_path, tokenizer):
    rows, artifact, _ = make_rows(tmp_path, tokenizer, row_tokens=70, row_kinds=THREE)
    assert artifact.counts["num_tokens_trimmed"] > 0
    assert artifact.counts["num_rows_cut"] == len(rows)


def test_the_last_row_is_dropped_when_asked_and_counted(tmp_path, tokenizer):
    _, artifact, _ = make_rows(tmp_path, tokenizer, row_tokens=70, row_kinds=THREE, partial_row="drop")
    assert artifact.counts["num_tokens_padding"] == 0
    assert 0 < artifact.counts["num_tokens_dropped_partial_row"] < 70


def test_a_limit_keeps_the_first_rows_of_the_shuffle(tmp_path, tokenizer):
    every, _, _ = make_rows(tmp_path / "all", tokenizer, row_tokens=70)
    three, artifact, _ = make_rows(tmp_path / "three", tokenizer, row_tokens=70, num_rows=3)
    assert three == every[:3]
    assert artifact.counts["num_tokens_dropped_over_limit"] > 0


def test_added_tokens_are_those_that_the_config_inserts():
    assert utk.marker_tokens(1) == ()
    assert utk.marker_tokens(3) == ("<|tail0|>", "<|head1|>", "<|tail1|>", "<|head2|>")
    assert len(set(utk.marker_tokens(9))) == 16
    assert utk.added_tokens(utk.UtkConfig(row_tokens=99)) == utk.marker_tokens(3)
    everything = utk.UtkConfig(row_tokens=99, row_kinds=MIXED, enable_backtracing=True)
    assert utk.added_tokens(everything) == EVERY_TOKEN


def test_a_marker_that_the_tokenizer_lacks_is_named(tmp_path):
    inputs = {"tokens": write_tokens(tmp_path / "tokens", {"a": [100]}, tokenizer_info(["<|tail0|>"]))}
    with pytest.raises(ValueError, match=r"'<\|head1\|>', which the tokenizer lacks: add it to encode.added_tokens"):
        run_stage(utk, utk.UtkConfig(row_tokens=99), inputs, tmp_path / "out")


def test_backtracing_needs_the_tokenizer_of_the_tokens(tmp_path, tokenizer):
    config = utk.UtkConfig(row_tokens=99, enable_backtracing=True)
    inputs = {"tokens": write_tokens(tmp_path / "tokens", {"a": [100]}, tokenizer_info(EVERY_TOKEN))}
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json: give slot tokenizer"):
        run_stage(utk, config, inputs, tmp_path / "without")
    with pytest.raises(ValueError, match="is not the tokenizer that slot tokens was encoded with"):
        run_stage(utk, config, inputs | {"tokenizer": tokenizer[0]}, tmp_path / "other")


EITHER = "either chunk_probabilities or hop_tokens"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows_fraction": 1}, EITHER),
        (
            {"rows_fraction": 1, "hop_tokens": 4, "chunk_probabilities": (1,)},
            EITHER,
        ),
        (
            {"rows_fraction": 1, "chunk_probabilities": (0.5, 0.4)},
            "chunk_probabilities must be",
        ),
        ({"rows_fraction": 0.5, "hop_tokens": 4}, "rows_fraction of row_kinds must be non-negative and add up"),
    ],
)
def test_bad_row_kinds_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        utk.UtkConfig(row_tokens=99, row_kinds=(utk.RowKind(**fields),))
