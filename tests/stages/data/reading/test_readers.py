import bz2
import gzip
import json
import lzma
import os
import pickle
import subprocess
import sys
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import small_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ropewalk.stages.data.reading import readers
from ropewalk.stages.data.reading.globs import list_files
from ropewalk.stages.data.reading.languages import language_of
from ropewalk.stages.data.reading.readers import open_source
from ropewalk.stages.data.reading.sources import MAX_DOCUMENT_BYTES, SourceConfig


def read(root, work=None, part_bytes=2**26, **fields):
    """All documents of a source, as (id, text, metadata). Its parts travel as they would to a worker."""
    source = SourceConfig(name="s", **fields)
    parts = pickle.loads(pickle.dumps(open_source(source, root, work, part_bytes)))
    assert len({part.name for part in parts}) == len(parts)
    return [(d.doc_id, d.text, json.loads(d.metadata)) for part in parts for d in part()]


def dropped(root, **fields):
    """Why the one document of a source was dropped."""
    (part,) = open_source(SourceConfig(name="s", **fields), root, None)
    (document,) = part()
    assert document.text is None
    return document.dropped


def make_files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.mark.parametrize(
    ("include", "exclude", "found"),
    [
        (["**/*"], [], ["B.py", "a.py", "a.txt", "x/a.py", "x/y/a.py", "x/y/b.py"]),
        (["**/*.py"], ["x/**"], ["B.py", "a.py"]),
        (["*.py"], [], ["B.py", "a.py"]),
        (["x/*/a.py"], [], ["x/y/a.py"]),
        (["x/**"], ["**/b.*"], ["x/a.py", "x/y/a.py"]),
        (["**/y/**/*.py"], [], ["x/y/a.py", "x/y/b.py"]),
        (["[ab].py", "a.tx?"], [], ["a.py", "a.txt"]),
        (["*"], ["*.py", "**/*.txt"], []),
    ],
)
def test_globs_select_files_in_sorted_order(tmp_path, include, exclude, found):
    make_files(tmp_path, "x/y/b.py", "x/y/a.py", "x/a.py", "a.txt", "a.py", "B.py")
    assert list_files(tmp_path, include, exclude) == found


NAMES = st.lists(st.sampled_from(["a", "b", "ab", "x.py"]), min_size=1, max_size=3).map("/".join)


@given(
    paths=st.sets(NAMES, max_size=8), glob=st.lists(st.sampled_from(["a", "*", "a*", "*.py"]), min_size=1, max_size=3)
)
def test_globs_without_double_stars_agree_with_pathlib(tmp_path_factory, paths, glob):
    root = tmp_path_factory.mktemp("globs")
    paths = [path for path in paths if not any(other.startswith(path + "/") for other in paths)]
    make_files(root, *paths)
    pattern = "/".join(glob)
    expected = [p for p in paths if PurePosixPath("/" + p).match("/" + pattern)]
    assert list_files(root, [pattern], []) == sorted(expected)


