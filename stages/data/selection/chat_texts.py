"""Chats as Documents, so that they can be embedded: one text a chat, `doc_id` its `sample_id`.

Reads `chats`. Writes Documents, one shard a Chats shard. Which words stand for a chat is a choice of the method that
reads the vectors: DEITA and Superfiltering.D embed all of them, SMART the prompts.

Nothing is lost: a chat without such words becomes an empty document (`num_empty`), whose vector `embed` makes zero and
the selecting stages drop. Memory: one shard a worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ropewalk.stages.checks import check_documents
from ropewalk.stages.context import Context, Output
from ropewalk.stages.schema import (
    Artifact,
    Record,
    documents_schema,
    read_artifact,
    shard_paths,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

NAME = "chat_texts"
VERSION = 1
check = check_documents

Words = Literal["everything", "prompts", "answers"]


class ChatTextsConfig(Record):
    """Which words."""

    words: Words = "everything"
    """`prompts`: all messages but the assistant's; `answers`: those alone."""
    separator: str = "\n"
    """Between two messages."""


def text_of(config: ChatTextsConfig, messages: Sequence[Mapping[str, str]]) -> str:
    """The words of a chat."""
    wanted = {"everything": (True, False), "prompts": (False,), "answers": (True,)}[config.words]
    return config.separator.join(
        message["content"] for message in messages if (message["role"] == "assistant") in wanted
    )


def _write_shard(config: ChatTextsConfig, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, path = shard
    records = [_document(row, text_of(config, row["messages"])) for row in pq.read_table(path).to_pylist()]
    write_shard(folder, "documents", number, pa.Table.from_pylist(records, schema=documents_schema()))
    return {
        "num_in": len(records),
        "num_kept": len(records),
        "num_kept_bytes": sum(record["num_bytes"] for record in records),
        "num_empty": sum(not record["text"].strip() for record in records),
    }


def _document(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {
        "doc_id": row["sample_id"],
        "text": text,
        "source": row["source"],
        "num_bytes": len(text.encode()),
        "metadata": row["metadata"],
    }


def run(config: ChatTextsConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write a text for every chat. Raises ValueError if none has one."""
    read_artifact(inputs["chats"], "chats")
    counts: Counter[str] = Counter()
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(inputs["chats"], "chats"))}
    for shard in map_shards(context, partial(_write_shard, config), paths):
        counts.update(shard.counts)
        shard.link_into(output.data)
    if counts["num_empty"] == counts["num_in"]:
        raise ValueError(f"no chat of {inputs['chats']} has {config.words} to write")
    write_artifact(output.data, Artifact(kind="documents", counts=dict(counts)))
    context.log(dict(counts))
