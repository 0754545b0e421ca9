import pyarrow as pa
import pytest
from hypothesis import given, settings
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

from ropewalk.stages.data import pack
from ropewalk.stages.data.packing.rows import check_counts
from ropewalk.stages.schema import (
    Artifact,
    read_artifact,
    read_table,
    tokens_schema,
    write_artifact,
    write_shard,
)

METHODS = ["best_fit", "first_fit", "concatenate"]
LENGTHS = [30, 3, 17, 0, 64, 9, 9, 12, 1, 25]


@pytest.fixture
def corpus(tmp_path):
    documents = numbered_documents(LENGTHS)
    return documents, {"tokens": write_tokens(tmp_path / "tokens", documents)}


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", ["best_fit", "first_fit"])
def test_only_concatenate_drops_rows(method):
    with pytest.raises(ValueError, match=f'partial_row="drop" needs method="concatenate": {method} rows are padded'):
        pack.PackConfig(row_tokens=24, partial_row="drop", method=method)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=40).filter(any),
    st.integers(3, 40),
    st.sampled_from(METHODS),
    st.integers(1, 400),
)
def test_no_token_is_lost_or_doubled_for_any_units(tmp_path_factory, lengths, row_tokens, method, group_tokens):
    documents = numbered_documents(lengths)
    folder = tmp_path_factory.mktemp("pack")
    inputs = {"tokens": write_tokens(folder / "tokens", documents)}
    config = pack.PackConfig(row_tokens=row_tokens, method=method, group_tokens=group_tokens)
    data = run_stage(pack, config, inputs, folder / "out")
    rows = assert_rows_are_sound(data, documents)
    assert read_artifact(data).counts["num_tokens_kept"] == sum(lengths)
    if method != "concatenate":
        whole = {f"d{number:03d}" for number, length in enumerate(lengths) if length < row_tokens}
        assert all(s["start"] == 0 for row in rows for s in row["segments"] if s["doc_id"] in whole), "none is cut"


@pytest.mark.parametrize("method", METHODS)
def test_several_units_leave_at_most_one_partial_row(tmp_path, method):
    documents = numbered_documents([5, 4, 6, 3, 5, 4, 6] * 6)
    inputs = {"tokens": write_tokens(tmp_path / "tokens", documents)}
    config = pack.PackConfig(row_tokens=24, method=method, group_tokens=40)
    data = run_stage(pack, config, inputs, tmp_path / "out")
    rows = assert_rows_are_sound(data, documents)
    artifact = read_artifact(data)
    assert artifact.details["num_units"] == 6
    used = [sum(segment["num_tokens"] + 1 for segment in row["segments"]) for row in rows]
    assert sum(tokens < 12 for tokens in used) <= 1, "what units cannot fill is packed together"


@pytest.mark.parametrize("method", METHODS)
def test_the_order_in_which_units_are_done_changes_no_byte(tmp_path, method):
    documents = numbered_documents([5, 40, 6, 3, 55, 4, 6] * 6)
    inputs = {"tokens": write_tokens(tmp_path / "tokens", documents)}
    config = pack.PackConfig(row_tokens=24, method=method, group_tokens=200)
    folders = run_stage(pack, config, inputs, tmp_path / "on"), run_backwards(pack, config, inputs, tmp_path / "back")
    forth, back = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert forth == back


def test_the_partial_row_of_all_units_together_is_dropped_when_asked(tmp_path):
    documents = numbered_documents([5, 4, 6, 3, 5, 4, 6] * 6)
    inputs = {"tokens": write_tokens(tmp_path / "tokens", documents)}
    config = pack.PackConfig(row_tokens=24, method="concatenate", partial_row="drop", group_tokens=40)
    data = run_stage(pack, config, inputs, tmp_path / "out")
    assert_rows_are_sound(data, documents)
    counts = read_artifact(data).counts
    assert counts["num_tokens_padding"] == 0 and 0 < counts["num_tokens_dropped_partial_row"] < 24


def test_rows_of_chats_learn_what_the_tokens_say(tmp_path):
    folder = write_chat_tokens(tmp_path / "tokens", {"a": ([100, 101, 102], [0, 1, 1]), "b": ([200, 201], [0, 1])})
    for group_tokens in (1, 100):
        config = pack.PackConfig(row_tokens=10, group_tokens=group_tokens)
        data = run_stage(pack, config, {"tokens": folder}, tmp_path / f"out-{group_tokens}")
        (row,) = read_table(data, "rows").to_pylist()
        assert row["input_ids"] == [BOS, 100, 101, 102, EOS, 200, 201, EOS, EOS, EOS]
        assert row["loss_mask"] == [bool(target) for target in (0, 0, 1, 1, 1, 0, 1, 1, 0, 0)]


def write_chat_tokens(folder, chats):
    """Tokens with a loss mask, one document a shard."""
    for shard, (name, (ids, mask)) in enumerate(chats.items()):
        record = {"doc_id": name, "source": "test", "input_ids": ids, "loss_mask": [bool(target) for target in mask]}
        write_shard(folder, "tokens", shard, pa.Table.from_pylist([record], schema=tokens_schema(loss_mask=True)))
    write_artifact(folder, Artifact(kind="tokens", tokenizer=tokenizer_info()))
    return folder


def test_a_gigantic_document_fills_rows_of_its_own(tmp_path):
    documents = numbered_documents([3, 5000, 2])
    inputs = {"tokens": write_tokens(tmp_path / "tokens", documents)}
    data = run_stage(pack, pack.PackConfig(row_tokens=24), inputs, tmp_path / "out")
    rows = assert_rows_are_sound(data, documents)
    assert read_artifact(data).counts["num_documents_cut"] == 1
    assert len(rows) == 5000 // 23 + 1


@pytest.mark.parametrize(
    ("documents", "info", "message"),
    [
        ({"a": []}, tokenizer_info(), "every document of slot tokens is empty"),
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


def test_dropping_the_only_row_is_an_error(tmp_path):
    inputs = {"tokens": write_tokens(tmp_path / "tokens", numbered_documents([3, 4]))}
    config = pack.PackConfig(row_tokens=24, method="concatenate", partial_row="drop")
    with pytest.raises(ValueError, match="drops the only row: the tokens do not fill row_tokens once"):
        run_stage(pack, config, inputs, tmp_path / "out")
