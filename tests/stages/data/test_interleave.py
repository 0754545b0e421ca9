import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbour_artifacts import pool_by_hand, topical_vectors, write_neighbours
from row_invariants import assert_rows_are_sound, numbered_documents, run_stage, write_documents, write_tokens

from ropewalk.stages.data import chunk_documents, interleave
from ropewalk.stages.data.retrieval.pool import Pool
from ropewalk.stages.schema import read_artifact, read_table

quick = settings(deadline=None, max_examples=60)


def config_of(row_tokens, **changes):
    return interleave.NextlongConfig(row_tokens=row_tokens, **{"chunk_tokens": 4, "min_remainder_tokens": 2} | changes)


def rows_of(config, lengths, pool, key=0):
    return interleave.interleave(config, np.asarray(lengths, np.int64), pool, key).plan.to_rows()


def chunk_ids(counts):
    """Ids of chunks of documents with so many each."""
    return [f"doc{document}#{chunk:06d}" for document, count in enumerate(counts) for chunk in range(count)]


@quick
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=25),
    st.integers(2, 40),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from([0.2, 0.5, 0.9]),
    st.integers(0, 3),
)
def test_no_token_is_used_twice_and_rows_are_full(lengths, row_tokens, chunk_tokens, min_remainder, fraction, seed):
    pool = Pool.from_vectors([f"d{n:02d}" for n in range(len(lengths))], topical_vectors(len(lengths)), 3)
    config = config_of(
        row_tokens, chunk_tokens=chunk_tokens, min_remainder_tokens=min_remainder, max_base_fraction=fraction
    )
    walk = interleave.interleave(config, np.asarray(lengths, np.int64), pool, seed)
    assert_whole_and_full(walk, lengths, row_tokens, ends=np.ones(len(lengths), bool))


@quick
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8), st.integers(8, 40), st.integers(0, 9))
def test_no_token_of_chunks_is_used_twice_and_rows_are_full(counts, row_tokens, seed):
    ids = chunk_ids(counts)
    lengths = np.random.default_rng(seed).integers(1, 10, size=len(ids))
    pool = Pool.from_vectors(ids, topical_vectors(len(ids)), 3)
    walk = interleave.interleave(config_of(row_tokens, level="chunk"), lengths, pool, seed)
    ends = np.asarray(
        [position + 1 == len(ids) or ids[position + 1].endswith("000000") for position in range(len(ids))]
    )
    assert_whole_and_full(walk, lengths.tolist(), row_tokens, ends)


def assert_whole_and_full(walk, lengths, row_tokens, ends):
    placed = [set() for _ in lengths]
    for row in walk.plan.to_rows():
        filled = 0
        for place, piece in enumerate(row):
            tokens = set(range(piece.start, piece.start + piece.num_tokens))
            assert tokens and not tokens & placed[piece.document] and max(tokens) < lengths[piece.document]
            placed[piece.document] |= tokens
            assert piece.is_end == (max(tokens) + 1 == lengths[piece.document] and ends[piece.document])
            # The last separator may fall off the row.
            filled += piece.num_tokens + (piece.is_end and place + 1 < len(row))
        assert filled <= row_tokens - 1
    assert not walk.plan.room(row_tokens - 1)[:-1].any()
    assert sum(map(len, placed)) + walk.counts["num_tokens_trimmed"] == sum(lengths)


def test_each_chunk_of_the_base_begins_a_span_of_look_alikes():
    # Three chunks of four tokens, spans of twelve; negatives of four tokens and a separator, in turns.
    pool = pool_by_hand([f"d{n}" for n in range(9)], {0: [1, 2, 3, 4, 5, 6, 7, 8]}, 8)
    row, *_ = rows_of(config_of(37), [12, 4, 4, 4, 4, 4, 4, 4, 4], pool)
    assert [(piece.document, piece.start) for piece in row if piece.document == 0] == [(0, 0), (0, 4), (0, 8)]
    places = np.cumsum([0, *(piece.num_tokens + piece.is_end for piece in row)]).tolist()
    begins = [begin for begin, piece in zip(places, row, strict=False) if piece.document == 0]
    assert begins[0] == 0 and abs(begins[1] - 12) <= 1 and abs(begins[2] - 24) <= 2
    spans = [[piece.document for piece in row[a:b]] for a, b in ((0, 3), (3, 6), (6, 9))]
    assert [span[:2] for span in spans] == [[0, 1], [0, 2], [0, 3]]


