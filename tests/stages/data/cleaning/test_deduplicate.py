import json
import random
import sysconfig
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from cleaning_corpus import file_bytes, texts, write_corpus
from datasketch import MinHash, MinHashLSH
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import run_stage

from ropewalk.stages.data.cleaning import candidates, deduplicate
from ropewalk.stages.data.cleaning.deduplicate import DeduplicateConfig, choose_bands, choose_kept
from ropewalk.stages.data.cleaning.signatures import Shingles, Signer
from ropewalk.stages.data.cleaning.words import WordHashes
from ropewalk.stages.schema import read_artifact, read_table

VOCABULARY = [f"w{number}" for number in range(3000)]


def edited(words, share, rng):
    """A copy with this share of the words replaced."""
    return [rng.choice(VOCABULARY) if rng.random() < share else word for word in words]


def families(seed=0, num_families=12, copies=3, length=300, share=0.003):
    """Documents of which several at a time are nearly the same, in a shuffled order."""
    rng = random.Random(seed)
    made = {}
    for family in range(num_families):
        original = [rng.choice(VOCABULARY) for _ in range(length)]
        for copy in range(copies):
            made[f"s{family % 3}/f{family:02d}c{copy}"] = " ".join(edited(original, share if copy else 0, rng))
    names = list(made)
    rng.shuffle(names)
    return {name: made[name] for name in names}


def shingle_set(text, n):
    """The n-grams of a text as tuples of words; independent of the stage's hashes."""
    words = text.lower().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()


def jaccard(left, right):
    return len(left & right) / len(left | right)


def components(names, pairs):
    """Connected components, each as the set of its names, by repeated merging."""
    groups = [{name} for name in names]
    for left, right in pairs:
        first = next(group for group in groups if left in group)
        if right not in first:
            second = next(group for group in groups if right in group)
            groups.remove(second)
            first |= second
    return groups


def run(tmp_path, documents, name="out", shard_records=12, **fields):
    source = tmp_path / f"in-{shard_records}"
    if not source.exists():
        write_corpus(source, documents, shard_records=shard_records)
    return run_stage(deduplicate, DeduplicateConfig(**fields), {"documents": source}, tmp_path / name)


def test_one_document_of_each_family_stays_as_brute_force_says(tmp_path):
    documents = families()
    out = run(tmp_path, documents)
    sets = {name: shingle_set(text, 5) for name, text in documents.items()}
    exact = {pair: jaccard(sets[pair[0]], sets[pair[1]]) for pair in combinations(documents, 2)}
    # No pair is near the threshold, so estimates cannot differ from exact similarities about it.
    assert all(similarity > 0.86 or similarity < 0.1 for similarity in exact.values())
    groups = components(documents, [pair for pair, similarity in exact.items() if similarity >= 0.8])
    assert set(texts(out)) == {min(group, key=list(documents).index) for group in groups}
    assert list(texts(out)) == [name for name in documents if name in texts(out)]
    counts = read_artifact(out).counts
    assert (counts["num_in"], counts["num_kept"], counts["num_dropped_near_duplicate"]) == (36, 12, 24)
    for row in read_table(out, "duplicates").to_pylist():
        assert any({row["doc_id"], row["kept_doc_id"]} <= group for group in groups)
        pair = tuple(sorted((row["doc_id"], row["kept_doc_id"]), key=list(documents).index))
        assert abs(row["similarity"] - exact[pair]) < 0.15
        assert row["source"] == row["doc_id"].split("/")[0]
    assert sum(read_artifact(out).details["dropped_by_source"].values()) == 24


def test_similarities_estimate_the_exact_ones():
    rng = random.Random(1)
    words = [rng.choice(VOCABULARY) for _ in range(400)]
    shingles, signer = Shingles("word", 3), Signer(512, 1)
    errors = []
    for share in (0.01, 0.03, 0.05, 0.1, 0.2):
        other = edited(words, share, rng)
        signatures = [signer(shingles.hashes(shingles.units(" ".join(each), WordHashes()))) for each in (words, other)]
        exact = jaccard(shingle_set(" ".join(words), 3), shingle_set(" ".join(other), 3))
        errors.append(abs((signatures[0] == signatures[1]).mean() - exact))
    assert max(errors) < 4 * (0.25 / 512) ** 0.5


