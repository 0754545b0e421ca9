"""Retrieval episodes: facts planted in real text and asked for at its end. Shared by synthesis and evaluation.

An episode is `[bos] text with facts planted in it, questions`. A fact is a template with a key and a value; a question
repeats the key, and the value is the answer. Keys and values are drawn from the tokenizer's ordinary tokens, split by
a seeded permutation into three disjoint pools: keys for training, keys for evaluation, values. So no evaluation key is
ever seen in training, whatever the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ropewalk.stages.schema import Record, TokenizerInfo, seeded_rng

if TYPE_CHECKING:
    import numpy as np

KEY_MARKER, ASK_MARKER = "<|key|>", "<|ask|>"
MARKERS = (KEY_MARKER, ASK_MARKER)
Split = Literal["train", "evaluation"]


class EpisodeFormat(Record):
    """How a fact and its question are written."""

    fact: str = KEY_MARKER + "{key}{value}"
    """Text with `{key}` and `{value}` in this order. The default is for small models; for a large one, with
    `draw_from` "words": "\\nThe pass key for{key} is{value}.\\n"."""
    question: str = ASK_MARKER + "{key}"
    """Text with `{key}`; the model continues it with the value."""
    key_tokens: int = Field(default=1, ge=1)
    value_tokens: int = Field(default=1, ge=1)
    draw_from: Literal["pieces", "words"] = "pieces"
    """pieces: keys and values are drawn from all alphanumeric tokens. words: only from those that begin with a space,
    as running text has them; a vocabulary of a few hundred may hold too few."""

    @model_validator(mode="after")
    def _placeholders(self) -> EpisodeFormat:
        if self.fact.count("{key}") != 1 or self.fact.count("{value}") != 1:
            raise ValueError("fact needs {key} and {value}, once each")
        if self.fact.index("{key}") > self.fact.index("{value}"):
            raise ValueError("fact needs {key} before {value}: a key after its value cannot be looked up left to right")
        if self.question.count("{key}") != 1 or "{value}" in self.question:
            raise ValueError("question needs {key} once and no {value}")
        return self


@dataclass(frozen=True)
class EpisodeWriter:
    """An `EpisodeFormat` in token ids, for one tokenizer. Build it with `episode_writer`."""

    fact_pieces: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    question_pieces: tuple[tuple[int, ...], tuple[int, ...]]
    key_tokens: int
    value_tokens: int
    keys: dict[Split, tuple[int, ...]]
    values: tuple[int, ...]

    @property
    def fact_tokens(self) -> int:
        """Tokens of one planted fact."""
        return sum(map(len, self.fact_pieces)) + self.key_tokens + self.value_tokens

    @property
    def question_tokens(self) -> int:
        """Tokens of one question, the answer excluded."""
        return sum(map(len, self.question_pieces)) + self.key_tokens

    def draw(self, rng: np.random.Generator, num_facts: int, split: Split) -> list[tuple[list[int], list[int]]]:
        """`num_facts` pairs of key and value ids; no token occurs twice among the keys, nor among the values.

        Raises ValueError if a pool holds fewer tokens than that takes.
        """
        keys = _distinct(rng, self.keys[split], num_facts, self.key_tokens)
        values = _distinct(rng, self.values, num_facts, self.value_tokens)
        return list(zip(keys, values, strict=True))

    def fact(self, key: Sequence[int], value: Sequence[int]) -> list[int]:
        """The ids of a planted fact."""
        before, between, after = self.fact_pieces
        return [*before, *key, *between, *value, *after]

    def question(self, key: Sequence[int]) -> list[int]:
        """The ids of a question, up to where the answer begins."""
        before, after = self.question_pieces
        return [*before, *key, *after]


def episode_writer(style: EpisodeFormat, tokenizer: Any, info: TokenizerInfo) -> EpisodeWriter:
    """Put a format into ids. `tokenizer` is a transformers fast tokenizer.

    Raises ValueError if the format uses a marker that the tokenizer lacks or the pools are too small.
    """

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()

    for marker in (KEY_MARKER, ASK_MARKER):
        if marker in style.fact + style.question:
            info.marker(marker, "an episode")
    head, rest = style.fact.split("{key}")
    between, tail = rest.split("{value}")
    ask, end = style.question.split("{key}")
    keys, values = _pools(tokenizer, info, style.draw_from)
    return EpisodeWriter(
        (ids(head), ids(between), ids(tail)), (ids(ask), ids(end)), style.key_tokens, style.value_tokens, keys, values
    )


def _distinct(rng: np.random.Generator, pool: Sequence[int], num_items: int, item_tokens: int) -> list[list[int]]:
    if num_items * item_tokens > len(pool):
        raise ValueError(
            f"{num_items} facts of {item_tokens} tokens need as many different tokens, but only {len(pool)} of the "
            "tokenizer are set aside for them: plant fewer facts, make them shorter, or take a larger vocabulary"
        )
    # Indices first: numpy would turn the whole pool into an array at every call.
    chosen = rng.choice(len(pool), size=(num_items, item_tokens), replace=False)
    return [[pool[index] for index in item] for item in chosen.tolist()]


def _pools(
    tokenizer: Any, info: TokenizerInfo, draw_from: Literal["pieces", "words"]
) -> tuple[dict[Split, tuple[int, ...]], tuple[int, ...]]:
    special = set(tokenizer.all_special_ids) | set(info.added_tokens.values())
    texts = {index: tokenizer.decode([index]) for index in range(info.vocab_size) if index not in special}
    # Whole printable words and word pieces only: bytes of broken characters would not survive decoding.
    ordinary = [index for index, text in texts.items() if len(text) > 1 and text.strip().isalnum()]
    order = seeded_rng("episode-pools", 0).permutation(ordinary).tolist()
    half, two_thirds = len(order) // 2, len(order) * 2 // 3
    # Half for training keys: the more keys are learned from, the better unseen ones are looked up. Words are taken
    # out of each part, so that a token is in the same pool whatever a format draws from.
    parts = [
        tuple(index for index in part if draw_from == "pieces" or texts[index][0] == " ")
        for part in (order[:half], order[half:two_thirds], order[two_thirds:])
    ]
    if min(map(len, parts)) < 16:
        raise ValueError(
            f"the tokenizer leaves {', '.join(str(len(part)) for part in parts)} {draw_from} for training keys, "
            "evaluation keys and values; retrieval episodes need 16 of each: take a larger vocabulary"
        )
    return {"train": parts[0], "evaluation": parts[1]}, parts[2]
