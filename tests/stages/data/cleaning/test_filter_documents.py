import random
import zlib

import pytest
from cleaning_corpus import file_bytes, texts, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.data.cleaning import filter_documents
from ropewalk.stages.data.cleaning.filter_documents import FilterDocumentsConfig, compression_ratio, tail_limits
from ropewalk.stages.schema import read_artifact


def run(tmp_path, documents, name="out", shard_records=3, **fields):
    source = write_corpus(tmp_path / f"{name}-in", documents, shard_records=shard_records)
    return run_stage(filter_documents, FilterDocumentsConfig(**fields), {"documents": source}, tmp_path / name)


def mixed_texts(num=30, source="web", seed=0):
    """Texts from repetitive to random, in no order of that."""
    rng = random.Random(seed)
    made = {}
    for number in range(num):
        period = rng.randrange(1, 400)
        unit = "".join(rng.choice("abcdefghijklmnop ") for _ in range(period))
        made[f"{source}/{number:02d}"] = (unit * 2000)[:2000]
    return made


def ratio(text):
    """The same by another gzip."""
    packer = zlib.compressobj(6, wbits=31)
    return len(packer.compress(text.encode()) + packer.flush()) / len(text.encode())


def test_the_ratio_is_gzips():
    for text in mixed_texts().values():
        assert compression_ratio(text.encode()) == pytest.approx(ratio(text), abs=0.01)
    assert compression_ratio(b"") == 1.0


@pytest.mark.parametrize(
    ("fields", "kept", "reason"),
    [
        ({"min_bytes": 5}, ["b", "c", "d"], "too_short"),
        ({"max_bytes": 11}, ["a", "b"], "too_long"),
        ({"min_words": 3}, ["c", "d"], "too_short"),
        ({"max_words": 2}, ["a", "b"], "too_long"),
        ({"min_compression_ratio": 0.5}, ["a", "b", "c"], "too_repetitive"),
        ({"max_compression_ratio": 0.5}, ["d"], "too_dense"),
    ],
)
def test_each_limit_drops_under_its_own_name(tmp_path, fields, kept, reason):
    documents = {"s/a": "ropé", "s/b": "one two", "s/c": "one two three", "s/d": "again " * 500}
    # "ropé" has 5 bytes, so 5 is within and 6 is not.
    documents["s/a"] = documents["s/a"][:3]
    out = run(tmp_path, documents, **fields)
    assert list(texts(out)) == [f"s/{name}" for name in kept]
    counts = read_artifact(out).counts
    assert counts[f"num_dropped_{reason}"] == 4 - len(kept)
    assert (
        counts["num_in"] == 4 == counts["num_kept"] + sum(v for k, v in counts.items() if k.startswith("num_dropped"))
    )
    filter_documents.check(None, out)


def test_limits_are_inclusive_and_count_bytes_of_utf8(tmp_path):
    documents = {"s/a": "ropé"}
    assert texts(run(tmp_path, documents, min_bytes=5, max_bytes=5)) == documents
    with pytest.raises(ValueError, match=r"kept no document: .*'num_dropped_too_short': 1.*widen its limits"):
        run(tmp_path, documents, "none", min_bytes=6)


def test_the_first_reason_that_applies_is_counted(tmp_path):
    documents = {"s/a": "\0", "s/b": "x\0 y z", "s/c": "plain text"}
    out = run(tmp_path, documents, nul_bytes="drop", min_bytes=3)
    counts = read_artifact(out).counts
    assert (counts["num_dropped_nul_bytes"], counts["num_dropped_too_short"], counts["num_with_nul_bytes"]) == (2, 0, 2)
    counts = read_artifact(run(tmp_path, documents, "keep")).counts
    assert (counts["num_kept"], counts["num_with_nul_bytes"]) == (3, 2)