@pytest.mark.parametrize("verify", [False, True])
def test_components_are_those_of_datasketch_on_the_same_signatures(tmp_path, verify):
    documents = families(seed=3, num_families=20, share=0.06)
    config = DeduplicateConfig(
        threshold=0.6, ngram=3, num_permutations=64, enable_verification=verify, false_negative_weight=0.5
    )
    out = run(tmp_path, documents, **config.model_dump())
    index = MinHashLSH(threshold=config.threshold, num_perm=config.num_permutations)
    assert choose_bands(config) == (index.b, index.r)
    shingles, signer = Shingles("word", config.ngram), Signer(config.num_permutations, config.seed)
    hashes = {
        name: MinHash(
            hashvalues=signer(shingles.hashes(shingles.units(text, WordHashes()))), scheme="affine32", seed=config.seed
        )
        for name, text in documents.items()
    }
    for name, signature in hashes.items():
        index.insert(name, signature)
    pairs = [(name, other) for name, signature in hashes.items() for other in index.query(signature)]
    similar = [pair for pair in pairs if hashes[pair[0]].jaccard(hashes[pair[1]]) >= config.threshold]
    assert len(similar) < len(pairs), "some candidates are below the threshold"
    groups = components(documents, similar if verify else pairs)
    assert 20 < len(groups) < 60, "some copies are found and some are not"
    assert set(texts(out)) == {min(group, key=list(documents).index) for group in groups}
    order = list(documents).index
    for row in read_table(out, "duplicates").to_pylist():
        assert row["similarity"] == hashes[row["doc_id"]].jaccard(hashes[row["kept_doc_id"]])
        assert row["kept_doc_id"] == min(next(g for g in groups if row["doc_id"] in g), key=order)


def test_most_similar_pairs_are_found_when_missing_them_weighs_more(tmp_path):
    documents = families(seed=6, num_families=50, copies=2, share=0.025)
    shingles, signer = Shingles("word", 5), Signer(128, 1)
    signed = {name: signer(shingles.hashes(shingles.units(text, WordHashes()))) for name, text in documents.items()}
    similar = sum((signed[name] == signed[name[:-1] + "1"]).mean() >= 0.75 for name in documents if name.endswith("c0"))
    assert similar > 15
    found = {}
    for weight in (0.95, 0.5):
        out = run(tmp_path, documents, str(weight), 100, threshold=0.75, false_negative_weight=weight)
        found[weight] = read_artifact(out).counts["num_dropped_near_duplicate"] / similar
        odds = read_artifact(out).details["found_fraction_by_similarity"]["0.75"]
        assert (odds > 0.9) == (weight == 0.95)
    assert found[0.95] > 0.9 > 0.7 > found[0.5]


def test_the_longest_document_stays_when_asked(tmp_path):
    base = " ".join(VOCABULARY[:200])
    documents = {"a/short": base, "a/long": base + " and more", "b/equal": base + " and mxre", "b/other": "alone here"}
    out = run(tmp_path, documents, keep="longest")
    assert list(texts(out)) == ["a/long", "b/other"], "of two of equal length the first stays"
    assert list(texts(run(tmp_path, documents, "first"))) == ["a/short", "b/other"]


def test_neither_shards_nor_their_cut_change_the_result(tmp_path):
    documents = families(seed=7, share=0.03)
    outs = [run(tmp_path, documents, f"out{cut}", shard_records=cut, threshold=0.7) for cut in (7, 20, 100)]
    assert texts(outs[0]) == texts(outs[1]) == texts(outs[2])
    tables = [read_table(out, "duplicates").to_pylist() for out in outs]
    assert tables[0] == tables[1] == tables[2]


def test_equal_inputs_give_equal_bytes(tmp_path):
    documents = families(seed=2)
    first, second = (run(tmp_path, documents, name) for name in ("first", "second"))
    assert file_bytes(first) == file_bytes(second)


def test_ranges_of_hashes_find_the_same_pairs_as_one(tmp_path, monkeypatch):
    documents = families(seed=4, num_families=30)
    whole = run(tmp_path, documents, "whole", 30)
    monkeypatch.setattr(candidates, "PART_DOCUMENTS", 40)
    assert texts(run(tmp_path, documents, "parts", 30)) == texts(whole)


def test_large_groups_are_compared_in_rounds_and_the_rest_is_counted(tmp_path, monkeypatch):
    base = " ".join(VOCABULARY[:100])
    documents = {f"a/{number:03d}": base + f" end{number}" for number in range(40)}
    documents |= {f"b/{number}": " ".join(VOCABULARY[100 * number : 100 * number + 100]) for number in range(1, 5)}
    monkeypatch.setattr(candidates, "ALL_PAIRS", 6)
    out = run(tmp_path, documents)
    assert list(texts(out)) == ["a/000", "b/1", "b/2", "b/3", "b/4"]
    assert read_artifact(out).counts["num_not_compared"] == 0
    # One band of one permutation: everything that shares the smallest hash is one group, similar or not.
    monkeypatch.setattr(deduplicate, "choose_bands", lambda config: (2, 1))
    common = {f"c/{number:02d}": "rope " * 3 + " ".join(f"x{number}y{i}" for i in range(2)) for number in range(60)}
    counts = read_artifact(run(tmp_path / "2", common, ngram=1, threshold=0.9)).counts
    assert counts["num_kept"] == 60 and counts["num_not_compared"] > 0


