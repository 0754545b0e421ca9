"""Row order and random access: counters, not state; the same rows for any world size; nothing lost in unpacking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_examples import VOCAB, random_rows, write_rows, write_tokenizer

from ropewalk.stages.context import LocalContext
from ropewalk.stages.schema import read_table
from ropewalk.stages.training.rows import RowOrder, RowSpec, RowTable, micro_batches, policies, share, unpack


@given(
    num_rows=st.integers(1, 40),
    per_rank=st.integers(1, 6),
    ranks=st.sampled_from([1, 2, 4]),
    step=st.integers(0, 30),
    micro=st.integers(1, 64),
)
def test_rows_of_a_step_do_not_depend_on_world_size_or_micro_batch(num_rows, per_rank, ranks, step, micro):
    per_step = per_rank * 4
    expected = RowOrder(7, 0, num_rows).step(step, per_step)
    seen = [
        index
        for rank in range(ranks)
        for part in micro_batches(share(RowOrder(7, 0, num_rows).step(step, per_step), rank, ranks), 8, micro)
        for index in part
    ]
    assert seen == expected


@given(num_rows=st.integers(1, 30), per_step=st.integers(1, 12))
def test_every_epoch_reads_every_row_once_in_a_new_order(num_rows, per_step):
    order = RowOrder(3, 1, num_rows)
    steps = -(-3 * num_rows // per_step)
    sequence = [index for step in range(steps) for index in order.step(step, per_step)][: 3 * num_rows]
    epochs = [sequence[start : start + num_rows] for start in range(0, 3 * num_rows, num_rows)]
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)
    if num_rows > 8:
        assert epochs[0] != epochs[1] != epochs[2]


def test_order_differs_by_phase_and_seed_and_is_entered_anywhere():
    whole = [RowOrder(1, 0, 50).step(step, 10) for step in range(12)]
    fresh = RowOrder(1, 0, 50)
    assert [fresh.step(step, 10) for step in (11, 2, 7)] == [whole[11], whole[2], whole[7]]
    assert whole[0] != RowOrder(1, 1, 50).step(0, 10)
    assert whole[0] != RowOrder(2, 0, 50).step(0, 10)


def test_unpacked_rows_are_those_of_the_table(tmp_path):
    info = write_tokenizer(tmp_path / "tokenizer")
    source = write_rows(tmp_path / "rows", random_rows(11, 24, masked=True), info, shard_records=4)
    assert unpack(source, tmp_path / "work", RowSpec(24, VOCAB), LocalContext(tmp_path)) == 11
    table, expected = RowTable(tmp_path / "work"), read_table(source, "rows").to_pylist()
    assert len(table) == 11
    for index in (0, 10, 3, 4, 7, 8):
        row = table[index]
        assert row.input_ids.tolist() == expected[index]["input_ids"]
        assert row.segments == expected[index]["segments"]
        assert row.loss_mask is not None
        assert row.loss_mask.tolist() == expected[index]["loss_mask"]
        assert (row.attention, row.position_ids) == ("causal", None)
    assert policies(source) == {"causal"}


def test_unpacking_again_reads_what_is_there(tmp_path):
    info = write_tokenizer(tmp_path / "tokenizer")
    source = write_rows(tmp_path / "rows", random_rows(8, 16), info, shard_records=4)
    for _ in range(2):
        assert unpack(source, tmp_path / "work", RowSpec(16, VOCAB), LocalContext(tmp_path)) == 8
    assert sorted(path.suffix for path in (tmp_path / "work").iterdir()) == [".arrow", ".arrow"]


def test_targets_leave_out_the_first_token_and_inserted_ones_lie_in_no_segment(tmp_path):
    info = write_tokenizer(tmp_path / "tokenizer")
    row = {
        "row_id": "r",
        "input_ids": [3, 4, 5, 6, 7, 8],
        "segments": [{"doc_id": "d", "start": 0, "num_tokens": 2, "row_start": 1}],
        "attention": "causal",
        "loss_mask": [True, True, False, True, False, True],
    }
    plain = {key: value for key, value in row.items() if key != "loss_mask"}
    for name, rows, targets, inserted in [
        ("masked", [row], [1, 3, 5], [3, 5]),
        ("plain", [plain], [1, 2, 3, 4, 5], []),
    ]:
        unpack(
            write_rows(tmp_path / name, rows, info), tmp_path / "work" / name, RowSpec(6, VOCAB), LocalContext(tmp_path)
        )
        found = RowTable(tmp_path / "work" / name)[0]
        assert found.targets().nonzero()[0].tolist() == targets
        assert found.inserted_targets().nonzero()[0].tolist() == inserted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [3] * 15}, "each input_ids must have 16 entries"),
        ({"loss_mask": [True] * 17}, "each loss_mask must have 16 entries"),
        ({"input_ids": [3] * 15 + [VOCAB]}, f"token id {VOCAB} is not below the tokenizer's vocab_size {VOCAB}"),
    ],
)
def test_rows_that_break_the_artifact_are_refused(tmp_path, change, message):
    rows = random_rows(3, 16, masked=True)
    rows[1] |= change
    source = write_rows(tmp_path / "rows", rows, write_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=message):
        unpack(source, tmp_path / "work", RowSpec(16, VOCAB), LocalContext(tmp_path))


def test_an_empty_artifact_is_refused(tmp_path):
    from ropewalk.stages.schema import rows_schema, write_table

    write_table(tmp_path / "rows", "rows", rows_schema(), [])
    with pytest.raises(ValueError, match="has no rows"):
        unpack(tmp_path / "rows", tmp_path / "work", RowSpec(16, VOCAB), LocalContext(tmp_path))