def test_text_files_are_read_exactly(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\r\n\ttab \U0001f389\n".encode())
    assert read(tmp_path, format="text") == [("s/a.txt", "é\r\n\ttab \U0001f389\n", {})]


def test_text_is_decoded_as_the_encoding_says(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    assert read(tmp_path, format="text", encoding="latin-1")[0][1] == "é"
    assert read(tmp_path, format="text")[0][1] is None


def test_a_slot_may_be_one_file(tmp_path):
    make_files(tmp_path, "a.txt", "b.txt")
    assert [doc_id for doc_id, _, _ in read(tmp_path / "b.txt", format="text")] == ["s/b.txt"]


RECORDS = [{"text": "one", "id": 7, "stars": 2.5, "junk": None}, {"text": "two", "id": "x/y", "stars": None}]
AS_READ = [("s/7", "one", {"stars": 2.5}), ("s/x/y", "two", {"stars": None})]


def write_jsonl(path, records, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def arrow_opener(codec):
    class Writer:
        def __init__(self, path, mode):
            self.stream = pa.CompressedOutputStream(str(path), codec)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def writelines(self, lines):
            self.stream.write("".join(lines).encode())

    return Writer


OPENERS = {
    "a.jsonl": open,
    "a.jsonl.gz": gzip.open,
    "a.jsonl.bz2": bz2.open,
    "a.jsonl.xz": lzma.open,
    "a.jsonl.zst": arrow_opener("zstd"),
    "a.jsonl.lz4": arrow_opener("lz4"),
}


@pytest.mark.parametrize(("name", "opener"), OPENERS.items())
def test_json_lines_are_read_with_id_and_metadata(tmp_path, name, opener):
    write_jsonl(tmp_path / name, RECORDS, opener)
    assert read(tmp_path, format="jsonl", id_field="id", metadata_fields=["stars"]) == AS_READ


@pytest.mark.parametrize("name", [name for name in OPENERS if name != "a.jsonl"])
def test_compressed_files_may_be_joined_but_not_cut_or_of_another_kind(tmp_path, name):
    path = tmp_path / name
    write_jsonl(path, [{"text": f"text {number}"} for number in range(100)], OPENERS[name])
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    assert [text for _, text, _ in read(path, format="jsonl")] == [f"text {n % 100}" for n in range(200)]
    for damaged in (whole[: len(whole) // 2], b'{"text": "plain"}\n'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"s/{name} is damaged, or not jsonl: \w"):
            read(path, format="jsonl")


def test_errors_of_the_machine_are_not_taken_for_damage(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", RECORDS, gzip.open)
    (part,) = open_source(SourceConfig(name="s", format="jsonl"), tmp_path, None)
    (tmp_path / "a.jsonl.gz").unlink()
    with pytest.raises(FileNotFoundError):
        list(part())


LINES = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=30)


@given(texts=LINES, part_bytes=st.integers(1, 200), end=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]))
@settings(deadline=None, max_examples=60)
def test_json_lines_keep_their_numbers_however_the_file_is_cut(tmp_path_factory, texts, part_bytes, end, newline):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = newline.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_bytes((lines + newline * end).encode())
    expected = [(f"s/a.jsonl:{number}", text, {}) for number, text in enumerate(texts, 1)]
    assert read(path, format="jsonl", part_bytes=part_bytes) == expected
    assert read(path, format="jsonl") == expected


def test_a_large_file_of_lines_is_several_parts(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 100}] * 50)
    parts = open_source(SourceConfig(name="s", format="jsonl"), tmp_path, None, 1000)
    assert 4 <= len(parts) <= 6
    assert sum(part.num_bytes for part in parts) == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_gigantic_line_is_an_error_and_is_not_loaded(tmp_path, name, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    write_jsonl(tmp_path / name, [{"text": "x"}, {"text": "x" * 5000}], OPENERS[name])
    with pytest.raises(ValueError, match=rf"s/{name}:2 is longer than 1000 bytes"):
        read(tmp_path, format="jsonl")


@pytest.mark.parametrize("limit", [10, None])
def test_a_text_file_that_is_too_long_is_not_loaded(tmp_path, limit):
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)  # A hole: no disk and no memory could hold it.
    assert dropped(tmp_path, format="text", max_bytes=limit) == "too_long"
    assert dropped(tmp_path, format="text", max_bytes=limit, encoding="utf-16") == "too_long"


def test_a_file_may_be_larger_than_its_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("utf-32"))
    assert read(tmp_path, format="text", encoding="utf-32", max_bytes=2)[0][1] == "é"


def test_source_code_knows_its_path_repository_and_language(tmp_path):
    make_files(tmp_path, "one/src/a.PY", "one/.git/config", "two/Makefile", "setup.cfg", "two/strange")
    found = {name: about for name, _, about in read(tmp_path, format="code")}
    assert found == {
        "s/one/src/a.PY": {"path": "one/src/a.PY", "repository": "one", "language": "Python"},
        "s/two/Makefile": {"path": "two/Makefile", "repository": "two", "language": "Makefile"},
        "s/two/strange": {"path": "two/strange", "repository": "two", "language": None},
        "s/setup.cfg": {"path": "setup.cfg", "repository": None, "language": "INI"},
    }


