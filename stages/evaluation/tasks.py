"""Retrieval samples: facts planted in held-out text, one of them asked for at the end. Token ids in, token ids out.

A prompt is `[bos] text with facts planted in it, question`, and prompt plus answer are exactly `length_tokens` long:
nothing is truncated later, and no sample is easier than its label says. `passkey` plants one fact (Mohtashami and Jaggi
2023, arXiv 2305.16300), a multi-key task several of which one is asked (RULER's NIAH multi-key, Hsieh et al. 2024,
arXiv 2404.06654). Unlike the needle-in-a-haystack script that made such tests popular, every sample has its own text,
facts and places, and depths are stratified, so that each cell of a depth-by-length map is a proportion with its
interval.

Every sample is drawn from its own generator, keyed by seed, task, length, depth and index: it does not depend on
how many samples are asked for, nor on who builds it. Keys come from the pool that training never sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from ropewalk.stages.episodes import EpisodeWriter
from ropewalk.stages.schema import Record, seeded_rng

if TYPE_CHECKING:
    import numpy as np


class Task(Record):
    """A retrieval task."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Names the task in tables and metrics."""
    num_facts: int = Field(default=1, ge=1)
    """Facts planted in each prompt; one of them is asked for, the others are distractors."""


@dataclass(frozen=True)
class Sample:
    """One prompt and its answer."""

    sample_id: str
    task: str
    length_tokens: int
    depth: float
    """The depth that was asked for, in 0..1 from the first token of the text to its last."""
    depth_fraction: float
    """The realised depth: tokens before the asked fact over all places it could begin at."""
    prompt_ids: list[int]
    answer_ids: list[int]
    fact_start: int
    """Where the asked fact begins in the prompt, in tokens."""
    fact_tokens: int
    num_documents: int
    """Held-out documents that the text was taken from."""

    @property
    def prompt_sha256(self) -> str:
        """sha256 hex of the prompt's ids as little-endian int32."""
        return hashlib.sha256(b"".join(index.to_bytes(4, "little") for index in self.prompt_ids)).hexdigest()


@dataclass(frozen=True)
class Haystack:
    """Held-out documents that text is cut from."""

    documents: Sequence[np.ndarray]
    """Token ids of each document, without begin or end marks."""
    separator: int
    """Id between documents where a text runs over several."""

    def text(self, rng: np.random.Generator, num_tokens: int) -> tuple[list[int], int]:
        """Exactly `num_tokens` ids and the number of documents they come from.

        A random window of one random document that is long enough; only where none is, whole documents in random
        order, the last one cut. No document is used twice. All of them together must be long enough (see `require`).
        """
        long_enough = [document for document in self.documents if len(document) >= num_tokens]
        if long_enough:
            document = long_enough[int(rng.integers(len(long_enough)))]
            start = int(rng.integers(len(document) - num_tokens + 1))
            return document[start : start + num_tokens].tolist(), 1
        joined: list[int] = []
        for used, index in enumerate(rng.permutation(len(self.documents)), start=1):
            joined += self.documents[index].tolist()
            if len(joined) >= num_tokens:
                return joined[:num_tokens], used
            joined.append(self.separator)
        raise AssertionError("a text was asked for that `require` should have refused")

    def require(self, num_tokens: int) -> None:
        """Raise ValueError if all documents together are shorter than `num_tokens`."""
        held = sum(map(len, self.documents))
        if held < num_tokens:
            raise ValueError(
                f"heldout has {held} tokens in all and lengths_tokens asks for texts of {num_tokens}: "
                "hold out more documents or drop the longest length"
            )


def text_tokens(task: Task, length_tokens: int, writer: EpisodeWriter) -> int:
    """Tokens of held-out text in a sample. Raises ValueError if the length has no room for the facts and the question.

    `length_tokens` = begin mark + text + facts + question + answer.
    """
    fixed = 1 + task.num_facts * writer.fact_tokens + writer.question_tokens + writer.value_tokens
    if length_tokens <= fixed:
        raise ValueError(
            f"lengths_tokens holds {length_tokens}, too short for task {task.name!r}: "
            f"its facts, question and answer alone take {fixed} tokens"
        )
    return length_tokens - fixed


def check_pools(task: Task, writer: EpisodeWriter) -> None:
    """Raise ValueError if the tokenizer has too few ordinary words for the task's keys or values."""
    for what, needed, pool in (
        ("keys", task.num_facts * writer.key_tokens, writer.keys["evaluation"]),
        ("values", task.num_facts * writer.value_tokens, writer.values),
    ):
        if needed > len(pool):
            raise ValueError(
                f"tasks: {task.name!r} needs {needed} distinct tokens for its {what} and the tokenizer offers "
                f"{len(pool)}: lower num_facts"
            )


def build_sample(
    task: Task,
    length_tokens: int,
    depth: float,
    index: int,
    *,
    seed: int,
    writer: EpisodeWriter,
    haystack: Haystack,
    bos_token_id: int,
) -> Sample:
    """Build one sample. Raises ValueError if the length does not fit the task."""
    rng = seeded_rng(seed, "retrieval-sample", task.name, length_tokens, repr(float(depth)), index)
    num_text = text_tokens(task, length_tokens, writer)
    text, num_documents = haystack.text(rng, num_text)
    pairs = writer.draw(rng, task.num_facts, "evaluation")
    facts = [writer.fact(key, value) for key, value in pairs]

    # The asked fact begins exactly where its depth says; the distractors share out the room on its two sides.
    places = num_text + (task.num_facts - 1) * writer.fact_tokens
    start = round(depth * places)
    num_before = _distractors_before(rng, task.num_facts - 1, start, places - start, writer.fact_tokens)
    cut = start - num_before * writer.fact_tokens
    before = _plant(rng, text[:cut], facts[1 : 1 + num_before])
    after = _plant(rng, text[cut:], facts[1 + num_before :])

    key, answer = pairs[0]
    prompt = [bos_token_id, *before, *facts[0], *after, *writer.question(key)]
    if len(prompt) + len(answer) != length_tokens:
        raise AssertionError(f"a prompt of {len(prompt)} tokens was built for length {length_tokens}")
    return Sample(
        sample_id=f"{task.name}-{length_tokens}-{depth:g}-{index}",
        task=task.name,
        length_tokens=length_tokens,
        depth=depth,
        depth_fraction=start / places,
        prompt_ids=prompt,
        answer_ids=answer,
        fact_start=1 + start,
        fact_tokens=writer.fact_tokens,
        num_documents=num_documents,
    )


def _distractors_before(rng: np.random.Generator, num: int, before: int, after: int, fact_tokens: int) -> int:
    # A distractor falls before the asked fact in proportion to the room there, as far as whole facts fit.
    drawn = int(rng.binomial(num, before / (before + after)))
    return min(max(drawn, num - after // fact_tokens), before // fact_tokens, num)


def _plant(rng: np.random.Generator, text: list[int], facts: list[list[int]]) -> list[int]:
    places = sorted(rng.integers(len(text) + 1, size=len(facts)).tolist())
    planted: list[int] = []
    last = 0
    for place, fact in zip(places, facts, strict=True):
        planted += text[last:place] + fact
        last = place
    return planted + text[last:]
