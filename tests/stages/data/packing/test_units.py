from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from row_invariants import assert_rows_are_sound, numbered_documents, tokenizer_info, write_tokens

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.packing.bins import concatenate
from ropewalk.stages.data.packing.row_batches import lay_rows
from ropewalk.stages.data.packing.row_files import UnitWriter
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import (
    finish_rows,
    load_left,
    load_tokens,
    map_units,
    token_units,
)
from ropewalk.stages.schema import read_table, tokens_schema, write_table

ROW = 16
quick = settings(deadline=None, max_examples=25)


def lay_end_to_end(corpus, writer, *, leave, label):
    """Concatenate and cut; a partial last row is left."""
    plan = concatenate(corpus.lengths, ROW - 1, np.arange(len(corpus.doc_ids)))
    partial_rows = np.flatnonzero(plan.room(ROW - 1)) if leave else np.zeros(0, np.int64)
    whole = np.setdiff1d(np.arange(plan.num_rows), partial_rows)
    for row in whole.tolist():
        batch = lay_rows(plan.rows([row]), corpus, tokenizer_info(), ROW)
        writer.write(batch, corpus, batch.row_ids(label, 0, [row], corpus))
    if len(partial_rows):
        writer.leave(plan.rows(partial_rows), corpus)


def build(unit, folder):
    corpus = load_tokens(unit.paths, tokenizer_info())
    with UnitWriter(folder, ROW, "causal") as writer:
        lay_end_to_end(corpus, writer, leave=not unit.is_only, label=f"test/{unit.number}")
    return writer.counts | {"num_tokens_in": int(corpus.lengths.sum()), "num_documents_in": len(corpus.doc_ids)}


def build_rest(paths, folder):
    with UnitWriter(folder, ROW, "causal") as writer:
        lay_end_to_end(load_left(paths), writer, leave=False, label="test/rest")
    return writer.counts


class Backwards(LocalContext):
    """Works on the last item first, like a cluster whose first worker is slow."""

    def map(self, function, items, *, resources=None):
        results = [function(item) for item in reversed(list(items))]
        return iter(results[::-1])


def write_test_rows(tokens, folder, *, context=LocalContext, group_tokens=40, num_rows=None, build=build):
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True, exist_ok=True)
    here = context(folder / "work")
    shards = map_units(here, build, token_units(tokens, group_tokens), build_rest=build_rest)
    kept = finish_rows(
        output,
        here,
        shards,
        name="test",
        seed=0,
        info=tokenizer_info(),
        row_tokens=ROW,
        num_rows=num_rows,
        details={},
    )
    return output.data, shards, kept


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40), group=st.integers(1, 200))
@quick
def test_every_token_is_in_one_row_however_the_corpus_is_cut_into_units(tmp_path_factory, lengths, group):
    tmp_path = tmp_path_factory.mktemp("units")
    documents = numbered_documents([*lengths, 1])
    data, _, _ = write_test_rows(write_tokens(tmp_path / "tokens", documents), tmp_path, group_tokens=group)
    assert_rows_are_sound(data, documents)


def test_what_units_leave_is_packed_together(tmp_path):
    documents = numbered_documents([20] * 40)
    data, shards, _ = write_test_rows(write_tokens(tmp_path / "tokens", documents), tmp_path, group_tokens=100)
    assert len(shards) > 3 and shards[-1].name == "rest"
    rows = assert_rows_are_sound(data, documents)
    padded = [row for row in rows if not row["loss_mask"][-1]]
    assert len(padded) <= 1


def test_the_order_in_which_units_are_built_does_not_matter(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents(range(1, 60)))
    forwards, *_ = write_test_rows(tokens, tmp_path / "a")
    backwards, *_ = write_test_rows(tokens, tmp_path / "b", context=Backwards)
    assert {path.name: path.read_bytes() for path in forwards.iterdir()} == {
        path.name: path.read_bytes() for path in backwards.iterdir()
    }


def test_rows_of_all_units_are_shuffled_together(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([16] * 200))
    data, shards, _ = write_test_rows(tokens, tmp_path)
    assert len(shards) > 10
    firsts = [row["segments"][0]["doc_id"] for row in read_table(data, "rows").to_pylist()]
    descents = sum(left > right for left, right in pairwise(firsts))
    assert 0.35 < descents / len(firsts) < 0.65


