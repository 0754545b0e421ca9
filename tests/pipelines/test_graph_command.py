"""The graph of a pipeline, drawn for people and listed for programs."""

import json
import re
import shutil
import subprocess

import pytest
from engine import run
from toy_stages import diamond

from ropewalk.pipelines import graph_command
from ropewalk.pipelines.load import Loaded

REQUEST = {"pipeline": "diamond", "param": [], "set": []}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / 'a "quoted" file'
    path.write_text("x")
    return path


@pytest.fixture
def graph(file):
    return graph_command.graph_json(diamond(external=file), {"first": "reuse", "left": "run"})


def test_every_step_and_external_file_is_a_node_and_every_slot_an_edge(graph, file):
    assert [node["name"] for node in graph["nodes"]] == ["first", "left", "right", f"external:{file}", "last"]
    assert [(e["from"], e["to"], e["slot"]) for e in graph["edges"]] == [
        ("first", "left", "number"),
        ("first", "right", "a"),
        (f"external:{file}", "last", "file"),
        ("left", "last", "left"),
        ("right", "last", "right"),
    ]
    assert graph["nodes"][0] == {"name": "first", "kind": "step", "stage": "number", "status": "reuse"}


def test_mermaid_draws_every_node_once_and_escapes_quotes(graph):
    lines = graph_command.mermaid(graph).splitlines()
    assert lines[0] == "flowchart TD"
    ids = [match[1] for line in lines if (match := re.match(r"  (n\d)[(\[]", line))]
    assert ids == ["n0", "n1", "n2", "n3", "n4"]
    assert sum("-->" in line for line in lines) == 5
    assert '"quoted"' not in "\n".join(lines) and "#quot;quoted#quot;" in "\n".join(lines)
    assert any(line.startswith("  style n0 fill:") for line in lines)


def test_dot_is_read_by_graphviz(graph):
    text = graph_command.dot(graph)
    assert text.count(" -> ") == 5 and r"\"quoted\"" in text
    if shutil.which("dot"):
        subprocess.run(["dot", "-Tsvg"], input=text, text=True, capture_output=True, check=True)


def test_the_command_shows_what_a_run_would_do(tmp_path, monkeypatch, capsys):
    run(diamond(), tmp_path)
    monkeypatch.setattr("ropewalk.pipelines.plan_commands.load_pipeline", lambda *given: Loaded(diamond(value=5)))
    graph_command.show_graph(REQUEST, str(tmp_path), form="mermaid", with_status=True, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert {node["name"]: node["status"] for node in shown["nodes"]} == {
        "first": "run",
        "left": "may-run",
        "right": "may-run",
        "last": "may-run",
    }
    graph_command.show_graph(REQUEST, str(tmp_path), form="dot", with_status=False, as_json=False)
    assert capsys.readouterr().out.startswith('digraph "diamond" {')
