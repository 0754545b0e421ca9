"""Question answering with retrieved passages, hard negatives among them, with or without reasoning.

Reads `chats` (one question, one answer), `documents` (the passages), and for `reasoning="generated"` the optional
slots `model` and `calls` (see `ropewalk.stages.data.alignment.calls`). Writes Chats: passages and question, then the
answer, behind a reasoning where wanted; `metadata.passages` has the documents in the order shown and `metadata.gold`
the places of the gold ones; and, where a model was asked, `calls-*.parquet`.

Method: fine-tuning for retrieval-augmented generation (Jin et al., 2024, arXiv 2410.05983). Implicit: the passages
that a retriever finds for the question, most of which mislead (hard negatives), stand in the context, the target is
the answer. Explicit: the target first says which passages matter and what follows. Reordering: the best passages first
and last, alternating inwards. The retriever is BM25; passages are shown whole, so cut long documents before.

With `gold_field`, the chat's metadata names the passages that answer it: these are always shown, and the rest are the
best others. As an answer may stand in passages that nobody marked, others that contain it are not taken
(`num_passages_excluded`). Where BM25 finds too few, passages drawn by `seed` fill up (`num_passages_random`).

Lost, counted by reason: chats of several turns (`several_turns`), without the gold field (`no_gold`), with gold that
is not among the documents (`unknown_gold`) or leaves no room for others (`too_many_gold`), without a given reasoning
(`no_reasoning`), and samples lost in a call. Memory: a worker holds all passages and their index; cut the corpus to
what its questions need.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.calls import GenerationConfig, open_caller
from ropewalk.stages.data.alignment.conversations import (
    Chat,
    assistant,
    chat_of,
    check_chats,
    fill_in,
    require_placeholders,
    single_turn,
    user,
)
from ropewalk.stages.data.alignment.generation import CALL_REASONS, Ask, DroppedError, SampleWriter, generate
from ropewalk.stages.data.alignment.passages import PassageIndex, alternate_inwards, insert_at_depth
from ropewalk.stages.schema import (
    Artifact,
    Record,
    chats_schema,
    iterate_table,
    read_artifact,
    seeded_rng,
    shard_paths,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import Shard, map_shards

NAME = "retrieval_augmented"
VERSION = 1
check = check_chats

REASONS = ("several_turns", "no_gold", "unknown_gold", "too_many_gold", "no_reasoning")
_EXTRA = ("num_passages_excluded", "num_passages_random")
_PROMPT = """\
Answer the question from the passages below. Not all of them are about it.

{passages}

Question: {question}"""
_REASONED_PROMPT = """\
Answer the question from the passages below. Not all of them are about it: first say which ones are and what \
follows from them, then give the answer.

{passages}

Question: {question}"""
_REASONING_PROMPT = """\
{passages}

Question: {question}

The answer is: {answer}

In a few sentences, say which of the passages above lead to this answer, by their numbers, why those that merely look \
alike do not, and how the answer follows. Give only this reasoning."""


class RetrievalAugmentedConfig(Record):
    """What is shown with a question, and what is the target."""

    num_passages: int = Field(default=10, ge=1)
    """Passages shown with each question; fewer only if there are no more."""
    gold_field: str | None = None
    """The field of the chats' metadata with the doc_id, or a list of them, that answers. None: what BM25 finds."""
    order: Literal["retrieved", "reordered", "shuffled", "gold_at_depth"] = "retrieved"
    """Best first; best first and last, alternating inwards; drawn by `seed`; or gold at `gold_depth_fraction` among the
    others, best first."""
    gold_depth_fraction: float = Field(default=0.5, ge=0, le=1)
    """Where gold stands, as the fraction of the other passages before it. `gold_at_depth` only."""
    enable_answer_exclusion: bool = True
    """Take no other passage that contains the answer's text. With `gold_field` only."""
    reasoning: Literal["none", "given", "generated"] = "none"
    """Before the answer: nothing, the text of `reasoning_field`, or what a model writes when it is shown the answer."""
    reasoning_field: str = "reasoning"
    """The field of the chats' metadata with a reasoning. `given` only."""
    generation: GenerationConfig = GenerationConfig(max_new_tokens=1024)
    """The model that writes the reasoning. `generated` only."""
    prompt: str | None = None
    """The user's message, with {passages} and {question}. None: one that asks for a reasoning if there is one."""
    answer_format: str = "{reasoning}\n\nAnswer: {answer}"
    """The assistant's message where there is a reasoning, with {reasoning} and {answer}."""
    reasoning_prompt: str = _REASONING_PROMPT
    """Asks for a reasoning, with {passages}, {question} and {answer}. `generated` only."""
    seed: int = 0
    """Draws passages that fill up, and shuffles."""

    @model_validator(mode="after")
    def _consistent(self) -> RetrievalAugmentedConfig:
        require_placeholders("prompt", self.shown_prompt, "passages", "question")
        require_placeholders("answer_format", self.answer_format, "reasoning", "answer")
        require_placeholders("reasoning_prompt", self.reasoning_prompt, "passages", "question", "answer")
        if self.order == "gold_at_depth" and self.gold_field is None:
            raise ValueError('order="gold_at_depth" needs gold_field: without it no passage is known to be gold')
        return self

    @property
    def shown_prompt(self) -> str:
        """The user's message, with placeholders."""
        return self.prompt or (_PROMPT if self.reasoning == "none" else _REASONED_PROMPT)


