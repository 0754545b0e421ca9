import hashlib
import string

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from orders_of_work import run_backwards
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
from ropewalk.stages.data.packing import knot_rules
from ropewalk.stages.data.packing.knot_rules import RowKind
from ropewalk.stages.schema import (
    Artifact,
    read_artifact,
    read_table,
    seeded_rng,
    tokens_schema,
    write_artifact,
    write_shard,
)

quick = settings(deadline=None, max_examples=40)
CHARACTERS = string.ascii_letters + string.digits
FIRST_CHARACTER_ID = 20
EVERY_TOKEN = (*knot_rules.marker_tokens(4), *knot_rules.HOP_TOKENS, *knot_rules.BACKTRACING_TOKENS)
LENGTHS = [40, 3, 90, 17, 0, 1, 28, 150, 9, 2, 33]
PLAIN = RowKind(rows_fraction=0, chunk_probabilities=(1.0,))


def always(**kind):
    return (PLAIN, RowKind(rows_fraction=1, **kind))


TURNS = (
    RowKind(rows_fraction=0.6, chunk_probabilities=(0.2, 0.3, 0.5), arrangement="turns"),
    RowKind(rows_fraction=0.2, hop_tokens=7, arrangement="turns"),
    RowKind(rows_fraction=0.2, chunk_probabilities=(0.5, 0.5)),
)
THREE = always(chunk_probabilities=(0, 0, 1.0))
MIXED = (
    RowKind(rows_fraction=0.3, chunk_probabilities=(1.0,)),
    RowKind(rows_fraction=0.5, chunk_probabilities=(0.2, 0.3, 0.3, 0.2)),
    RowKind(rows_fraction=0.2, hop_tokens=5),
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
    if kind.arrangement == "turns":
        return chunks
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
    elif kind.arrangement == "turns":
        rounds = range(max(map(len, chunks)))
        order = [(number, chunk) for chunk in rounds for number in range(len(chunks)) if chunk < len(chunks[number])]
    else:
        places = list(rng.permutation(total - 1))
        at = {total - 1: (len(chunks) - 1, len(chunks[-1]) - 1)}
        for number, own in enumerate(chunks):
            mine = [places.pop(0) for _ in range(len(own) - (number == len(chunks) - 1))]
            for chunk, place in enumerate(sorted(mine) if config.preserve_partial_order else mine):
                at[place] = (number, chunk)
        order = [at[place] for place in range(total)]
    if not config.enable_backtracing or kind.arrangement == "turns":
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
    st.sampled_from([THREE, MIXED, TURNS, always(hop_tokens=4)]),
    st.sampled_from(["uniform", "equal"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
# Documents that fill their rows to the last token: there is no room for a separator.
@example([69] * 6, 70, THREE, "uniform", True, False, 0)
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
    open_id, close_id, listing, between, end = (
        tokenizer[1].added_tokens[token] for token in knot_rules.BACKTRACING_TOKENS
    )
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


def test_documents_that_are_not_cut_get_neither_markers_nor_ids(tmp_path, tokenizer):
    kinds = always(chunk_probabilities=(0, 0, 1.0))
    rows, _, _ = make_rows(tmp_path, tokenizer, [1] * 40, row_tokens=64, row_kinds=kinds, enable_backtracing=True)
    assert all(token in (BOS, EOS) or token >= 100 for row in rows for token in row["input_ids"])


def test_plain_rows_are_the_concatenated_documents(tmp_path, tokenizer):
    kinds = (RowKind(rows_fraction=1, chunk_probabilities=(1.0,)),)
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


@quick
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=25).filter(any),
    st.integers(64, 130),
    st.sampled_from([THREE, MIXED, TURNS]),
    st.integers(1, 900),
    st.booleans(),
)
def test_every_token_is_kept_or_counted_for_any_units(
    tmp_path_factory, tokenizer, lengths, row_tokens, kinds, group_tokens, backtracing
):
    fields = {"row_tokens": row_tokens, "row_kinds": kinds, "group_tokens": group_tokens}
    _, artifact, _ = make_rows(
        tmp_path_factory.mktemp("rows"), tokenizer, lengths, enable_backtracing=backtracing, **fields
    )
    counts = artifact.counts
    assert counts["num_tokens_kept"] + counts["num_tokens_trimmed"] == counts["num_tokens_in"] == sum(lengths)


@quick
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.integers(0, 99),
    st.sampled_from([THREE, MIXED, TURNS]),
    st.booleans(),
)
def test_rows_reassemble_into_the_documents_they_came_from(
    tmp_path_factory, tokenizer, lengths, seed, kinds, backtracing
):
    # One row with room for all markers.
    fields = {"row_tokens": 8000, "row_kinds": kinds, "seed": seed, "enable_backtracing": backtracing}
    (row,), artifact, documents = make_rows(tmp_path_factory.mktemp("rows"), tokenizer, lengths, **fields)
    assert artifact.counts["num_tokens_trimmed"] == 0
    found = {name: [] for name in documents}
    for segment in sorted(row["segments"], key=lambda segment: segment["start"]):
        end = segment["row_start"] + segment["num_tokens"]
        found[segment["doc_id"]] += row["input_ids"][segment["row_start"] : end]
    assert found == documents


