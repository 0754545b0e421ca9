"""Marks the prompts whose answers depend on what the user said, so that a model learns to tell them apart.

Reads `chats` and `scores` of them (`context_dependency`'s, with its `turns`). Writes Chats: where the dependency of an
answer is above `threshold`, `indicator` is appended to the last user message before it. Source: arXiv 2411.02688,
section 4; YihanWang617/context_awareness:analyse_dataset/process_dataset.py. At inference a user who wants the answer
from the context appends the indicator too; the tokenizer should have it as one token, or at least never split off
differently.

The published code also rounds the score to text in the prompt and back, and ends prompts that end with a letter or
digit by a full stop, marked or not; neither is done here. Threshold: 0.6 in the README and the released data, 0.5 in
the code's default.

No chat is lost: one without a score (`num_unscored`, dropped by the scoring stage) goes on unmarked. Memory: one shard
of chats and one dependency an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.samples import check_samples, open_samples
from ropewalk.stages.schema import (
    Artifact,
    Record,
    chats_schema,
    iterate_table,
    read_artifact,
    shard_paths,
    write_artifact,
    write_shard,
)

NAME = "mark_context"
VERSION = 1
check = check_samples


class MarkContextConfig(Record):
    """What is marked, and how."""

    threshold: float = Field(default=0.6, ge=0, le=1)
    """Answers with a dependency above it are marked."""
    indicator: str = Field(default=" [IND]", min_length=1)
    """Appended to the prompt, as it is."""


def marked_messages(
    messages: list[dict[str, str]], answers: Collection[int], indicator: str
) -> tuple[list[dict[str, str]], int]:
    """The messages with the indicator behind the prompts of some answers; and how many prompts that are."""
    prompts = set()
    for answer in answers:
        prompts.add(max(place for place in range(answer) if messages[place]["role"] == "user"))
    marked = [
        {**message, "content": message["content"] + indicator} if place in prompts else message
        for place, message in enumerate(messages)
    ]
    return marked, len(prompts)


def read_turns(folder: Path, threshold: float) -> dict[str, list[int]]:
    """By sample: the messages whose dependency is above the threshold; samples that were scored all have an entry.

    Raises ValueError if the scores have no `turns`.
    """
    read_artifact(folder, "scores")
    if not list(folder.glob("turns-*.parquet")):
        raise ValueError(f"slot scores has no turns: mark_context takes the scores of context_dependency, not {folder}")
    found: dict[str, list[int]] = {}
    for batch in iterate_table(folder, "turns"):
        for row in batch.to_pylist():
            answers = found.setdefault(row["sample_id"], [])
            if row["dependency"] > threshold:
                answers.append(row["message"])
    return found


def _mark(config: MarkContextConfig, row: dict[str, Any], turns: dict[str, list[int]], counts: Counter[str]) -> None:
    answers = turns.pop(row["sample_id"], None)
    counts["num_unscored"] += answers is None
    if not answers:
        return
    messages = row["messages"]
    roles = [message["role"] for message in messages]
    if any(answer >= len(roles) or roles[answer] != "assistant" or "user" not in roles[:answer] for answer in answers):
        raise ValueError(f"slot scores marks message {max(answers)} of sample {row['sample_id']!r}, which is no answer")
    row["messages"], num_marked = marked_messages(messages, answers, config.indicator)
    counts["num_marked_prompts"] += num_marked
    counts["num_marked_chats"] += 1


def run(config: MarkContextConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write all chats, marked. Raises ValueError if the scores are those of other chats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    read_artifact(inputs["chats"], "chats")
    open_samples(inputs["chats"], "chats")
    turns = read_turns(inputs["scores"], config.threshold)
    counts = Counter(num_in=0, num_kept=0, num_unscored=0, num_marked_chats=0, num_marked_prompts=0)
    paths = shard_paths(inputs["chats"], "chats")
    for number, path in enumerate(paths):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            _mark(config, row, turns, counts)
        counts.update(num_in=len(rows), num_kept=len(rows))
        write_shard(output.data, "chats", number, pa.Table.from_pylist(rows, schema=chats_schema()))
        context.progress(number + 1, len(paths), "shards")
    if turns:
        raise ValueError(f"slot scores has sample {min(turns)!r}, which slot chats lacks: it is of other chats")
    write_artifact(output.data, Artifact(kind="chats", counts=dict(counts)))
    context.log(dict(counts))