def test_tails_are_cut_in_each_source_at_exact_ranks(tmp_path):
    documents = {**mixed_texts(20, "web", 1), **{k: v + v for k, v in mixed_texts(10, "code", 2).items()}}
    out = run(
        tmp_path, documents, shard_records=4, drop_most_repetitive_fraction=0.2, drop_least_repetitive_fraction=0.1
    )
    expected = []
    for source, low, high in (("web", 4, 2), ("code", 2, 1)):
        mine = {name: compression_ratio(text.encode()) for name, text in documents.items() if name.startswith(source)}
        order = sorted(mine, key=mine.__getitem__)
        expected += order[low : len(mine) - high]
        for rank in (low, len(mine) - high):
            assert mine[order[rank - 1]] < mine[order[rank]], "no ties at the limits"
    assert set(texts(out)) == set(expected)
    counts = read_artifact(out).counts
    assert (counts["num_dropped_most_repetitive"], counts["num_dropped_least_repetitive"]) == (6, 3)
    limits = read_artifact(out).details["ratio_limits_by_source"]
    kept = {name: compression_ratio(text.encode()) for name, text in texts(out).items()}
    for source in ("web", "code"):
        mine = [value for name, value in kept.items() if name.startswith(source)]
        assert limits[source] == [min(mine), max(mine)]
    assert (out.parent / "observed/compression_ratios.png").read_bytes().startswith(b"\x89PNG")


def test_tails_are_those_of_documents_that_pass_the_other_limits(tmp_path):
    documents = {f"web/{n}": f"{n}" * 3 for n in range(8)} | mixed_texts(10)
    out = run(tmp_path, documents, min_bytes=100, drop_most_repetitive_fraction=0.2)
    counts = read_artifact(out).counts
    assert (counts["num_dropped_too_short"], counts["num_dropped_most_repetitive"]) == (8, 2)


def test_a_document_has_one_reason(tmp_path):
    documents = mixed_texts(20) | {f"web/flat{n}": "x" * (5000 + n) for n in range(5)}
    out = run(tmp_path, documents, shard_records=30, min_compression_ratio=0.02, drop_most_repetitive_fraction=0.1)
    counts = read_artifact(out).counts
    assert (counts["num_dropped_too_repetitive"], counts["num_dropped_most_repetitive"]) == (5, 2)


@settings(deadline=None, max_examples=60)
@given(
    ratios=st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=40),
    low=st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5]),
    high=st.sampled_from([0.0, 0.1, 0.2, 0.49]),
)
def test_no_more_than_the_tails_go_and_something_stays(ratios, low, high):
    import numpy as np

    config = FilterDocumentsConfig(drop_most_repetitive_fraction=low, drop_least_repetitive_fraction=high)
    first, last = tail_limits(config, np.array(ratios))
    assert sum(value < first for value in ratios) <= round(low * len(ratios), 9)
    assert sum(value > last for value in ratios) <= round(high * len(ratios), 9)
    assert any(first <= value <= last for value in ratios)
    if len(set(ratios)) == len(ratios):
        assert sum(value < first for value in ratios) == int(round(low * len(ratios), 9))


def test_the_cut_into_shards_changes_nothing_and_bytes_repeat(tmp_path):
    documents = {**mixed_texts(15), **mixed_texts(9, "code", 5)}
    fields = {"drop_most_repetitive_fraction": 0.25, "max_bytes": 5000}
    outs = {cut: run(tmp_path, documents, f"cut{cut}", cut, **fields) for cut in (8, 11, 100)}
    assert texts(outs[8]) == texts(outs[11]) == texts(outs[100])
    assert file_bytes(run(tmp_path, documents, "again", 8, **fields)) == file_bytes(outs[8])


def test_gigantic_and_empty_documents_are_measured(tmp_path):
    documents = {"s/huge": "rope " * 2_000_000, "s/empty": "", "s/plain": "a plain text"}
    out = run(tmp_path, documents, min_compression_ratio=0.01, max_compression_ratio=3)
    assert list(texts(out)) == ["s/empty", "s/plain"]


@pytest.mark.parametrize(
    "fields",
    [
        {"min_bytes": 9, "max_bytes": 8},
        {"min_words": 9, "max_words": 8},
        {"min_compression_ratio": 0.5, "max_compression_ratio": 0.4},
        {"drop_most_repetitive_fraction": 0.5, "drop_least_repetitive_fraction": 0.5},
        {"nul_bytes": "replace"},
    ],
)
def test_settings_that_leave_nothing_are_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        FilterDocumentsConfig(**fields)