def test_short_and_wordless_documents_are_named(tmp_path):
    documents = {"a/1": "two words", "a/2": "Two  WORDS!", "a/3": "other words", "a/4": "", "a/5": "...", "a/6": "\0 ;"}
    out = run(tmp_path, documents)
    assert list(texts(out)) == ["a/1", "a/3", "a/4", "a/5", "a/6"]
    counts = read_artifact(out).counts
    assert (counts["num_short"], counts["num_without_units"], counts["num_kept"]) == (3, 3, 5)


def test_only_wordless_documents_and_one_document_are_kept(tmp_path):
    assert list(texts(run(tmp_path / "1", {"a/1": "?", "a/2": "!"}))) == ["a/1", "a/2"]
    assert list(texts(run(tmp_path / "2", {"a/1": "one document only"}))) == ["a/1"]


def test_nothing_but_duplicates_leaves_one(tmp_path):
    out = run(tmp_path, {f"a/{n}": "the same text in every document of all" for n in range(150)}, shard_records=40)
    assert list(texts(out)) == ["a/0"]
    assert {row["similarity"] for row in read_table(out, "duplicates").to_pylist()} == {1.0}
    deduplicate.check(None, out)


def test_character_ngrams_compare_scripts_without_spaces(tmp_path):
    base = "".join(chr(0x4E00 + n * 7 % 900) for n in range(400))
    documents = {"a/1": base, "a/2": base[:200] + "一" + base[200:], "a/3": base[::-1]}
    assert list(texts(run(tmp_path, documents, unit="character", ngram=4))) == ["a/1", "a/3"]
    assert len(texts(run(tmp_path, documents, "words"))) == 3


def test_a_gigantic_document_is_signed_in_pieces_like_in_one():
    hashes = np.random.default_rng(0).integers(0, 2**63, 5000, dtype=np.uint64) * np.uint64(2)
    whole = MinHash(32, seed=1, hashfunc=int, scheme="affine32")
    whole.update_batch((hashes >> np.uint64(32)).tolist())
    assert (Signer(32, 1)(hashes) == whole.hashvalues).all()


@settings(deadline=None, max_examples=50)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25),
    sizes=st.lists(st.integers(0, 3), min_size=20, max_size=20),
)
def test_components_keep_their_first_or_largest(pairs, sizes, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.npy"
    np.save(path, np.array(pairs, np.int64).reshape(-1, 2))
    groups = components(range(20), pairs)
    first = choose_kept(20, [path], None)
    largest = choose_kept(20, [path], np.array(sizes))
    for group in groups:
        assert {int(first[n]) for n in group} == {min(group)}
        assert {int(largest[n]) for n in group} == {max(sorted(group), key=lambda n: sizes[n])}


def test_bad_settings_and_inputs_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"num_permutations 4 cannot .* for threshold 0\.99"):
        run(tmp_path, {"a/1": "x"}, num_permutations=4, threshold=0.99)
    source = write_corpus(tmp_path / "broken", {"a/1": "text"})
    table = read_table(source, "documents").drop_columns(["num_bytes"])
    import pyarrow.parquet as pq

    pq.write_table(table, source / "documents-00000.parquet")
    with pytest.raises(ValueError, match=r"documents-00000.parquet has no column 'num_bytes'"):
        run_stage(deduplicate, DeduplicateConfig(), {"documents": source}, tmp_path / "broken-out")


def test_text_that_is_not_unicode_is_an_error(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = write_corpus(tmp_path / "in", {"a/1": "text"})
    table = read_table(source, "documents")
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(table.set_column(1, table.schema.field("text"), broken), source / "documents-00000.parquet")
    with pytest.raises(ValueError, match="column text holds bytes that are not UTF-8"):
        run_stage(deduplicate, DeduplicateConfig(), {"documents": source}, tmp_path / "out")


def test_an_edited_source_file_is_found_among_the_standard_library(tmp_path):
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = {f"stdlib/{path.name}": path.read_text(errors="replace") for path in sorted(root.glob("*.py"))[:60]}
    original = documents["stdlib/argparse.py"]
    documents["copy/argparse.py"] = "# a licence in front\n" + original.replace("parser", "reader", 20)
    out = run(tmp_path, documents, shard_records=16)
    rows = read_table(out, "duplicates").to_pylist()
    assert [(row["doc_id"], row["kept_doc_id"]) for row in rows] == [("copy/argparse.py", "stdlib/argparse.py")]
    assert json.loads((out.parent / "observed/throughput.json").read_text())["documents_per_second"] > 0