@quick
@given(st.lists(st.integers(3, 60), min_size=1, max_size=8), st.integers(0, 99), st.booleans())
def test_ids_and_listings_alone_reassemble_the_documents(tmp_path_factory, tokenizer, lengths, seed, ordered):
    fields = {"row_tokens": 4000, "row_kinds": THREE, "seed": seed, "preserve_partial_order": ordered}
    (row,), _, documents = make_rows(
        tmp_path_factory.mktemp("rows"), tokenizer, lengths, enable_backtracing=True, **fields
    )
    chunks, listings = read_row(row["input_ids"], tokenizer[1].added_tokens)
    texts = [[token for name in names for token in chunks[name]] for names in listings]
    assert sorted(texts) == sorted([*ids, EOS] for ids in documents.values())


def read_row(ids, added):
    """The chunks by id, and the listings, that a row of nothing but cut documents spells."""
    names = {number: token for token, number in added.items()}
    chunks, listings, name, into = {}, [], "", None
    for token in ids[1:]:
        sign = names.get(token, "")
        if sign in ("<D>", "<S>"):
            name, into = "", sign
            listings += [[]] if sign == "<S>" else []
        elif sign == "</D>":
            chunks[name], into = [], "text"
        elif sign in ("<s>", "</S>"):
            listings[-1].append(name)
            name = ""
        elif into == "text" and (token == EOS or not sign):
            chunks[name].append(token)
            into = None if token == EOS else into
        elif into in ("<D>", "<S>") and token != EOS:
            name += CHARACTERS[token - FIRST_CHARACTER_ID]
    return chunks, listings


def test_documents_take_turns(tmp_path, tokenizer):
    kinds = (RowKind(rows_fraction=1, hop_tokens=4, arrangement="turns"),)
    (row,), artifact, _ = make_rows(tmp_path, tokenizer, [10, 3, 6], row_tokens=64, row_kinds=kinds)
    order = [f"d{number:03d}" for number in seeded_rng(0, "utk", "documents").permutation(3)]
    pieces = {"d000": [0, 4, 8], "d001": [0], "d002": [0, 4]}
    turns = [(name, pieces[name][turn]) for turn in range(3) for name in order if turn < len(pieces[name])]
    assert [(segment["doc_id"], segment["start"]) for segment in row["segments"]] == turns
    assert artifact.counts["num_tokens_inserted"] == 4, "the begin token and separators, and no marker"
    assert row["loss_mask"] == [False, *[True] * 22, *[False] * 41]


