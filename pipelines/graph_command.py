"""`ropewalk graph`: a pipeline's steps and what flows between them, for people (mermaid, dot) and programs (JSON)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Literal

from ropewalk.infra.step import Pipeline
from ropewalk.pipelines.output import emit
from ropewalk.pipelines.plan_commands import Request, load, make_plan

GraphFormat = Literal["mermaid", "dot"]
COLOURS = {"reuse": "#c8e6c9", "run": "#ffe0b2", "may-run": "#fff9c4"}


def show_graph(request: Request, store_uri: str, *, form: GraphFormat, with_status: bool, as_json: bool) -> int:
    """Print the graph of a pipeline, with what a run would do to each step if `with_status`."""
    pipeline = load(request).pipeline
    statuses = {plan.name: plan.status for plan in make_plan(request, store_uri)} if with_status else {}
    graph = graph_json(pipeline, statuses)
    if as_json:
        emit(graph)
    else:
        sys.stdout.write({"mermaid": mermaid, "dot": dot}[form](graph) + "\n")
    return 0


def graph_json(pipeline: Pipeline, statuses: Mapping[str, str]) -> dict[str, Any]:
    """Nodes (steps, and external inputs by path) and edges (from, to, slot), in the pipeline's order."""
    nodes: dict[str, dict[str, Any]] = {}
    edges = []
    for step in pipeline:
        for slot, external in step.externals.items():
            name = f"external:{external.path}"
            nodes.setdefault(name, {"name": name, "kind": "external", "path": external.path})
            edges.append({"from": name, "to": step.name, "slot": slot})
        edges += [{"from": name, "to": step.name, "slot": slot} for slot, name in step.upstream.items()]
        status = statuses.get(step.name)
        nodes[step.name] = {"name": step.name, "kind": "step", "stage": step.stage.NAME, "status": status}
    return {"pipeline": pipeline.name, "nodes": list(nodes.values()), "edges": edges}


def mermaid(graph: Mapping[str, Any]) -> str:
    """The graph as a mermaid flowchart, which GitHub and MLflow's notes draw."""
    ids = {node["name"]: f"n{number}" for number, node in enumerate(graph["nodes"])}
    lines = ["flowchart TD"]
    for node in graph["nodes"]:
        label = "<br/>".join(line.replace('"', "#quot;") for line in _label(node))
        shape = f'("{label}")' if node["kind"] == "step" else f'[/"{label}"/]'
        lines.append(f"  {ids[node['name']]}{shape}")
    for edge in graph["edges"]:
        slot = "" if edge["slot"] == edge["from"] else f'|"{edge["slot"]}"|'
        lines.append(f"  {ids[edge['from']]} -->{slot} {ids[edge['to']]}")
    for node in graph["nodes"]:
        if node.get("status") in COLOURS:
            lines.append(f"  style {ids[node['name']]} fill:{COLOURS[node['status']]}")
    return "\n".join(lines)


def dot(graph: Mapping[str, Any]) -> str:
    """The graph in Graphviz' language."""
    lines = [f"digraph {_quoted(graph['pipeline'])} {{", "  node [shape=box, style=filled, fillcolor=white];"]
    for node in graph["nodes"]:
        attributes = {"label": "\n".join(_label(node))}
        if node["kind"] == "external":
            attributes["shape"] = "folder"
        if node.get("status") in COLOURS:
            attributes["fillcolor"] = COLOURS[node["status"]]
        listed = ", ".join(f"{name}={_quoted(value)}" for name, value in attributes.items())
        lines.append(f"  {_quoted(node['name'])} [{listed}];")
    for edge in graph["edges"]:
        label = "" if edge["slot"] == edge["from"] else f" [label={_quoted(edge['slot'])}]"
        lines.append(f"  {_quoted(edge['from'])} -> {_quoted(edge['to'])}{label};")
    return "\n".join([*lines, "}"])


def _label(node: Mapping[str, Any]) -> list[str]:
    if node["kind"] == "external":
        return [node["path"]]
    stage = [] if node["stage"] == node["name"] else [f"stage {node['stage']}"]
    return [node["name"], *stage, *([node["status"]] if node.get("status") else [])]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