def test_a_limit_keeps_the_first_rows_of_the_same_shuffle_and_counts_the_rest(tmp_path):
    documents = numbered_documents(range(1, 60))
    tokens = write_tokens(tmp_path / "tokens", documents)
    everything, *_ = write_test_rows(tokens, tmp_path / "all")
    some, shards, kept = write_test_rows(tokens, tmp_path / "some", num_rows=20)
    assert read_table(some, "rows").to_pylist() == read_table(everything, "rows").to_pylist()[:20]
    assert_rows_are_sound(some, documents)
    assert sum(int(unit.sum()) for unit in kept) == 20
    assert [len(unit) for unit in kept] == [shard.counts["num_rows"] for shard in shards]


def test_finished_units_outlive_a_crash(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents(range(1, 60)))
    whole, *_ = write_test_rows(tokens, tmp_path / "whole")
    built = []

    def counting(limit, unit, folder):
        if len(built) == limit:
            raise KeyboardInterrupt
        built.append(unit.number)
        return build(unit, folder)

    with pytest.raises(KeyboardInterrupt):
        write_test_rows(tokens, tmp_path / "cut", build=partial(counting, 4))
    cut, shards, _ = write_test_rows(tokens, tmp_path / "cut", build=partial(counting, -1))
    assert built == sorted(set(built)) and len(built) == len(shards) - 1
    assert (cut / "rows-00000.parquet").read_bytes() == (whole / "rows-00000.parquet").read_bytes()


def test_what_is_learnt_follows_the_tokens_into_the_rows_and_through_the_rest(tmp_path):
    documents = numbered_documents([5, 20, 3, 30, 7, 9, 11, 2])
    rng = np.random.default_rng(0)
    masks = {name: (rng.random(len(ids)) < 0.5).tolist() for name, ids in documents.items()}
    records = [
        {"doc_id": name, "source": "s", "input_ids": ids, "loss_mask": masks[name]} for name, ids in documents.items()
    ]
    tokens = write_tokens(tmp_path / "tokens", {})
    write_table(tokens, "tokens", tokens_schema(loss_mask=True), records, shard_records=3)
    data, shards, _ = write_test_rows(tokens, tmp_path)
    assert shards[-1].name == "rest"
    for row in assert_rows_are_sound(data, documents):
        for piece in row["segments"]:
            begin, size = piece["row_start"], piece["num_tokens"]
            expected = masks[piece["doc_id"]][piece["start"] : piece["start"] + size]
            assert row["loss_mask"][begin : begin + size] == expected


def test_a_shard_larger_than_a_group_is_a_unit_of_its_own(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([10] * 21))
    units = token_units(tokens, 5)
    assert [len(unit.paths) for unit in units.values()] == [1, 1, 1]
    assert not any(unit.is_only for unit in units.values())
    assert token_units(tokens, 10**6)["unit-00000"].is_only


def test_a_corpus_without_tokens_is_refused(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", {"d0": [], "d1": []})
    with pytest.raises(ValueError, match="no tokens to lay into rows"):
        write_test_rows(tokens, tmp_path)


def test_ids_outside_the_vocabulary_and_repeated_documents_are_refused(tmp_path):
    strange = write_tokens(tmp_path / "a", {"d0": [5, 1000]})
    with pytest.raises(ValueError, match="outside the vocabulary of 1000"):
        write_test_rows(strange, tmp_path / "x")
    twice = write_tokens(tmp_path / "b", {"d0": [5]})
    write_table(twice, "tokens", tokens_schema(), [{"doc_id": "d", "source": "s", "input_ids": [7]}] * 2)
    with pytest.raises(ValueError, match="doc_id more than once"):
        write_test_rows(twice, tmp_path / "y")


def test_a_plan_that_leaves_its_row_is_an_error_not_a_cut(tmp_path):
    corpus = Corpus.from_documents([("d0", list(range(100, 130)))])
    plan = concatenate(corpus.lengths, 29, np.arange(1))
    with pytest.raises(RuntimeError, match="leaves its document or its row"):
        lay_rows(plan, corpus, tokenizer_info(), ROW)
