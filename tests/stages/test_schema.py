import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ropewalk.stages.schema import (
    SCHEMA_VERSION,
    Artifact,
    Segment,
    TokenizerInfo,
    documents_schema,
    iterate_table,
    list_lengths,
    predictions_schema,
    read_artifact,
    read_table,
    rows_schema,
    seeded_rng,
    shard_paths,
    stable_id,
    tokens_schema,
    write_artifact,
    write_shard,
    write_table,
)

INFO = TokenizerInfo(digest="d" * 64, vocab_size=10, bos_token_id=0, eos_token_id=1, added_tokens={"<|key|>": 9})


def token_rows(count):
    return [{"doc_id": f"s/{n}", "source": "s", "input_ids": list(range(n % 5))} for n in range(count)]


def test_records_are_frozen_and_refuse_unknown_fields():
    with pytest.raises(ValidationError, match="frozen"):
        INFO.vocab_size = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        Segment(doc_id="d", start=0, num_tokens=1, row_start=0, length=1)


def test_a_missing_marker_is_named_with_the_field_that_adds_it():
    assert INFO.marker("<|key|>", "plant") == 9
    with pytest.raises(ValueError, match=r"utk inserts '<\|x\|>', which the tokenizer lacks: .* encode.added_tokens"):
        INFO.marker("<|x|>", "utk")