@pytest.mark.parametrize(
    ("name", "language"),
    [("a/b.h", "C"), ("x.tar.gz", None), ("Dockerfile", "Dockerfile"), ("a.d.ts", "TypeScript"), (".bashrc", None)],
)
def test_languages_are_told_by_names(name, language):
    assert language_of(name) == language


def test_what_is_no_file_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"s/link is no regular file \(a broken link, a pipe or a device\): exclude it"
    ):
        read(tmp_path, format="text")
    (tmp_path / "link").unlink()
    os.mkfifo(tmp_path / "pipe")  # To read it would wait for ever.
    with pytest.raises(ValueError, match="s/pipe is no regular file"):
        read(tmp_path, format="text")


def test_records_without_an_id_are_named_by_file_and_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    assert [doc_id for doc_id, _, _ in read(tmp_path, format="jsonl")] == ["s/a.jsonl:1", "s/a.jsonl:2"]


def test_parquet_is_read_with_id_and_metadata(tmp_path):
    records = [{**record, "id": str(record["id"])} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read(tmp_path, format="parquet", id_field="id", metadata_fields=["stars"]) == AS_READ
    assert read(tmp_path, format="parquet")[1][0] == "s/a.parquet:2"


@pytest.mark.parametrize("part_bytes", [1, 300, 2**26])
def test_row_groups_are_read_the_same_together_and_apart(tmp_path, part_bytes):
    table = pa.table({"text": [f"text {number}" for number in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    expected = [(f"s/a.parquet:{number + 1}", f"text {number}", {}) for number in range(100)]
    assert read(tmp_path, format="parquet", part_bytes=part_bytes) == expected


ARROW_RECORDS = pa.table({"n": [1, 2, 3], "text": ["one", "two", "three"], "id": ["a", "b", "c"], "junk": [[1]] * 3})


def write_arrow(path, table, kind):
    if kind == "feather":
        feather.write_feather(table, str(path), compression="lz4", chunksize=2)
        return
    opener = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, opener(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_arrow_files_and_streams_are_read(tmp_path, kind):
    write_arrow(tmp_path / "a.arrow", ARROW_RECORDS, kind)
    assert read(tmp_path, format="arrow", metadata_fields=["n"]) == [
        ("s/a.arrow:1", "one", {"n": 1}),
        ("s/a.arrow:2", "two", {"n": 2}),
        ("s/a.arrow:3", "three", {"n": 3}),
    ]
    assert [doc_id for doc_id, _, _ in read(tmp_path, format="arrow", id_field="id")] == ["s/a", "s/b", "s/c"]


@pytest.mark.parametrize("string", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_arrow_strings_of_every_kind_are_texts(tmp_path, string):
    column = pa.array(["one", "two"])
    column = column.dictionary_encode() if string == "dictionary" else column.cast(string)
    write_arrow(tmp_path / "a.arrow", pa.table({"text": column}), "file")
    assert [text for _, text, _ in read(tmp_path, format="arrow")] == ["one", "two"]


def broken(values, large=False):
    """A string column of bytes that need not be UTF-8."""
    binary, string = (pa.large_binary(), pa.large_string()) if large else (pa.binary(), pa.string())
    return pa.array(values, binary).view(string)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_a_string_that_is_not_utf8_is_undecodable_in_text_and_an_error_in_an_id(tmp_path, kind, large):
    table = pa.table({"text": broken([b"fine", b"\xff\xfe"], large), "id": broken([b"1", b"\xff"])})
    name = "a.parquet" if kind == "parquet" else "a.arrow"
    if kind == "parquet":
        pq.write_table(table, tmp_path / name)
    else:
        write_arrow(tmp_path / name, table, kind)
    wanted = "parquet" if kind == "parquet" else "arrow"
    assert [text for _, text, _ in read(tmp_path, format=wanted)] == ["fine", None]
    with pytest.raises(ValueError, match=rf"s/{name}:1 and later: field 'id' is not UTF-8"):
        read(tmp_path, format=wanted, id_field="id")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"body": ["a"]}), "s/a.arrow has no column 'text'"),
        (pa.table({"text": [1]}), "s/a.arrow:1: field 'text' holds int, not text"),
        (pa.table({"text": pa.array(["a", None])}), "s/a.arrow:2: field 'text' holds NoneType, not text"),
        (pa.table({"text": [b"a"]}), "s/a.arrow:1: field 'text' holds bytes, not text"),
    ],
)
def test_tables_of_other_data_are_errors(tmp_path, table, message):
    write_arrow(tmp_path / "a.arrow", table, "file")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, format="arrow")