def test_long_negatives_give_one_chunk_a_row_and_their_rest_goes_back():
    pool = pool_by_hand(["d0", "d1", "d2"], {0: [1, 2], 1: [0, 2], 2: [0, 1]}, 2)
    rows = rows_of(config_of(17), [8, 9, 9], pool)
    first = {piece.document: piece for piece in rows[0]}
    assert all(sum(piece.document == document for piece in rows[0]) <= 2 for document in first)
    assert sum(piece.num_tokens for row in rows for piece in row) >= 24


def test_the_base_takes_no_more_than_its_share():
    pool = pool_by_hand([f"d{n:02d}" for n in range(20)], {}, 1)
    rows = rows_of(config_of(21, max_base_fraction=0.4), [100] + [3] * 19, pool)
    assert [piece.num_tokens for piece in rows[0] if piece.document == 0] == [4, 4]
    # What is left is the base of a later row.
    assert [piece.start for piece in rows[1] if piece.document == 0] == [8, 12]


def test_chunks_bring_in_chunks_of_other_documents():
    ids = chunk_ids([3, 3, 3, 3])
    # Nearest are the siblings, which the row must not bring in as negatives.
    order = {
        n: [m for m in range(n // 3 * 3, n // 3 * 3 + 3) if m != n] + [(n + 3) % 12, (n + 6) % 12] for n in range(12)
    }
    pool = pool_by_hand(ids, order, 4)
    rows = rows_of(config_of(31, level="chunk"), [5] * 12, pool)
    first = [piece.document for piece in rows[0]]
    base = first[0] // 3
    assert [document for document in first if document // 3 == base] == [3 * base, 3 * base + 1, 3 * base + 2]
    negatives = [document for document in first if document // 3 != base]
    assert first[1] == (first[0] + 3) % 12 and first[first.index(3 * base + 1) + 1] == (3 * base + 4) % 12
    assert len(negatives) >= 3


def test_chunks_beyond_the_share_of_the_base_are_no_negatives():
    ids = chunk_ids([4, *[1] * 12])
    pool = pool_by_hand(ids, {n: [m for m in range(16) if m != n] for n in range(16)}, 15)
    rows = rows_of(config_of(41, level="chunk", max_base_fraction=0.4), [8] * 4 + [4] * 12, pool)
    # Two chunks of eight are the share; the others are the nearest, but the base of the next row.
    assert [piece.document for piece in rows[0] if piece.document < 4] == [0, 1]
    assert [piece.document for piece in rows[1] if piece.document < 4][:2] == [2, 3]


def test_a_chunk_longer_than_its_span_takes_from_the_others():
    ids = chunk_ids([3, *[1] * 30])
    pool = pool_by_hand(ids, {n: [m for m in range(3, 33) if m != n] for n in range(33)}, 30)
    for longest in range(3):
        lengths = [3] * 33
        lengths[longest] = 12
        row, *_ = rows_of(config_of(31, level="chunk", max_base_fraction=0.9), lengths, pool)
        sizes = [piece.num_tokens + piece.is_end for piece in row]
        assert sum(sizes[:-1]) + row[-1].num_tokens <= 30 <= sum(sizes)
        assert [piece.document for piece in row if piece.document < 3] == [0, 1, 2]


def test_negatives_are_more_alike_than_random_ones():
    lengths = np.random.default_rng(0).integers(5, 40, size=200)
    pool = Pool.from_vectors([f"d{n:03d}" for n in range(200)], topical_vectors(200), 8)
    shares = []
    for row in rows_of(config_of(101, chunk_tokens=8), lengths, pool)[:20]:
        shares += [piece.document % 4 == row[0].document % 4 for piece in row if piece.document != row[0].document]
    assert np.mean(shares) > 0.9


@pytest.mark.parametrize("num_clusters", [1, 3])
@pytest.mark.parametrize("partial_row", ["pad", "drop"])
def test_rows_account_for_every_token(tmp_path, num_clusters, partial_row):
    documents = numbered_documents([3 + 13 * n % 50 for n in range(40)] + [0, 300])
    vectors = dict(zip(documents, topical_vectors(len(documents)), strict=True))
    names = list(documents)
    clusters = [{name: vectors[name] for name in names[part::num_clusters]} for part in range(num_clusters)]
    inputs = {
        "tokens": write_tokens(tmp_path / "tokens", documents),
        "neighbours": write_neighbours(tmp_path / "neighbours", clusters),
    }
    config = config_of(49, chunk_tokens=6, partial_row=partial_row)
    data = run_stage(interleave, config, inputs, tmp_path / "out")
    interleave.check(config, data)
    rows = assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert {row["attention"] for row in rows} == {"causal"}
    assert artifact.counts["num_tokens_padding"] < 49
    assert artifact.details["similarity_adjacent"] > artifact.details["similarity_random"]
    edges = read_table(data, "edges").to_pylist()
    segments = {(row["row_id"], segment["doc_id"]) for row in rows for segment in row["segments"]}
    assert len(edges) > 20
    assert all((edge["row_id"], edge["child_doc_id"]) in segments for edge in edges)


def test_rows_of_chunks_account_for_every_token(tmp_path):
    numbered = numbered_documents([4 + 5 * n % 9 for n in range(60)])
    documents = dict(zip(chunk_ids([1 + n % 5 for n in range(20)]), numbered.values(), strict=True))
    vectors = dict(zip(documents, topical_vectors(len(documents)), strict=True))
    names = list(documents)
    # Some documents have chunks in both clusters.
    clusters = [{name: vectors[name] for name in part} for part in (names[:31], names[31:])]
    inputs = {
        "tokens": write_tokens(tmp_path / "tokens", documents),
        "neighbours": write_neighbours(tmp_path / "neighbours", clusters),
    }
    data = run_stage(interleave, config_of(65, level="chunk"), inputs, tmp_path / "out")
    rows = assert_rows_are_sound(data, documents)
    assert read_artifact(data).counts["num_tokens_padding"] < 65
    names_of = [[segment["doc_id"].split("#")[0] for segment in row["segments"]] for row in rows]
    assert sum(max(map(row.count, row)) > 1 for row in names_of) > len(rows) / 2


def test_documents_that_are_no_chunks_are_named():
    pool = pool_by_hand(["d0"], {}, 1)
    with pytest.raises(ValueError, match="'d0' is no chunk"):
        interleave.interleave(config_of(20, level="chunk"), np.asarray([3]), pool)


@quick
@given(st.text(max_size=80), st.integers(1, 20))
def test_chunks_joined_are_the_text(text, most):
    chunks = list(chunk_documents.cut_text(text, most))
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= most for chunk in chunks)


def test_lines_are_put_together_and_only_long_ones_cut():
    assert list(chunk_documents.cut_text("one\ntwo\nthree\n" + 12 * "x" + "\nend", 9)) == [
        "one\ntwo\n",
        "three\n",
        "xxxxxxxxx",
        "xxx\nend",
    ]


def test_chunks_are_documents_with_their_place(tmp_path):
    texts = {"a": "one\ntwo\nthree\n", "b": "", "c#1": "four"}
    documents = write_documents(tmp_path / "documents", texts)
    data = run_stage(
        chunk_documents, chunk_documents.ChunkConfig(chunk_characters=8), {"documents": documents}, tmp_path / "out"
    )
    chunk_documents.check(None, data)
    chunks = read_table(data, "documents").to_pylist()
    assert [chunk["doc_id"] for chunk in chunks] == ["a#000000", "a#000001", "c#1#000000"]
    assert [chunk["metadata"] for chunk in chunks][1] == '{"chunk_start_characters": 8}'
    counts = read_artifact(data).counts
    assert (counts["num_in"], counts["num_dropped_empty"], counts["num_kept"]) == (3, 1, 3)
    assert interleave.group_chunks([chunk["doc_id"] for chunk in chunks]) == [[0, 1], [2]]


def test_a_corpus_without_text_cannot_be_cut(tmp_path):
    documents = write_documents(tmp_path / "documents", {"a": ""})
    with pytest.raises(ValueError, match="every document is empty"):
        run_stage(chunk_documents, chunk_documents.ChunkConfig(), {"documents": documents}, tmp_path / "out")