def test_artifacts_survive_the_disk_and_equal_ones_have_equal_bytes(tmp_path):
    counts = {"num_b": 2, "num_a": 1}
    first = Artifact(kind="tokens", tokenizer=INFO, counts=counts, details={"é": [1, None]})
    second = first.model_copy(update={"counts": dict(reversed(counts.items()))})
    for folder, artifact in (("a", first), ("b", second)):
        (tmp_path / folder).mkdir()
        write_artifact(tmp_path / folder, artifact)
        assert read_artifact(tmp_path / folder, "tokens") == first
    assert (tmp_path / "a/artifact.json").read_bytes() == (tmp_path / "b/artifact.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not an artifact: it has no artifact.json"),
        ("{", "artifact.json cannot be read"),
        ({"kind": "ropes"}, "artifact.json cannot be read"),
        ({"kind": "rows", "schema_version": SCHEMA_VERSION + 1}, "has schema version 2; this Ropewalk reads 1"),
        ({"kind": "rows"}, "holds rows, not tokens"),
    ],
)
def test_unreadable_artifacts_are_errors_that_say_why(tmp_path, content, message):
    if content is not None:
        (tmp_path / "artifact.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_artifact(tmp_path, "tokens")


@settings(max_examples=20, deadline=None)
@given(count=st.integers(0, 25), shard_records=st.integers(1, 10))
def test_tables_keep_their_records_in_order_over_any_shards(tmp_path_factory, count, shard_records):
    folder = tmp_path_factory.mktemp("table") / "data"
    rows = token_rows(count)
    assert write_table(folder, "tokens", tokens_schema(), iter(rows), shard_records=shard_records) == count
    assert len(shard_paths(folder, "tokens")) == max(1, -(-count // shard_records))
    table = read_table(folder, "tokens")
    assert table.schema.equals(tokens_schema())
    assert table.to_pylist() == rows
    assert [row for batch in iterate_table(folder, "tokens") for row in batch.to_pylist()] == rows
    assert list_lengths(table.column("input_ids")) == [len(row["input_ids"]) for row in rows]


def test_columns_can_be_read_alone(tmp_path):
    write_table(tmp_path, "tokens", tokens_schema(), token_rows(3))
    assert read_table(tmp_path, "tokens", ["source"]).column_names == ["source"]
    assert [batch.schema.names for batch in iterate_table(tmp_path, "tokens", ["doc_id"])] == [["doc_id"]]


def test_lengths_of_sliced_and_filtered_lists_are_right():
    column = pa.chunked_array([pa.array([[1], [], [2, 3]]), pa.array([[4, 5, 6]])])
    assert list_lengths(column) == [1, 0, 2, 3]
    assert list_lengths(column.slice(2)) == [2, 3]
    assert list_lengths(column.filter(pa.array([True, False, True, False]))) == [1, 2]


@pytest.mark.parametrize(
    ("schema", "record", "column"),
    [
        (tokens_schema(), {"doc_id": "d", "source": None, "input_ids": [1]}, "source"),
        (tokens_schema(), {"doc_id": "d", "source": "s"}, "input_ids"),
        (documents_schema(), {"doc_id": "d", "text": None, "source": "s", "num_bytes": 0, "metadata": "{}"}, "text"),
        (
            rows_schema(loss_mask=True),
            {"row_id": "r", "input_ids": [], "segments": [], "attention": "causal"},
            "loss_mask",
        ),
    ],
)
def test_a_null_is_refused(tmp_path, schema, record, column):
    with pytest.raises(ValueError, match=f"column {column} holds a null"):
        write_table(tmp_path, "table", schema, [record])
    assert not list(tmp_path.iterdir())


def test_optional_columns_are_there_only_when_asked_for():
    plain = ["row_id", "input_ids", "segments", "attention"]
    assert rows_schema().names == plain
    assert rows_schema(loss_mask=True, position_ids=True).names == [*plain, "loss_mask", "position_ids"]
    assert set(predictions_schema().names) >= {"sample_id", "prediction", "references", "score"}


def test_segments_are_stored_as_their_record_says(tmp_path):
    segment = Segment(doc_id="s/1", start=2**40, num_tokens=3, row_start=1)
    row = {"row_id": "r", "input_ids": [0, 1, 2, 3], "segments": [segment.model_dump()], "attention": "causal"}
    write_table(tmp_path, "rows", rows_schema(), [row])
    assert read_table(tmp_path, "rows").to_pylist() == [row]
    assert set(Segment.model_fields) == {field.name for field in rows_schema().field("segments").type.value_type}


def test_shards_are_compressed_and_in_numeric_order_beyond_five_digits(tmp_path):
    table = pa.Table.from_pylist(token_rows(2), schema=tokens_schema())
    for shard in (100_000, 99_999, 3):
        path = write_shard(tmp_path, "tokens", shard, table)
        assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"
    assert [path.name for path in shard_paths(tmp_path, "tokens")] == [
        "tokens-00003.parquet",
        "tokens-99999.parquet",
        "tokens-100000.parquet",
    ]


def test_a_folder_without_the_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"has no rows-\*.parquet"):
        shard_paths(tmp_path, "rows")


def test_ids_and_draws_are_the_same_for_ever():
    # sha256 of "plant", "1" and "2" joined by the unit separator, by coreutils: printf 'plant\x1f1\x1f2' | sha256sum
    assert stable_id("plant", 1, 2) == "905758318793a112"
    # Recorded with numpy 2: these draws decide the bytes of every artifact.
    assert seeded_rng("plant", 1).integers(0, 1000, 5).tolist() == [137, 841, 119, 991, 770]
    assert seeded_rng("plant", 1).permutation(6).tolist() == [0, 5, 4, 1, 3, 2]


def test_draws_depend_on_every_part_and_on_nothing_else():
    script = "from ropewalk.stages.schema import seeded_rng; print(seeded_rng('a', 7, 'doc').random(3).tolist())"
    elsewhere = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    seeded_rng("a", 7, "other").random(10)
    assert json.loads(elsewhere) == seeded_rng("a", 7, "doc").random(3).tolist()
    others = [("a", 8, "doc"), ("b", 7, "doc"), ("a", 7), ("a", "7d", "oc")]
    draws = {tuple(seeded_rng(*parts).integers(0, 2**62, 3).tolist()) for parts in [("a", 7, "doc"), *others]}
    assert len(draws) == 5


def test_importing_the_shared_records_imports_nothing_heavy():
    modules = ["ropewalk.stages.schema", "ropewalk.stages.context", "ropewalk.stages.episodes"]
    modules += [f"ropewalk.stages.data.{name}" for name in ("ingest", "encode", "split", "plant", "mix")]
    heavy = ["torch", "transformers", "tokenizers", "datasets", "numpy", "pyarrow", "matplotlib", "faiss"]
    script = f"import sys, {', '.join(modules)}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
