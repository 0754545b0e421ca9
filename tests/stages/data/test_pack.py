import pytest
from row_invariants import (
    EOS,
    assert_rows_are_sound,
    numbered_documents,
    run_stage,
    tokenizer_info,
    write_tokens,
)

from ropewalk.stages.data import pack
from ropewalk.stages.data.rows import check_counts
from ropewalk.stages.schema import Artifact, read_artifact, write_artifact

LENGTHS = [30, 3, 17, 0, 64, 9, 9, 12, 1, 25]


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
