import hashlib
import json
import pickle
import random
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data import ingest
from ropewalk.stages.data.ingest import IngestConfig
from ropewalk.stages.data.reading.first_seen import first_seen
from ropewalk.stages.data.reading.shard_plan import shard_ends
from ropewalk.stages.data.reading.unit_reader import Unit, cut_shards
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
    texts["9"] = "\0"
    out = ingest_into(
        tmp_path / "out",
        [text_source("s", min_bytes=3, max_bytes=10)],
        {"s": write_texts(tmp_path / "s", texts)},
    )
    assert read_artifact(out, "documents").counts == {
        "num_in": 9,
        "num_kept": 2,
        "num_kept_bytes": 8,
        "num_dropped_undecodable": 1,
        "num_dropped_nul_bytes": 1,
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


@given(sizes=st.lists(st.integers(1, 30), max_size=40), shard_bytes=st.integers(1, 60))
def test_shards_are_planned_as_they_would_be_cut(sizes, shard_bytes):
    shards = list(cut_shards(({"num_bytes": size} for size in sizes), shard_bytes))
    assert shard_ends(np.array(sizes, dtype=np.uint32), shard_bytes) == np.cumsum([len(s) for s in shards]).tolist()


def test_shards_of_tiny_documents_close_by_number():
    assert shard_ends(np.ones(150_000, dtype=np.uint32), 2**24) == [65_536, 131_072, 150_000]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_first_seen_is_what_a_set_would_say(pairs):
    # High words of different buckets, of which some differ in one half of the digest alone.
    digests = [(high * (2**62 + 1), low * 2**40) for high, low in pairs]
    seen, expected = set(), []
    for digest in digests:
        expected.append(digest not in seen)
        seen.add(digest)
    assert first_seen(np.array(digests, dtype="<u8").reshape(-1, 2)).tolist() == expected


class UnorderedContext(LocalContext):
    """Applies functions in another order than that of the items, to pickled copies, as workers would."""

    def map(self, function, items, *, resources=None):
        items = list(items)
        results = {}
        for number in random.Random(len(items)).sample(range(len(items)), len(items)):
            copied, item = pickle.loads(pickle.dumps((function, items[number])))
            results[number] = copied(item)
        return iter([results[number] for number in range(len(items))])


def one_by_one(texts_by_source, shard_bytes):
    """Shards of (id, text), and how many duplicates there were: a set and one loop."""
    seen, duplicates, shards, filled = set(), 0, [[]], 0
    for name, texts in texts_by_source.items():
        for number, text in enumerate(texts, 1):
            if not text.strip(" "):
                continue
            if text in seen:
                duplicates += 1
                continue
            seen.add(text)
            if filled >= shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((f"{name}/part.jsonl:{number}", text))
            filled += len(text)
    return shards, duplicates


TEXTS = st.lists(st.sampled_from([" ", "a", "bb", "ccc", "dddd", "x" * 20, "y" * 40, "z" * 60]), max_size=25)


@given(
    texts=st.fixed_dictionaries(dict.fromkeys("stu", TEXTS)),
    shard_bytes=st.integers(1, 120),
    group=st.integers(1, 5),
)
@settings(deadline=None, max_examples=20)
def test_any_cutting_of_the_work_gives_what_reading_one_by_one_gives(texts, shard_bytes, group):
    expected, duplicates = one_by_one(texts, shard_bytes)
    sources = [{"name": name, "format": "jsonl"} for name in texts]
    config = IngestConfig(sources=sources, shard_bytes=shard_bytes)

    def grouped(source, parts, unit_bytes):
        parts = list(parts)
        return [Unit(source, tuple(parts[start : start + group])) for start in range(0, len(parts), group)]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        inputs = {}
        for name, lines in texts.items():
            inputs[name] = write_texts(
                Path(folder) / name, {"part.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in lines)}
            )
        if not expected[0]:
            with pytest.raises(ValueError, match="ingest kept no document"):
                run_stage(ingest, config, inputs, Path(folder) / "out")
            return
        out = run_stage(ingest, config, inputs, Path(folder) / "out")
        patch.setattr(ingest, "group_parts", grouped)
        other = run_unordered(config, inputs, Path(folder) / "other")
        assert {p.name: p.read_bytes() for p in other.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}
        shards = [read_shard(path) for path in shard_paths(out, "documents")]
        assert [[(row["doc_id"], row["text"]) for row in rows] for rows in shards] == expected
        assert read_artifact(out).counts["num_dropped_duplicate"] == duplicates
        ingest.check(config, out)


def read_shard(path):
    return pq.read_table(path).to_pylist()


def run_unordered(config, inputs, folder, context=UnorderedContext):
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    ingest.run(config, inputs, output, context(folder / "work"))
    return output.data


def test_ids_must_differ_across_units(tmp_path):
    folder = tmp_path / "s"
    lines = {f"{number:02d}.jsonl": json.dumps({"text": f"text {number}", "id": number}) for number in range(20)}
    write_texts(folder, lines | {"30.jsonl": '{"text": "other", "id": 7}', "40.jsonl": '{"text": "more", "id": 3}'})
    config = IngestConfig(sources=[{"name": "s", "format": "jsonl", "id_field": "id"}], shard_bytes=1)
    with pytest.raises(ValueError, match="document id 's/7' occurs twice: id_field 'id' does not name documents"):
        run_unordered(config, {"s": folder}, tmp_path / "out")
    (folder / "30.jsonl").unlink()
    (folder / "40.jsonl").unlink()
    out = run_unordered(config, {"s": folder}, tmp_path / "again")
    assert read_artifact(out).counts["num_kept"] == 20


def test_the_id_of_a_dropped_document_counts_too(tmp_path):
    folder = write_texts(tmp_path / "s", {"a.jsonl": '{"text": "", "id": 1}', "b.jsonl": '{"text": "x", "id": 1}'})
    with pytest.raises(ValueError, match="document id 's/1' occurs twice"):
        ingest_into(tmp_path / "out", [{"name": "s", "format": "jsonl", "id_field": "id"}], {"s": folder})


def test_sources_may_name_their_documents_alike(tmp_path):
    folder = write_texts(tmp_path / "s", {"a.jsonl": '{"text": "x", "id": 1}'})
    other = write_texts(tmp_path / "t", {"a.jsonl": '{"text": "y", "id": 1}'})
    sources = [{"name": name, "format": "jsonl", "id_field": "id"} for name in "st"]
    out = ingest_into(tmp_path / "out", sources, {"s": folder, "t": other})
    assert read_table(out, "documents")["doc_id"].to_pylist() == ["s/1", "t/1"]


def test_a_broken_file_in_a_later_unit_is_named(tmp_path):
    folder = write_texts(tmp_path / "s", {"a.jsonl": '{"text": "x"}', "b.jsonl": '{"text": '})
    with pytest.raises(ValueError, match=r"s/b.jsonl:1 is not JSON in UTF-8"):
        ingest_into(tmp_path / "out", [{"name": "s", "format": "jsonl"}], {"s": folder}, shard_bytes=1)


def test_finished_units_and_shards_outlive_a_crash(tmp_path):
    texts = {f"{index:02d}.txt": f"text {index}" * index for index in range(1, 20)}
    folder = write_texts(tmp_path / "s", texts)
    config = IngestConfig(sources=[text_source("s")], shard_bytes=60)
    whole = ingest_into(tmp_path / "whole", config.sources, {"s": folder}, shard_bytes=60)
    work = tmp_path / "work"
    work.mkdir()
    done = []
    attempts = 0
    while True:
        output = Output(tmp_path / f"data{attempts}", tmp_path / f"observed{attempts}")
        for path in (output.data, output.observed):
            path.mkdir()
        try:
            ingest.run(config, {"s": folder}, output, CrashingContext(work, done=done))
            break
        except RuntimeError:
            attempts += 1
    assert attempts > 5
    assert len(done) == len(set(done)), "what was finished was done again"
    assert {p.name: p.read_bytes() for p in output.data.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


class CrashingContext(LocalContext):
    """Dies before its fourth item."""

    def __init__(self, work, done):
        super().__init__(work)
        self.done = done

    def map(self, function, items, *, resources=None):
        for number, item in enumerate(items):
            if number == 3:
                raise RuntimeError("killed")
            result = function(item)
            self.done.append((str(getattr(function, "args", function)[0]), item[0]))
            yield result


def test_duplicates_only_leave_one_document(tmp_path):
    folder = write_texts(tmp_path / "s", {f"{number}.txt": "same text" for number in range(50)})
    out = run_unordered(IngestConfig(sources=[text_source("s")], shard_bytes=20), {"s": folder}, tmp_path / "out")
    assert read_table(out, "documents")["doc_id"].to_pylist() == ["s/0.txt"]
    assert read_artifact(out).counts["num_dropped_duplicate"] == 49


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_a_nul_character_makes_no_text_in_any_format(tmp_path, name):
    table = pa.table({"text": ["a\0b", "fine"]})
    (tmp_path / "s").mkdir()
    path = tmp_path / "s" / name
    if name == "a.jsonl":
        path.write_text('{"text": "a\\u0000b"}\n{"text": "fine"}\n')
    elif name == "a.parquet":
        pq.write_table(table, path)
    elif name == "a.arrow":
        feather.write_feather(table, str(path))
    else:
        path.write_text("a\0b")
        (tmp_path / "s" / "b.txt").write_text("fine")
    wanted = {"txt": "code"}.get(path.suffix[1:], path.suffix[1:])
    out = ingest_into(tmp_path / "out", [{"name": "s", "format": wanted}], {"s": tmp_path / "s"})
    assert read_table(out, "documents")["text"].to_pylist() == ["fine"]
    assert read_artifact(out).counts["num_dropped_nul_bytes"] == 1


def test_digests_are_of_the_text(tmp_path):
    folder = write_texts(tmp_path / "s", {"a.txt": "é"})
    run_unordered(IngestConfig(sources=[text_source("s")]), {"s": folder}, tmp_path / "out")
    (texts,) = (tmp_path / "out" / "work" / "units" / "files").glob("*/texts")
    assert texts.read_bytes() == hashlib.sha256("é".encode()).digest()[:16]


def test_the_pages_of_a_shard_do_not_show_how_the_work_was_cut(tmp_path, monkeypatch):
    lines = [json.dumps({"text": hashlib.sha256(b"%d" % number).hexdigest() * 20}) for number in range(3000)]
    folder = write_texts(tmp_path / "s", {f"{f:02d}.jsonl": "\n".join(lines[f * 150 :][:150]) for f in range(20)})
    config = IngestConfig(sources=[{"name": "s", "format": "jsonl"}])
    whole = ingest_into(tmp_path / "whole", config.sources, {"s": folder})
    monkeypatch.setattr(ingest, "group_parts", lambda source, parts, _: [Unit(source, (part,)) for part in parts])
    cut = ingest_into(tmp_path / "cut", config.sources, {"s": folder})
    assert [path.read_bytes() for path in shard_paths(cut, "documents")] == [
        path.read_bytes() for path in shard_paths(whole, "documents")
    ]


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
    assert progress == [{"type": "progress", "done": 1, "total": 1, "unit": unit} for unit in ("units", "shards")]
    assert events[-1]["metrics"] == read_artifact(out).counts
    assert json.loads((tmp_path / "out/observed/throughput.json").read_text())["seconds"] > 0
