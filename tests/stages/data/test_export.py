import gzip
import json
import random
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage, tokenizer_info, write_documents, write_tokens

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data import export, ingest
from ropewalk.stages.data.export import ExportConfig
from ropewalk.stages.data.exporters import mds, megatron
from ropewalk.stages.data.exporters.source_shards import open_shard
from ropewalk.stages.schema import (
    Artifact,
    documents_schema,
    read_artifact,
    read_table,
    rows_schema,
    tokens_schema,
    write_artifact,
    write_table,
)

FORMATS = ("jsonl", "parquet", "arrow", "huggingface", "mds", "megatron")
ROW_TOKENS = 6


# Readers that know only the descriptions of the formats


def read_jsonl(folder):
    records = []
    for path in sorted(folder.glob("*.jsonl*")):
        opener = {".gz": gzip.open, ".zst": lambda path: pa.input_stream(str(path), compression="zstd")}
        with opener.get(path.suffix, lambda path: path.open("rb"))(path) as file:
            records += [json.loads(line) for line in file.read().decode().split("\n")[:-1]]
    for record in records:
        if "metadata" in record:
            record["metadata"] = json.dumps(record["metadata"])
    return records


def read_parquet(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def read_arrow(folder):
    return [
        row
        for path in sorted(folder.glob("*.arrow"))
        for row in pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()
    ]


def read_huggingface(folder):
    import datasets

    return list(datasets.load_from_disk(str(folder)))


def read_mds(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2
    records = []
    for shard in index["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        (num_samples,) = struct.unpack_from("<I", data)
        offsets = struct.unpack_from(f"<{num_samples + 1}I", data, 4)
        settings_ = json.loads(data[4 * (num_samples + 2) : offsets[0]])
        assert settings_ == {name: value for name, value in shard.items() if name in settings_}
        assert num_samples == shard["samples"] and offsets[-1] == len(data)
        records += [mds_sample(data[a:b], shard) for a, b in pairwise(offsets)]
    return records


def mds_sample(data, shard):
    sizes, place, record = [], 0, {}
    for size in shard["column_sizes"]:
        if size is None:
            (size,) = struct.unpack_from("<I", data, place)
            place += 4
        sizes.append(size)
    for name, encoding, size in zip(shard["column_names"], shard["column_encodings"], sizes, strict=True):
        record[name] = mds_value(encoding, data[place : place + size])
        place += size
    assert place == len(data)
    return record


def mds_value(encoding, data):
    if encoding == "str":
        return data.decode()
    if encoding == "int":
        return struct.unpack("<q", data)[0]
    if encoding == "json":
        return json.loads(data)
    dimensions, power = data[0] >> 2, data[0] & 3
    assert dimensions == 1
    length = int.from_bytes(data[1 : 1 + 2**power], "little")
    values = np.frombuffer(data[1 + 2**power :], {"ndarray:int32": "<i4", "ndarray:uint8": "<u1"}[encoding])
    assert len(values) == length
    return values.astype(bool).tolist() if encoding == "ndarray:uint8" else values.tolist()


def read_megatron(folder):
    (path,) = folder.glob("*.idx")
    data, ids = path.read_bytes(), path.with_suffix(".bin").read_bytes()
    assert data[:9] == b"MMIDIDX\0\0"
    version, code, num, num_documents = struct.unpack_from("<QBQQ", data, 9)
    assert version == 1 and num_documents == num + 1
    lengths = struct.unpack_from(f"<{num}i", data, 34)
    begins = struct.unpack_from(f"<{num}q", data, 34 + 4 * num)
    assert struct.unpack_from(f"<{num + 1}q", data, 34 + 12 * num) == tuple(range(num + 1))
    assert len(data) == 34 + 12 * num + 8 * (num + 1)
    letter, size = {8: ("H", 2), 4: ("i", 4)}[code]
    assert sum(lengths) * size == len(ids)
    return [
        {"input_ids": list(struct.unpack_from(f"<{length}{letter}", ids, begin))}
        for length, begin in zip(lengths, begins, strict=True)
    ]


READERS = {
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "huggingface": read_huggingface,
    "mds": read_mds,
    "megatron": read_megatron,
}


# Inputs


def write_rows(folder, rows, **optional):
    write_table(folder, "rows", rows_schema(**optional), rows, shard_records=3)
    info = tokenizer_info(vocab_size=70_000)
    write_artifact(folder, Artifact(kind="rows", tokenizer=info, row_tokens=ROW_TOKENS, counts={"num_rows": len(rows)}))
    return folder


def a_row(number=0, **changes):
    segment = {"doc_id": "a/é", "start": 2**33, "num_tokens": 2, "row_start": 1}
    row = {"row_id": f"r{number}", "input_ids": list(range(ROW_TOKENS)), "segments": [segment], "attention": "causal"}
    return row | changes


def export_to(folder, inputs, **fields):
    return run_stage(export, ExportConfig(**fields), inputs, folder)


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
DOCUMENTS = st.lists(
    st.builds(
        lambda text, n: {"text": text, "source": "s", "num_bytes": n, "metadata": json.dumps({"n": n, "t": text})},
        TEXT,
        st.integers(0, 2**40),
    ),
    min_size=1,
    max_size=10,
)
IDS = st.integers(0, 69_999)
TOKENS = st.lists(st.lists(IDS, min_size=1, max_size=300), min_size=1, max_size=10)
ROWS = st.lists(
    st.tuples(
        st.lists(IDS, min_size=ROW_TOKENS, max_size=ROW_TOKENS),
        st.lists(st.booleans(), min_size=ROW_TOKENS, max_size=ROW_TOKENS),
        st.lists(TEXT, max_size=3),
        st.sampled_from(["causal", "document", "anchor"]),
    ),
    min_size=1,
    max_size=8,
)


def make_documents(folder, drawn):
    records = [{"doc_id": f"d{number}", **record} for number, record in enumerate(drawn)]
    write_table(folder, "documents", documents_schema(), records, shard_records=3)
    write_artifact(folder, Artifact(kind="documents", counts={"num_kept": len(records)}))
    return records


def make_tokens(folder, drawn):
    records = [{"doc_id": f"d{number}", "source": "s", "input_ids": ids} for number, ids in enumerate(drawn)]
    write_table(folder, "tokens", tokens_schema(), records, shard_records=3)
    write_artifact(folder, Artifact(kind="tokens", tokenizer=tokenizer_info(vocab_size=70_000)))
    return records


def make_rows(folder, drawn):
    records = [
        {
            "row_id": f"r{number}",
            "input_ids": ids,
            "segments": [
                {"doc_id": name, "start": place, "num_tokens": 1, "row_start": place}
                for place, name in enumerate(names)
            ],
            "attention": attention,
            "loss_mask": mask,
            "position_ids": list(range(ROW_TOKENS)),
        }
        for number, (ids, mask, names, attention) in enumerate(drawn)
    ]
    write_rows(folder, records, loss_mask=True, position_ids=True)
    return records


KINDS = {"documents": (DOCUMENTS, make_documents), "tokens": (TOKENS, make_tokens), "rows": (ROWS, make_rows)}


# What is written can be read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_exported_is_read_back_the_same(kind, format):
    if (kind, format) == ("documents", "megatron"):
        return
    drawn, make = KINDS[kind]

    @given(drawn=drawn)
    @settings(deadline=None, max_examples=6)
    def holds(drawn):
        with tempfile.TemporaryDirectory() as folder:
            records = make(Path(folder) / "in", drawn)
            only = {"enable_ids_only": True} if (kind, format) == ("rows", "megatron") else {}
            out = export_to(Path(folder) / "out", {kind: Path(folder) / "in"}, format=format, **only)
            export.check(ExportConfig(format=format), out)
            found = READERS[format](out)
            if format == "megatron":
                records = [{"input_ids": record["input_ids"]} for record in records]
            assert found == records
            counts = read_artifact(out, "export").counts
            assert counts["num_in"] == counts["num_records"] == len(records)

    holds()


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_json_lines_may_be_compressed(tmp_path, compression):
    texts = {f"d{number}": f"text {number} é\u2028\n" for number in range(5)}
    documents = write_documents(tmp_path / "in", texts)
    out = export_to(tmp_path / "out", {"documents": documents}, format="jsonl", compression=compression)
    suffix = {"none": ".jsonl", "gzip": ".gz", "zstd": ".zst"}[compression]
    assert [path.suffix for path in out.glob("documents-*")] == [suffix]
    with pa.input_stream(str(next(out.glob("documents-*"))), compression="detect") as file:
        lines = file.read().decode().split("\n")[:-1]
    assert {json.loads(line)["doc_id"]: json.loads(line)["text"] for line in lines} == texts
    assert json.loads(lines[0])["metadata"] == {}
    export.check(ExportConfig(format="jsonl", compression=compression), out)


@pytest.mark.parametrize("format", ["jsonl", "parquet", "arrow", "huggingface"])
def test_exported_documents_can_be_ingested(tmp_path, format):
    texts = {f"d{number}": f"text {number}" for number in range(20)}
    out = export_to(tmp_path / "out", {"documents": write_documents(tmp_path / "in", texts)}, format=format)
    chosen = {} if format == "huggingface" else {"include": ["documents-*"]}
    source = {"name": "s", "format": format, "id_field": "doc_id", "metadata_fields": ["num_bytes"], **chosen}
    again = run_stage(ingest, ingest.IngestConfig(sources=[source]), {"s": out}, tmp_path / "again")
    rows = read_table(again, "documents").to_pylist()
    assert {row["doc_id"].removeprefix("s/"): row["text"] for row in rows} == texts
    assert [json.loads(row["metadata"])["num_bytes"] for row in rows] == [row["num_bytes"] for row in rows]


@pytest.mark.parametrize("format", ["jsonl", "parquet", "arrow", "huggingface", "mds"])
def test_columns_may_get_other_names(tmp_path, format):
    tokens = write_tokens(tmp_path / "in", {"a": [100, 101], "b": [102]})
    out = export_to(tmp_path / "out", {"tokens": tokens}, format=format, names={"input_ids": "tokens", "doc_id": "id"})
    assert READERS[format](out) == [
        {"id": "a", "source": "test", "tokens": [100, 101]},
        {"id": "b", "source": "test", "tokens": [102]},
    ]


@pytest.mark.parametrize(("vocab_size", "size"), [(65_499, 2), (65_500, 4)])
def test_megatron_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, size):
    ids = [vocab_size - 1, 0]
    tokens = write_tokens(tmp_path / "in", {"a": ids}, tokenizer_info(vocab_size=vocab_size))
    out = export_to(tmp_path / "out", {"tokens": tokens}, format="megatron")
    assert (out / "tokens.bin").stat().st_size == 2 * size
    assert read_megatron(out) == [{"input_ids": ids}]


def test_documents_for_megatron_may_end_with_the_end_token(tmp_path):
    tokens = write_tokens(tmp_path / "in", {"a": [100, 101], "b": [102]}, tokenizer_info(eos_token_id=7))
    out = export_to(tmp_path / "out", {"tokens": tokens}, format="megatron", enable_end_token=True)
    assert [record["input_ids"] for record in read_megatron(out)] == [[100, 101, 7], [102, 7]]
    counts = read_artifact(out).counts
    assert (counts["num_tokens"], counts["num_tokens_inserted"]) == (5, 2)


def test_megatron_is_told_to_lose_what_its_files_cannot_hold(tmp_path):
    masks = [[True] * ROW_TOKENS, [False] * 2 + [True] * 4]
    rows = [a_row(0, loss_mask=masks[0]), a_row(1, loss_mask=masks[1], attention="document")]
    folder = write_rows(tmp_path / "in", rows, loss_mask=True)
    with pytest.raises(ValueError, match="megatron files cannot hold segments, attention policies and loss masks: set"):
        export_to(tmp_path / "refused", {"rows": folder}, format="megatron")
    out = export_to(tmp_path / "out", {"rows": folder}, format="megatron", enable_ids_only=True)
    assert read_artifact(out).counts == {
        "num_in": 2,
        "num_records": 2,
        "num_dropped_no_tokens": 0,
        "num_tokens": 12,
        "num_segments_lost": 2,
        "num_attention_policies_lost": 1,
        "num_masked_tokens_lost": 2,
    }


def test_tokens_with_a_loss_mask_are_not_quietly_stripped(tmp_path):
    record = {"doc_id": "a", "source": "s", "input_ids": [5, 6], "loss_mask": [False, True]}
    write_table(tmp_path / "in", "tokens", tokens_schema(loss_mask=True), [record])
    write_artifact(tmp_path / "in", Artifact(kind="tokens", tokenizer=tokenizer_info()))
    with pytest.raises(ValueError, match=r"megatron files cannot hold loss masks: set export.enable_ids_only"):
        export_to(tmp_path / "refused", {"tokens": tmp_path / "in"}, format="megatron")
    assert read_mds(export_to(tmp_path / "out", {"tokens": tmp_path / "in"}, format="mds")) == [record]


@pytest.mark.parametrize(("format", "dropped"), [("mds", 1), ("megatron", 1), ("jsonl", 0), ("parquet", 0)])
def test_records_without_tokens_are_counted_where_there_is_no_place_for_them(tmp_path, format, dropped):
    tokens = write_tokens(tmp_path / "in", {"a": [], "b": [100]})
    out = export_to(tmp_path / "out", {"tokens": tokens}, format=format)
    counts = read_artifact(out).counts
    assert (counts["num_in"], counts["num_records"], counts["num_dropped_no_tokens"]) == (2, 2 - dropped, dropped)
    assert len(READERS[format](out)) == 2 - dropped


def test_mds_arrays_of_any_length_are_read_back(tmp_path):
    lengths = [1, 255, 256, 65_535, 65_536]
    tokens = write_tokens(tmp_path / "in", {f"d{length}": [100 + length % 800] * length for length in lengths})
    out = export_to(tmp_path / "out", {"tokens": tokens}, format="mds")
    assert [len(record["input_ids"]) for record in read_mds(out)] == lengths


def test_a_long_index_of_megatron_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(megatron, "_CHUNK_SEQUENCES", 3)
    documents = {f"d{number}": [100 + number] * (number + 1) for number in range(11)}
    out = export_to(tmp_path / "out", {"tokens": write_tokens(tmp_path / "in", documents)}, format="megatron")
    assert [record["input_ids"] for record in read_megatron(out)] == list(documents.values())


def test_mds_shards_are_closed_before_they_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(mds, "SHARD_BYTES", 2000)
    lengths = [100, 100, 900, 5, 5, 1200, 3]
    texts = {f"d{number}": "x" * length for number, length in enumerate(lengths)}
    out = export_to(tmp_path / "out", {"documents": write_documents(tmp_path / "in", texts)}, format="mds")
    assert [record["text"] for record in read_mds(out)] == list(texts.values())
    shards = json.loads((out / "index.json").read_text())["shards"]
    sizes, first = [shard["raw_data"]["bytes"] for shard in shards], np.cumsum([s["samples"] for s in shards])
    assert len(shards) > 1 and max(sizes) <= 2000
    assert all(size + lengths[number] > 2000 for size, number in zip(sizes, first[:-1], strict=False))


def test_a_sample_larger_than_an_mds_shard_has_one_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(mds, "SHARD_BYTES", 1000)
    texts = {"d0": "x" * 3000, "d1": "x", "d2": "x" * 3000}
    out = export_to(tmp_path / "out", {"documents": write_documents(tmp_path / "in", texts)}, format="mds")
    assert [shard["samples"] for shard in json.loads((out / "index.json").read_text())["shards"]] == [1, 1, 1]


class UnorderedContext(LocalContext):
    """Applies functions in another order than that of the items."""

    def map(self, function, items, *, resources=None):
        items = list(items)
        results = {n: function(items[n]) for n in random.Random(0).sample(range(len(items)), len(items))}
        return iter([results[number] for number in range(len(items))])


@pytest.mark.parametrize("format", FORMATS)
def test_equal_inputs_give_equal_bytes_in_any_order_of_work(tmp_path, format):
    tokens = write_tokens(tmp_path / "in", {f"d{n:02d}": [100 + n] * (n + 1) for n in range(40)})
    outputs = []
    for context in (LocalContext, UnorderedContext):
        output = Output(tmp_path / context.__name__ / "data", tmp_path / context.__name__ / "observed")
        work = tmp_path / context.__name__ / "work"
        for path in (output.data, output.observed, work):
            path.mkdir(parents=True)
        export.run(ExportConfig(format=format), {"tokens": tokens}, output, context(work))
        outputs.append({path.name: path.read_bytes() for path in output.data.iterdir()})
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 2


def test_long_runs_of_one_token_are_read_in_pieces(tmp_path):
    tokens = write_tokens(tmp_path / "in", {f"d{n}": [100] * 100_000 for n in range(7)})
    with open_shard(tokens / "tokens-00000.parquet", "tokens", 1000) as shard:
        sizes = [batch.num_rows for batch in shard.batches(2**19)]
    assert sizes == [1] * 7


# What cannot be exported


def test_an_input_is_one_table(tmp_path):
    tokens = write_tokens(tmp_path / "in", {"a": [100]})
    for inputs, told in (
        ({}, "none"),
        ({"tokens": tokens, "rows": tokens}, "tokens, rows"),
        ({"text": tokens}, "text"),
    ):
        with pytest.raises(
            ValueError, match=f"export reads one slot of documents, tokens, rows, and was given: {told}"
        ):
            export_to(tmp_path / told.replace(", ", "-"), inputs, format="jsonl")
    with pytest.raises(ValueError, match="holds tokens, not rows"):
        export_to(tmp_path / "kind", {"rows": tokens}, format="jsonl")


@pytest.mark.parametrize("format", FORMATS)
def test_ids_outside_the_vocabulary_are_errors(tmp_path, format):
    tokens = write_tokens(tmp_path / "in", {"a": [100, 1000]})
    with pytest.raises(ValueError, match=r"tokens-00000.parquet: input_ids holds 1000, outside the tokenizer's vocab"):
        export_to(tmp_path / "out", {"tokens": tokens}, format=format)


def test_a_missing_column_is_named(tmp_path):
    tokens = write_tokens(tmp_path / "in", {"a": [100]})
    path = tokens / "tokens-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["source"]), path)
    with pytest.raises(ValueError, match=r"tokens-00000.parquet: column source is missing"):
        export_to(tmp_path / "out", {"tokens": tokens}, format="jsonl")


def test_an_empty_table_and_a_missing_shard_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no tokens to export"):
        export_to(tmp_path / "empty", {"tokens": write_tokens(tmp_path / "none", {})}, format="arrow")
    with pytest.raises(ValueError, match="holds no tokens to export"):
        export_to(tmp_path / "blank", {"tokens": write_tokens(tmp_path / "no-ids", {"a": []})}, format="megatron")
    rows = write_rows(tmp_path / "in", [a_row(number) for number in range(7)])
    (rows / "rows-00001.parquet").unlink()
    with pytest.raises(ValueError, match="should hold 7 rows, but has 4"):
        export_to(tmp_path / "out", {"rows": rows}, format="arrow")


def test_ids_without_a_tokenizer_are_refused(tmp_path):
    tokens = write_tokens(tmp_path / "in", {"a": [100]})
    write_artifact(tokens, Artifact(kind="tokens"))
    with pytest.raises(ValueError, match=r"artifact.json names no tokenizer: make the tokens with our stages"):
        export_to(tmp_path / "out", {"tokens": tokens}, format="jsonl")


def test_metadata_that_is_no_json_is_named(tmp_path):
    record = {"doc_id": "d", "text": "x", "source": "s", "num_bytes": 1, "metadata": "{"}
    write_table(tmp_path / "in", "documents", documents_schema(), [record])
    write_artifact(tmp_path / "in", Artifact(kind="documents"))
    with pytest.raises(ValueError, match="metadata of 'd' is not JSON"):
        export_to(tmp_path / "out", {"documents": tmp_path / "in"}, format="jsonl")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "parquet", "compression": "gzip"}, "compression does not apply to format parquet"),
        ({"format": "megatron", "names": {"input_ids": "x"}}, "names does not apply to format megatron"),
        ({"format": "mds", "enable_end_token": True}, "enable_end_token does not apply to format mds"),
        ({"format": "jsonl", "enable_ids_only": True}, "enable_ids_only does not apply to format jsonl"),
        ({"format": "csv"}, "format"),
    ],
)
def test_settings_that_cannot_hold_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        ExportConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "jsonl", "names": {"txt": "x"}}, "export.names: documents have no column 'txt', only doc_id, text"),
        ({"format": "jsonl", "names": {"text": "source"}}, "export.names: two columns would be called 'source'"),
        ({"format": "megatron"}, "export.format megatron holds token ids: encode the documents first"),
        ({"format": "megatron", "enable_end_token": True}, "export.enable_end_token is for tokens"),
    ],
)
def test_settings_that_do_not_fit_the_input_are_refused(tmp_path, fields, message):
    documents = write_documents(tmp_path / "in", {"a": "text"})
    with pytest.raises(ValueError, match=message):
        export_to(tmp_path / "out", {"documents": documents}, **fields)


@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_found_before_the_commit(tmp_path, format):
    tokens = write_tokens(tmp_path / "in", {f"d{number}": [100, 101, 102] for number in range(20)})
    config = ExportConfig(format=format)
    out = export_to(tmp_path / "out", {"tokens": tokens}, format=format)
    export.check(config, out)
    for path in sorted(out.iterdir()):
        whole = path.read_bytes()
        if path.name != "artifact.json":
            path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(ValueError, match=r"out/data"):
                export.check(config, out)
            path.unlink()
            with pytest.raises(ValueError, match=r"out/data"):
                export.check(config, out)
        path.write_bytes(whole)
    export.check(config, out)


def test_a_wrong_count_is_found(tmp_path):
    out = export_to(tmp_path / "out", {"tokens": write_tokens(tmp_path / "in", {"a": [100]})}, format="jsonl")
    artifact = read_artifact(out)
    write_artifact(out, artifact.model_copy(update={"counts": artifact.counts | {"num_records": 2}}))
    with pytest.raises(ValueError, match=r"counts.num_records is 2, but there are 1"):
        export.check(ExportConfig(format="jsonl"), out)
