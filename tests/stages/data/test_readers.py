import gzip
import json
import subprocess
import sys
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_hub
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ropewalk.stages.data.readers import SourceConfig, list_files, open_source


def read(root, work=None, **fields):
    """All documents of a source, as (id, text, metadata)."""
    source = SourceConfig(name="s", **fields)
    return [(d.doc_id, d.text, json.loads(d.metadata)) for part in open_source(source, root, work) for d in part()]


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


@pytest.mark.parametrize(("name", "opener"), [("a.jsonl", open), ("a.jsonl.gz", gzip.open)])
def test_json_lines_are_read_with_id_and_metadata(tmp_path, name, opener):
    write_jsonl(tmp_path / name, RECORDS, opener)
    assert read(tmp_path, format="jsonl", id_field="id", metadata_fields=["stars"]) == AS_READ


def test_records_without_an_id_are_named_by_file_and_line(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    assert [doc_id for doc_id, _, _ in read(tmp_path, format="jsonl")] == ["s/a.jsonl:1", "s/a.jsonl:2"]


def test_parquet_is_read_with_id_and_metadata(tmp_path):
    records = [{**record, "id": str(record["id"])} for record in RECORDS]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert read(tmp_path, format="parquet", id_field="id", metadata_fields=["stars"]) == AS_READ
    assert read(tmp_path, format="parquet")[1][0] == "s/a.parquet:2"


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
        {"doc_id": "s/train:0", "text": "one", "metadata": '{"n": 1}'},
        {"doc_id": "s/train:1", "text": "two", "metadata": '{"n": 2}'},
    ]
    assert (tmp_path / "huggingface").is_dir(), "the library's cache belongs in the work folder"


@pytest.mark.parametrize(
    ("lines", "fields", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', {}, "s/a.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}\n', {}, "s/a.jsonl:1 is not JSON in UTF-8"),
        (b'{"text": "a"}\n\n{"text": "b"}\n', {}, "s/a.jsonl:2 is not JSON"),
        (b'["a"]\n', {}, "s/a.jsonl:1 is not a JSON object"),
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
