import gzip
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from row_invariants import run_stage

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.alignment import chats
from ropewalk.stages.data.alignment.chats import ChatsConfig
from ropewalk.stages.data.alignment.conversations import assistant, user
from ropewalk.stages.schema import read_artifact, read_table

Q, A = user("why?"), assistant("so")


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)


def read(tmp_path, config, **inputs):
    folder = run_stage(chats, ChatsConfig.model_validate(config), inputs, tmp_path / "out")
    chats.check(ChatsConfig.model_validate(config), folder)
    return read_table(folder, "chats").to_pylist(), read_artifact(folder, "chats").counts


def test_three_layouts_become_the_same_chats(tmp_path):
    write_lines(tmp_path / "openai" / "a.jsonl", [{"messages": [Q, A]}])
    parts = [{"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]}, A]
    write_lines(tmp_path / "openai" / "b.jsonl.gz", [{"messages": parts}])
    (tmp_path / "alpaca.json").write_text(
        json.dumps([{"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "i", "output": "o"}])
    )
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    pq.write_table(pa.Table.from_pylist([{"id": 7, "conversations": turns}]), tmp_path / "share.parquet")
    sources = [
        {"name": "openai"},
        {"name": "alpaca", "layout": "alpaca"},
        {"name": "share", "layout": "sharegpt", "id_field": "id"},
    ]
    slots = {"openai": tmp_path / "openai", "alpaca": tmp_path / "alpaca.json", "share": tmp_path / "share.parquet"}
    rows, counts = read(tmp_path, {"sources": sources}, **slots)
    assert {row["sample_id"]: row["messages"] for row in rows} == {
        "openai/a.jsonl:1": [Q, A],
        "openai/b.jsonl.gz:1": [user("why"), A],
        "alpaca/alpaca.json:1": [user("add\n\n1 2"), assistant("3")],
        "alpaca/alpaca.json:2": [user("i"), assistant("o")],
        "share/7": [{"role": "system", "content": "s"}, user("h"), assistant("g")],
    }
    assert counts["num_in"] == counts["num_kept"] == 5


def test_every_drop_is_counted_by_its_reason(tmp_path):
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    records = [
        [Q, A],
        [Q, A],
        [Q, A, A],
        [Q],
        [user(""), A],
        [picture, A],
        [Q, {"role": "assistant", "content": None}],
        [{"role": "robot", "content": "x"}, A],
        [user("\ud800"), A],
    ]
    write_lines(tmp_path / "x.jsonl", [{"messages": messages} for messages in records])
    rows, counts = read(tmp_path, {"sources": [{"name": "x"}]}, x=tmp_path / "x.jsonl")
    assert [row["sample_id"] for row in rows] == ["x/x.jsonl:1"]
    assert counts == {
        "num_in": 9,
        "num_kept": 1,
        "num_dropped_duplicate": 1,
        "num_dropped_broken_alternation": 1,
        "num_dropped_unanswered": 1,
        "num_dropped_empty_content": 1,
        "num_dropped_not_text": 2,
        "num_dropped_unknown_role": 1,
        "num_dropped_undecodable": 1,
    }


def test_instructions_without_answers_are_kept_where_they_are_wanted(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"instruction": "write", "input": "", "output": ""}])
    source = {"name": "x", "layout": "alpaca"}
    rows, _ = read(tmp_path, {"sources": [source], "enable_unanswered": True}, x=tmp_path / "x.jsonl")
    assert rows[0]["messages"] == [user("write")]


def test_metadata_is_kept_as_json(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"messages": [Q, A], "gold": ["d1", "é"], "n": 1}])
    source = {"name": "x", "metadata_fields": ["n", "gold"]}
    rows, _ = read(tmp_path, {"sources": [source]}, x=tmp_path / "x.jsonl")
    assert json.loads(rows[0]["metadata"]) == {"gold": ["d1", "é"], "n": 1}


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        ('{"messages": 3}\n', {}, "x/x.jsonl:1: field 'messages' is no list of messages"),
        ('{"chat": []}\n', {}, "x/x.jsonl:1 has no field 'messages'"),
        ('{"messages": [{"content": "a"}]}\n', {}, "has no field 'role'"),
        ("[1]\n", {}, "x.jsonl:1 is not a JSON object"),
        ("{\n", {}, "x.jsonl:1 is not JSON in UTF-8"),
        ('{"messages": [], "id": 1.5}\n', {"id_field": "id"}, "neither a string nor an integer"),
        ('{"messages": [], "id": 1}\n' * 2, {"id_field": "id"}, "chat id 'x/1' occurs twice"),
        ('{"messages": []}\n', {"metadata_fields": ["gold"]}, "has no field 'gold'"),
        ('{"messages": []}\n', {}, "chats kept no chat"),
    ],
)
def test_malformed_records_are_named(tmp_path, content, source, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, {"sources": [{"name": "x", **source}]}, x=tmp_path / "x.jsonl")


def test_unconnected_and_unknown_slots_are_named(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    output = Output(tmp_path / "data", tmp_path / "observed")
    for inputs, message in [
        ({}, "source x has no input"),
        ({"x": tmp_path / "x.txt"}, "x.txt is none of"),
        ({"x": tmp_path, "y": tmp_path}, "slot 'y' belongs to no source"),
    ]:
        with pytest.raises(ValueError, match=message):
            chats.run(ChatsConfig.model_validate({"sources": [{"name": "x"}]}), inputs, output, LocalContext(tmp_path))
    with pytest.raises(ValidationError, match="two sources are called 'x'"):
        ChatsConfig.model_validate({"sources": [{"name": "x"}, {"name": "x"}]})


def test_importing_the_stages_imports_nothing_heavy():
    names = [
        "chats",
        "chat_tokens",
        "mosaic",
        "retrieval_augmented",
        "agent_write",
        "long_questions",
        "short_to_long",
        "p_mix",
    ]
    code = (
        "import sys, importlib\n"
        f"for name in {names}: importlib.import_module('ropewalk.stages.data.alignment.' + name)\n"
        "heavy = 'torch transformers tokenizers pyarrow numpy requests bm25s jinja2'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