def test_the_order_in_which_units_are_done_changes_no_byte(tmp_path, tokenizer):
    where, info = tokenizer
    inputs = {"tokens": write_tokens(tmp_path / "tokens", numbered_documents(LENGTHS * 4), info), "tokenizer": where}
    config = utk.UtkConfig(row_tokens=70, row_kinds=MIXED, enable_backtracing=True, group_tokens=300)
    folders = run_stage(utk, config, inputs, tmp_path / "on"), run_backwards(utk, config, inputs, tmp_path / "back")
    forth, back = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert forth == back
    assert read_artifact(folders[0]).details["num_units"] > 3


def test_every_unit_draws_its_own_knots(tmp_path, tokenizer):
    # Two shards of seven documents, in each a long one; rows hold pieces of it only.
    rows, artifact, _ = make_rows(
        tmp_path, tokenizer, [69 * 20, *[0] * 6] * 2, row_tokens=70, row_kinds=THREE, group_tokens=69 * 20
    )
    assert artifact.details["num_units"] == 2
    cuts = {"d000": [], "d007": []}
    for row in sorted(rows, key=lambda row: row["segments"][0]["start"]):
        cuts[row["segments"][0]["doc_id"]].append([segment["num_tokens"] for segment in row["segments"]])
    assert len(cuts["d000"]) == len(cuts["d007"]) == 20
    assert sum(one == other for one, other in zip(*cuts.values(), strict=True)) < 3


def test_several_units_pad_one_row_at_most(tmp_path, tokenizer):
    kinds = (RowKind(rows_fraction=1, chunk_probabilities=(1.0,)),)
    fields = {"row_tokens": 70, "row_kinds": kinds, "group_tokens": 300}
    rows, artifact, _ = make_rows(tmp_path / "pad", tokenizer, LENGTHS * 4, **fields)
    assert artifact.details["num_units"] > 3
    assert sum(row["input_ids"][-2:] == [EOS, EOS] for row in rows) <= 1
    _, artifact, _ = make_rows(tmp_path / "drop", tokenizer, LENGTHS * 4, partial_row="drop", **fields)
    assert artifact.counts["num_tokens_padding"] == 0


def test_rows_of_chats_learn_what_the_tokens_say(tmp_path):
    record = {"doc_id": "a", "source": "test", "input_ids": list(range(100, 120)), "loss_mask": [False, True] * 10}
    table = pa.Table.from_pylist([record], schema=tokens_schema(loss_mask=True))
    write_shard(tmp_path / "tokens", "tokens", 0, table)
    info = tokenizer_info(knot_rules.marker_tokens(3))
    write_artifact(tmp_path / "tokens", Artifact(kind="tokens", tokenizer=info))
    config = utk.UtkConfig(row_tokens=64, row_kinds=THREE)
    (row,) = read_table(run_stage(utk, config, {"tokens": tmp_path / "tokens"}, tmp_path / "out"), "rows").to_pylist()
    heads = {segment["row_start"] for segment in row["segments"][1:]}
    for place, (token, target) in enumerate(zip(row["input_ids"], row["loss_mask"], strict=True)):
        if token >= 100:
            assert target == (token % 2 == 1 and place not in heads)


def test_a_gigantic_document_is_cut_in_each_of_its_rows(tmp_path, tokenizer):
    rows, artifact, _ = make_rows(tmp_path, tokenizer, [0, 5000, 2], row_tokens=70, row_kinds=THREE)
    assert artifact.counts["num_rows_cut"] == len(rows) == -(-5004 // 69)
    # Two rows hold the end of one document and another; of a few, markers push a short last chunk over the end.
    assert sum(len(row["segments"]) == 3 for row in rows) > 0.8 * len(rows)


def test_documents_without_tokens_are_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="every document of slot tokens is empty"):
        make_rows(tmp_path, tokenizer, [0, 0], row_tokens=70)


def test_dropping_the_only_row_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="drops the only row: the tokens do not fill row_tokens once"):
        make_rows(tmp_path, tokenizer, [3, 4], row_tokens=70, partial_row="drop")