@pytest.mark.parametrize("format", ["arrow", "parquet"])
@pytest.mark.parametrize("content", [b"", b"plain text, and some more of it", b"ARROW1\0\0garbage", b"PAR1garbagePAR1"])
def test_damaged_tables_are_errors_that_name_the_file(tmp_path, format, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"s/a.bin is damaged, or not {format}: "):
        read(tmp_path, format=format)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_damaged_arrow_file_never_ends_the_process(tmp_path, kind):
    table = pa.table({"text": [f"text {number}" for number in range(20)]})
    write_arrow(tmp_path / "a.arrow", table, kind)
    whole = (tmp_path / "a.arrow").read_bytes()
    refused = 0
    for place in range(8, len(whole), 3):
        (tmp_path / "a.arrow").write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        try:
            read(tmp_path, format="arrow")
        except (ValueError, MemoryError):
            refused += 1
    assert refused > 50


def test_feather_of_version_1_is_refused_by_name(tmp_path):
    (tmp_path / "a.feather").write_bytes(b"FEA1" + b"\0" * 100)
    with pytest.raises(ValueError, match=r"s/a.feather is Feather of version 1: write it anew as version 2"):
        read(tmp_path, format="arrow")


def hub_data():
    datasets = pytest.importorskip("datasets")
    return datasets, datasets.Dataset.from_list([{"text": "one", "n": 1}, {"text": "two", "n": 2}])


HUB_DOCUMENTS = [("s/test:0", "one", {"n": 1}), ("s/test:1", "two", {"n": 2})]


def test_saved_datasets_are_read(tmp_path):
    datasets, data = hub_data()
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        assert (
            read(tmp_path / name, tmp_path, format="huggingface", split="test", metadata_fields=["n"]) == HUB_DOCUMENTS
        )
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        read(tmp_path / "dict", tmp_path, format="huggingface")


def test_a_saved_dataset_is_cut_into_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"text": f"text {number}", "junk": [number]} for number in range(100)])
    data.save_to_disk(tmp_path / "data")
    source = SourceConfig(name="s", format="huggingface")
    parts = open_source(source, tmp_path / "data", tmp_path, 400)
    assert len(parts) > 2
    assert len(pickle.dumps(parts[0])) < 10_000, "a part takes no data with it"
    expected = [(f"s/train:{number}", f"text {number}", {}) for number in range(100)]
    assert read(tmp_path / "data", tmp_path, 400, format="huggingface") == expected
    with pytest.raises(ValueError, match="s/train has no column 'body'"):
        read(tmp_path / "data", tmp_path, format="huggingface", text_field="body")


def test_a_dataset_folder_is_read_through_the_library(tmp_path):
    hub_data()
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "test.jsonl", [{"text": "one", "n": 1}, {"text": "two", "n": 2}])
    work = tmp_path / "work"
    found = read(tmp_path / "data", work, format="huggingface", split="test", metadata_fields=["n"])
    assert found == HUB_DOCUMENTS
    assert (work / "huggingface").is_dir(), "the library's cache belongs in the work folder"