class PassageFinder:
    """Finds the passages of one chat after another."""

    def __init__(self, config: RetrievalAugmentedConfig, index: PassageIndex) -> None:
        self._config, self._index = config, index
        self.counts: Counter[str] = Counter(dict.fromkeys(_EXTRA, 0))

    def find(self, chat: Chat) -> Chat:
        """The chat with passages before its question; the bare answer stays in it. Raises DroppedError."""
        turn = single_turn(chat)
        if turn is None:
            raise DroppedError("several_turns")
        question, answer = turn
        gold = self._gold(chat)
        scores = self._index.scores(question)
        places = self._arrange(chat, gold, scores, [*gold, *self._others(chat, gold, scores, answer)])
        shown = "\n\n".join(
            f"Passage {number}:\n{self._index.texts[place].strip()}" for number, place in enumerate(places, 1)
        )
        metadata = {
            **chat.metadata,
            "passages": [self._index.doc_ids[place] for place in places],
            "gold": [number for number, place in enumerate(places) if place in set(gold)],
            "question": question,
            **({"shown": shown} if self._config.reasoning == "generated" else {}),
        }
        prompt = fill_in(self._config.shown_prompt, passages=shown, question=question)
        return Chat(chat.sample_id, chat.source, [user(prompt), assistant(self._target(chat, answer))], metadata)

    def _target(self, chat: Chat, answer: str) -> str:
        if self._config.reasoning != "given":
            return answer
        reasoning = chat.metadata.get(self._config.reasoning_field)
        if not isinstance(reasoning, str) or not reasoning.strip():
            raise DroppedError("no_reasoning")
        return fill_in(self._config.answer_format, reasoning=reasoning.strip(), answer=answer)

    def _gold(self, chat: Chat) -> list[int]:
        if self._config.gold_field is None:
            return []
        named = chat.metadata.get(self._config.gold_field)
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not names:
            raise DroppedError("no_gold")
        if any(name not in self._index.places for name in names):
            raise DroppedError("unknown_gold")
        if len(set(names)) >= self._config.num_passages:
            raise DroppedError("too_many_gold")
        return [self._index.places[name] for name in dict.fromkeys(names)]

    def _others(self, chat: Chat, gold: list[int], scores: Any, answer: str) -> list[int]:
        taken, wanted = set(gold), self._config.num_passages - len(gold)
        sought = answer.strip().casefold() if gold and self._config.enable_answer_exclusion else None
        excluded: set[int] = set()

        def accept(place: int) -> bool:
            if sought is not None and place not in taken and sought in self._index.texts[place].casefold():
                excluded.add(place)
            return place not in taken and place not in excluded

        found = self._index.best(scores, wanted, accept)
        taken.update(found)
        drawn = seeded_rng(self._config.seed, NAME, "fill", chat.sample_id)
        while len(found) < wanted and len(taken | excluded) < len(self._index.texts):
            place = int(drawn.integers(len(self._index.texts)))
            if accept(place):
                found.append(place)
                taken.add(place)
                self.counts["num_passages_random"] += 1
        self.counts["num_passages_excluded"] += len(excluded)
        return found

    def _arrange(self, chat: Chat, gold: list[int], scores: Any, places: list[int]) -> list[int]:
        ranked = self._index.rank(scores, places)
        if self._config.order == "retrieved":
            return ranked
        if self._config.order == "reordered":
            return alternate_inwards(ranked)
        if self._config.order == "shuffled":
            order = seeded_rng(self._config.seed, NAME, "order", chat.sample_id).permutation(len(ranked))
            return [ranked[place] for place in order.tolist()]
        others = [place for place in ranked if place not in set(gold)]
        return insert_at_depth(others, gold, self._config.gold_depth_fraction)


