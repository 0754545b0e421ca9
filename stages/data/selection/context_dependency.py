"""How much the answers of a chat attend to what the user said: the context-dependency score.

Reads `chats` and `model` (a small instruction-tuned probe, published: a 1.1B Llama). Writes Scores, and `turns`, which
`mark_context` reads: one row an answer. Source: "On the Loss of Context-awareness in General Instruction Fine-tuning"
(arXiv 2411.02688, section 4), YihanWang617/context_awareness:analyse_dataset/utils.py. In one layer of the probe, for
every token t of an answer,

    a_t = max over heads of the sum over the user's tokens before t of attention(t -> token)
    dependency of the answer = mean of a_t over its tokens
    score of the chat = mean over its answers

The user's tokens are those of user messages (of all turns so far); line breaks, begin tokens and the template are not
among them, nor are system messages and tools.

Where we differ from the code: it takes everything before the first answer for the user's, the system message too;
counts the end-of-turn token and line break behind an answer as the answer's; looks at 32 heads of layer 15 whatever the
model has (its probe has 22 layers; `layer` None is the middle one, which of 32 layers is 15); and finds turns by the
token ids of one template. Its threshold is 0.6 in the README and 0.5 in the code; that belongs to `mark_context`.

Beyond `max_tokens` the end of a chat is cut (published: 2,047), counted; answers with no token left are counted and not
scored. Lost: chats that the template refuses, and chats without an answer that has a token behind one of the user's.
Cost: one pass up to the layer; memory: see `language_model`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.chat_scoring import SideTable, score_chats
from ropewalk.stages.data.selection.language_model import LayerAttention, Precision, load_model, observe_attention
from ropewalk.stages.data.selection.scores import check_scores, write_scores
from ropewalk.stages.data.selection.turn_tokens import TemplateRefusedError, TurnEncoder, TurnTokens
from ropewalk.stages.schema import Record, iterate_table, read_artifact, shard_paths

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "context_dependency"
VERSION = 1

PARTS = ("dependency_max", "num_answers", "num_tokens")
_TALLIES = (
    "num_dropped_template_refused",
    "num_dropped_no_answer",
    "num_answers",
    "num_unscored_answers",
    "num_cut_samples",
    "num_cut_tokens",
)


def turns_schema() -> pa.Schema:
    """Arrow schema of `turns`: one row an answer that was scored."""
    import pyarrow as pa

    fields = (("sample_id", pa.string()), ("message", pa.int32()), ("dependency", pa.float64()))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


class ContextDependencyConfig(Record):
    """Which layer is looked at, and how chats are read."""

    layer: int | None = Field(default=None, ge=0)
    """Number of the layer, from 0. None: the middle one, which of 32 layers is 15."""
    max_tokens: int = Field(default=2_047, ge=2)
    """The end of longer chats is cut."""
    chat_template: str | None = None
    """A Jinja template. None: the probe's own."""
    dtype: Precision = "float32"
    """Of the model's weights and activations."""


def answer_rows(chat: TurnTokens, roles: Sequence[str], num_tokens: int) -> dict[int, tuple[int, int]]:
    """By message: the tokens `[first, end)` of the answers that are left of a chat cut to `num_tokens`.

    Only of answers that have some of the user's tokens before them.
    """
    found = {}
    seen_user = False
    for number, (role, (first, end)) in enumerate(zip(roles, chat.spans, strict=True)):
        if role == "user":
            seen_user |= not all(chat.blank[first : min(end, num_tokens)])
        elif role == "assistant" and seen_user and first < min(end, num_tokens):
            found[number] = first, min(end, num_tokens)
    return found


def user_tokens(chat: TurnTokens, roles: Sequence[str], num_tokens: int) -> list[int]:
    """The places of the user's tokens, line breaks left out."""
    spans = [span for role, span in zip(roles, chat.spans, strict=True) if role == "user"]
    return [place for first, end in spans for place in range(first, min(end, num_tokens)) if not chat.blank[place]]


