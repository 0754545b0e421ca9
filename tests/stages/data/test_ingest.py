import json
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.data import ingest
from ropewalk.stages.data.ingest import IngestConfig, cut_shards
from ropewalk.stages.schema import documents_schema, read_artifact, read_table, shard_paths


def text_source(name, **fields):
    return {"name": name, "format": "text", **fields}


def ingest_into(folder, sources, inputs, **fields):
    return run_stage(ingest, IngestConfig(sources=sources, **fields), inputs, folder)


def write_texts(folder, texts):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_documents_come_in_order_with_their_bytes_counted(tmp_path):
    first = write_texts(tmp_path / "a", {"2.txt": "é", "1.txt": "one"})
    second = write_texts(tmp_path / "b", {"1.txt": "two"})
    out = ingest_into(tmp_path / "out", [text_source("b"), text_source("a")], {"a": first, "b": second})
    table = read_table(out, "documents")
    assert table.schema.equals(documents_schema())
    assert table.to_pylist() == [
        {"doc_id": "b/1.txt", "text": "two", "source": "b", "num_bytes": 3, "metadata": "{}"},
        {"doc_id": "a/1.txt", "text": "one", "source": "a", "num_bytes": 3, "metadata": "{}"},
        {"doc_id": "a/2.txt", "text": "é", "source": "a", "num_bytes": 2, "metadata": "{}"},
    ]


def test_of_equal_texts_the_first_of_the_first_source_is_kept(tmp_path):
    first = write_texts(tmp_path / "a", {"1.txt": "same", "2.txt": "same", "3.txt": "same "})
    second = write_texts(tmp_path / "b", {"0.txt": "same"})
    out = ingest_into(tmp_path / "out", [text_source("a"), text_source("b")], {"a": first, "b": second})
    assert read_table(out, "documents")["doc_id"].to_pylist() == ["a/1.txt", "a/3.txt"]
    assert read_artifact(out).details["sources"]["b"] == {"num_dropped_duplicate": 1, "num_in": 1}


def test_every_dropped_document_has_a_named_reason(tmp_path):
    texts = {"1": b"\xff\xfe", "2": "", "3": " \n", "4": "ab", "5": "x" * 11, "6": "fine", "7": "fine", "8": "good"}
    out = ingest_into(
        tmp_path / "out",
        [text_source("s", min_bytes=3, max_bytes=10)],
        {"s": write_texts(tmp_path / "s", texts)},
    )
    assert read_artifact(out, "documents").counts == {
        "num_in": 8,
        "num_kept": 2,
        "num_kept_bytes": 8,
        "num_dropped_undecodable": 1,
        "num_dropped_empty": 2,
        "num_dropped_too_short": 1,
        "num_dropped_too_long": 1,
        "num_dropped_duplicate": 1,
    }


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83c"}\n{"text": "\\ud83c\\udf89"}\n')
    out = ingest_into(tmp_path / "out", [{"name": "s", "format": "jsonl"}], {"s": path})
    assert read_table(out, "documents")["text"].to_pylist() == ["\U0001f389"]
    assert read_artifact(out).counts["num_dropped_undecodable"] == 1


def test_an_id_that_occurs_twice_is_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "id": 1}\n{"text": "y", "id": "1"}\n')
    with pytest.raises(ValueError, match="document id 's/1' occurs twice: id_field 'id' does not name documents"):
        ingest_into(tmp_path / "out", [{"name": "s", "format": "jsonl", "id_field": "id"}], {"s": path})


def test_inputs_and_sources_must_match(tmp_path):
    folder = write_texts(tmp_path / "a", {"1.txt": "one"})
    with pytest.raises(ValueError, match="input slot 'b' belongs to no source"):
        ingest_into(tmp_path / "out", [text_source("a")], {"a": folder, "b": folder})
    with pytest.raises(ValidationError, match="two sources are called 'a'"):
        IngestConfig(sources=[text_source("a"), text_source("a")])


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="ingest kept no document"):
        ingest_into(tmp_path / "out", [text_source("a")], {"a": write_texts(tmp_path / "a", {"1.txt": ""})})


@given(
    sizes=st.lists(st.integers(0, 30), max_size=40),
    shard_bytes=st.integers(1, 60),
)
def test_shards_hold_all_records_in_order_and_close_when_full(sizes, shard_bytes):
    records = [{"doc_id": index, "num_bytes": size} for index, size in enumerate(sizes)]
    shards = list(cut_shards(iter(records), shard_bytes))
    assert [record for shard in shards for record in shard] == records
    for number, shard in enumerate(shards):
        filled = [record["num_bytes"] for record in shard]
        assert sum(filled[:-1]) < shard_bytes
        assert sum(filled) >= shard_bytes or number == len(shards) - 1


def test_the_shard_size_changes_no_document(tmp_path):
    texts = {f"{index:02d}.txt": f"text {index}" * index for index in range(1, 30)}
    folder = write_texts(tmp_path / "s", texts)
    few = ingest_into(tmp_path / "few", [text_source("s")], {"s": folder})
    many = ingest_into(tmp_path / "many", [text_source("s")], {"s": folder}, shard_bytes=200)
    assert len(shard_paths(few, "documents")) == 1 < len(shard_paths(many, "documents"))
    assert read_table(few, "documents").equals(read_table(many, "documents"))


def test_equal_inputs_give_equal_bytes_wherever_and_in_whatever_order_they_were_written(tmp_path):
    texts = {f"{index}.txt": f"text {index}" for index in range(20)}
    outputs = []
    for place in ("here", "there"):
        shuffled = dict(random.Random(place).sample(sorted(texts.items()), len(texts)))
        folder = write_texts(tmp_path / place / "in", shuffled)
        outputs.append(ingest_into(tmp_path / place / "out", [text_source("s")], {"s": folder}))
    here, there = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outputs)
    assert here == there


def test_the_standard_library_is_read_whole(tmp_path):
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = [text_source("stdlib", include=["json/**/*.py", "email/**/*.py"], exclude=["**/mime/**"])]
    events = []
    config = IngestConfig(sources=sources)
    out = run_stage(ingest, config, {"stdlib": stdlib}, tmp_path / "out", events.append)
    files = sorted([*stdlib.glob("json/*.py"), *stdlib.glob("email/*.py")])
    texts = {row["doc_id"]: row["text"] for row in read_table(out, "documents").to_pylist()}
    assert texts == {f"stdlib/{f.relative_to(stdlib).as_posix()}": f.read_bytes().decode() for f in files}
    progress = [event for event in events if event["type"] == "progress"]
    assert progress[-1] == {"type": "progress", "done": len(files), "total": len(files), "unit": "files"}
    assert events[-1]["metrics"] == read_artifact(out).counts
    assert json.loads((tmp_path / "out/observed/throughput.json").read_text())["seconds"] > 0
