"""Small Chats, Vectors and Scores artifacts, and small models, to select with."""

from pathlib import Path

import numpy as np

from ropewalk.stages.schema import (
    Artifact,
    chats_schema,
    read_artifact,
    read_table,
    scores_schema,
    vectors_schema,
    write_artifact,
    write_table,
)


def turns(*contents):
    """Messages of user and assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def write_chats(folder: Path, chats, sources=None):
    """A Chats artifact of `{sample_id: messages}`."""
    rows = (
        {"sample_id": name, "source": (sources or {}).get(name, "test"), "messages": messages, "metadata": "{}"}
        for name, messages in chats.items()
    )
    write_table(folder, "chats", chats_schema(), rows, shard_records=7)
    write_artifact(folder, Artifact(kind="chats", counts={"num_kept": len(chats)}))
    return folder


def write_vectors(folder: Path, vectors):
    """A Vectors artifact of `{doc_id: vector}`."""
    rows = ({"doc_id": name, "vector": np.asarray(vector, np.float16)} for name, vector in vectors.items())
    size = len(next(iter(vectors.values())))
    write_table(folder, "vectors", vectors_schema(size), rows, shard_records=11)
    write_artifact(folder, Artifact(kind="vectors"))
    return folder


def write_score_table(folder: Path, scores):
    """A Scores artifact of `{sample_id: score}`."""
    rows = ({"sample_id": name, "source": "test", "score": score} for name, score in scores.items())
    write_table(folder, "scores", scores_schema(), rows, shard_records=13)
    write_artifact(folder, Artifact(kind="scores", counts={"num_in": len(scores), "num_scored": len(scores)}))
    return folder


def kept_ids(folder: Path):
    """The ids of a selection, in the order of the table, after its counts were checked."""
    artifact = read_artifact(folder)
    column = "sample_id" if artifact.kind == "chats" else "doc_id"
    ids = read_table(folder, artifact.kind, [column]).column(column).to_pylist()
    counts = artifact.counts
    assert counts["num_kept"] == len(ids)
    dropped = sum(value for name, value in counts.items() if name.startswith("num_dropped_"))
    assert counts["num_in"] == len(ids) + dropped
    return ids