def test_a_dataset_is_downloaded_from_a_hub_at_its_commit(tmp_path):
    command = [sys.executable, small_hub.__file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [
        {"doc_id": "s/train:0", "text": "one", "metadata": '{"n": 1}', "dropped": None},
        {"doc_id": "s/train:1", "text": "two", "metadata": '{"n": 2}', "dropped": None},
    ]
    assert (tmp_path / "huggingface").is_dir(), "the library's cache belongs in the work folder"


@pytest.mark.parametrize(
    ("lines", "fields", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', {}, "s/a.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}\n', {}, "s/a.jsonl:1 is not JSON in UTF-8"),
        (b'{"text": "a"}\n\n{"text": "b"}\n', {}, "s/a.jsonl:2 is not JSON"),
        (b'["a"]\n', {}, "s/a.jsonl:1 is not a JSON object"),
        (b"[" * 100_000 + b"\n", {}, "s/a.jsonl:1 is not JSON in UTF-8: maximum recursion"),
        (b'{"text": "a", "n": 1' + b"0" * 5000 + b"}\n", {}, "s/a.jsonl:1 is not JSON in UTF-8: Exceeds the limit"),
        (b'{"txt": "a"}\n', {}, "s/a.jsonl:1 has no field 'text'"),
        (b'{"text": null}\n', {}, "s/a.jsonl:1: field 'text' holds NoneType, not text"),
        (b'{"text": "a", "id": 1.5}\n', {"id_field": "id"}, "field 'id' is neither a string nor an integer"),
        (b'{"text": "a"}\n', {"metadata_fields": ["url"]}, "s/a.jsonl:1 has no field 'url'"),
        (b'{"text": "a", "x": NaN}\n', {"metadata_fields": ["x"]}, "s/a.jsonl:1: metadata_fields cannot be written"),
    ],
)
def test_malformed_records_are_errors_that_name_the_place(tmp_path, lines, fields, message):
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, format="jsonl", **fields)


def test_missing_parquet_columns_are_named(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"s/a.parquet has no column 'text'"):
        read(tmp_path, format="parquet")


def test_a_folder_without_matching_files_is_an_error(tmp_path):
    make_files(tmp_path, "a.txt")
    with pytest.raises(
        ValueError, match=r"source s: no file matches include \('\*\*/\*.py',\) and exclude \('x/\*\*',\)"
    ):
        read(tmp_path, format="text", include=["**/*.py"], exclude=["x/**"])


def test_a_source_without_input_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="connect a folder or file to the slot 's'"):
        read(None, format="text")
    with pytest.raises(ValueError, match="needs an input slot of that name, or dataset and revision"):
        read(None, tmp_path, format="huggingface")
    with pytest.raises(ValueError, match="has both an input slot and dataset"):
        read(tmp_path, tmp_path, format="huggingface", dataset="org/name", revision="0" * 40)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "text", "text_field": "body"}, "text_field does not apply to format text"),
        ({"format": "parquet", "encoding": "latin-1"}, "encoding does not apply to format parquet"),
        ({"format": "huggingface", "include": ["*.py"]}, "include does not apply to format huggingface"),
        ({"format": "code", "text_field": "body"}, "text_field does not apply to format code"),
        ({"format": "arrow", "encoding": "latin-1"}, "encoding does not apply to format arrow"),
        ({"format": "text", "max_bytes": MAX_DOCUMENT_BYTES + 1}, "less than or equal to 1073741824"),
        ({"format": "jsonl", "subset": "en"}, "subset does not apply to format jsonl"),
        ({"format": "text", "encoding": "utf-9"}, "unknown encoding 'utf-9'"),
        ({"format": "text", "min_bytes": 9, "max_bytes": 8}, "max_bytes 8 is below min_bytes 9"),
        ({"format": "huggingface", "dataset": "org/name"}, "dataset and revision go together"),
        ({"format": "huggingface", "dataset": "org/name", "revision": "main"}, "revision"),
        ({"format": "text", "name": "a/b"}, "name"),
    ],
)
def test_settings_that_cannot_hold_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        SourceConfig(**{"name": "s", **fields})


def test_a_source_survives_its_own_json():
    source = SourceConfig(name="s", format="jsonl", text_field="body", include=["*.jsonl"])
    assert SourceConfig.model_validate_json(source.model_dump_json()) == source