class ShardFinder:
    """Finds the passages of one Chats shard after another; the index is built once a worker."""

    def __init__(self, config: RetrievalAugmentedConfig, documents: Path) -> None:
        doc_ids, texts = [], []
        for batch in iterate_table(documents, "documents", ["doc_id", "text"]):
            doc_ids += batch.column("doc_id").to_pylist()
            texts += batch.column("text").to_pylist()
        self._config, self._index = config, PassageIndex.build(doc_ids, texts)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write the chats of a shard, given with its number, with their passages; returns the counts."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number, path = shard
        finder, counts, records = PassageFinder(self._config, self._index), Counter(), []
        for row in pq.read_table(path).to_pylist():
            counts["num_in"] += 1
            try:
                records.append(finder.find(chat_of(row)).record())
            except DroppedError as dropped:
                counts[f"num_dropped_{dropped.reason}"] += 1
        counts["num_found"] = len(records)
        write_shard(folder, "chats", number, pa.Table.from_pylist(records, schema=chats_schema()))
        return {**counts, **finder.counts}


def add_reasoning(config: RetrievalAugmentedConfig, chat: Chat, ask: Ask) -> dict[str, Any]:
    """The chat with a reasoning before its answer. Raises DroppedError and CallFailedError."""
    prompt, answer = (message["content"] for message in chat.messages)
    metadata = dict(chat.metadata)
    values = {"passages": metadata.pop("shown"), "question": metadata["question"], "answer": answer}
    reasoning = ask([user(fill_in(config.reasoning_prompt, **values))])
    target = fill_in(config.answer_format, reasoning=reasoning, answer=answer)
    return Chat(chat.sample_id, chat.source, [user(prompt), assistant(target)], metadata).record()


def _found_chats(shards: list[Shard]) -> Iterator[Chat]:
    for shard in shards:
        for batch in iterate_table(shard.folder, "chats"):
            yield from map(chat_of, batch.to_pylist())


def run(config: RetrievalAugmentedConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the chats with passages. Raises ValueError on bad input, or if nothing is left."""
    read_artifact(inputs["chats"], "chats")
    read_artifact(inputs["documents"], "documents")
    if config.reasoning != "generated" and (unused := sorted({"model", "calls"} & set(inputs))):
        raise ValueError(f'slot {unused[0]!r} is for reasoning="generated"')
    caller = open_caller(config.generation, inputs, context) if config.reasoning == "generated" else None
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(inputs["chats"], "chats"))}
    shards = list(map_shards(context, partial(ShardFinder, config, inputs["documents"]), paths))
    found: Counter[str] = Counter()
    for shard in shards:
        found.update(shard.counts)
    counts = {name: found[name] for name in ("num_in", *(f"num_dropped_{reason}" for reason in REASONS), *_EXTRA)}
    if not found["num_found"]:
        raise ValueError(f"no chat of {inputs['chats']} is left: {counts}")
    details = {}
    if caller is None:
        counts["num_kept"] = found["num_found"]
        for shard in shards:
            shard.link_into(output.data)
    else:
        writer = SampleWriter(
            output, "chats", chats_schema(), CALL_REASONS, found["num_found"], config.generation.max_failed_fraction
        )
        totals = generate(writer, _found_chats(shards), partial(add_reasoning, config), caller, context)
        counts.update({name: value for name, value in totals.items() if name != "num_in"})
        details = {"model": caller.model}
    _check_sum(counts)
    write_artifact(output.data, Artifact(kind="chats", counts=counts, details=details))
    context.log(counts)


def _check_sum(counts: Mapping[str, int]) -> None:
    dropped = sum(value for name, value in counts.items() if name.startswith("num_dropped_"))
    if counts["num_in"] != counts["num_kept"] + dropped:
        raise RuntimeError(f"retrieval_augmented lost count: {json.dumps(dict(counts))}")