def dependencies(
    attention: LayerAttention, answers: Mapping[int, tuple[int, int]], user: Sequence[int]
) -> dict[int, float]:
    """By answer: the mean over its tokens of the largest share that a head gives to the user's tokens."""
    import torch

    found = {}
    places = torch.tensor(user)
    for number, (first, end) in answers.items():
        total = 0.0
        for _, weights_HRS in attention.blocks(first, end):
            before = places[places < weights_HRS.shape[2]].to(weights_HRS.device)
            # Rows are answers' tokens: later user tokens have no weight in them.
            total += float(weights_HRS[:, :, before].double().sum(-1).amax(0).sum())
        found[number] = total / (end - first)
    return found


class DependencyScorer:
    """Scores chats with a probe."""

    def __init__(self, config: ContextDependencyConfig, folder: Path) -> None:
        self._config, self._encoder = config, TurnEncoder(folder, config.chat_template)
        self._loaded = load_model(folder, dtype=config.dtype, window=config.max_tokens)
        self._layer = (self._loaded.num_layers - 1) // 2 if config.layer is None else config.layer

    def __call__(self, rows: Sequence[Mapping[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
        """The scores of chats; those that cannot be scored are counted."""
        return [record for row in rows for record in self._score(row, counts)]

    def _score(self, row: Mapping[str, Any], counts: Counter[str]) -> Iterator[dict[str, Any]]:
        roles = [message["role"] for message in row["messages"]]
        try:
            chat = self._encoder.encode(row["messages"])
        except TemplateRefusedError:
            counts["num_dropped_template_refused"] += 1
            return
        ids = chat.ids[: self._config.max_tokens]
        counts["num_cut_samples"] += len(ids) < len(chat.ids)
        counts["num_cut_tokens"] += len(chat.ids) - len(ids)
        answers = answer_rows(chat, roles, len(ids))
        counts["num_answers"] += len(answers)
        counts["num_unscored_answers"] += roles.count("assistant") - len(answers)
        if not answers:
            counts["num_dropped_no_answer"] += 1
            return
        found = self._observe(ids, answers, user_tokens(chat, roles, len(ids)))
        yield {
            "sample_id": row["sample_id"],
            "source": row["source"],
            "score": sum(found.values()) / len(found),
            "dependency_max": max(found.values()),
            "num_answers": len(found),
            "num_tokens": len(ids),
            "turns": [
                {"sample_id": row["sample_id"], "message": number, "dependency": value}
                for number, value in found.items()
            ],
        }

    def _observe(
        self, ids: Sequence[int], answers: Mapping[int, tuple[int, int]], user: Sequence[int]
    ) -> dict[int, float]:
        found: dict[int, float] = {}
        observe_attention(
            self._loaded, ids, lambda seen: found.update(dependencies(seen, answers, user)), layers=[self._layer]
        )
        return found


def check(config: Any, output: Path) -> None:
    """The scores, and that every answer that was scored is in `turns`. Raises ValueError naming file and field."""
    import pyarrow.parquet as pq

    check_scores(config, output)
    for path in shard_paths(output, "turns"):
        if not (found := pq.read_schema(path)).equals(turns_schema()):
            raise ValueError(f"{path}: its columns are {found.names}, or of other types, not those of turns")
    num_answers = sum(batch.num_rows for batch in iterate_table(output, "turns"))
    if (counted := read_artifact(output, "scores").counts["num_answers"]) != num_answers:
        raise ValueError(f"{output / 'artifact.json'}: counts.num_answers is {counted}, but there are {num_answers}")


def run(config: ContextDependencyConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every chat. Raises ValueError on bad input, or if no chat can be scored."""
    build = partial(DependencyScorer, config, inputs["model"])
    side = SideTable("turns", turns_schema)
    scored = score_chats(context, inputs["chats"], build, ("score", *PARTS), _TALLIES, side)
    for path in scored.side_tables:
        os.link(path, output.data / path.name)
    write_scores(output, context, scored.tables, parts=PARTS, counts=scored.counts)
