"""Lays long and short chats one after the other into long conversations, so that short skills are kept.

Reads `long` and `short` (Chats) and `tokenizer`. Writes Chats: the turns of the chats drawn, in order. Each
conversation begins with a short chat; then each next one is long with probability `long_fraction`, otherwise short,
until one does not fit `max_tokens`; that one begins nothing and is put back. Each chat is used once; when the pile
that was drawn from is empty the conversation ends, and without a short chat none begins.

Method: the p-Mix of LongMagpie (Gao et al., 2025, arXiv 2505.17134), probability 0.4. Restated from memory: no code of
it was readable here, and whether its samples see each other is not known. Here they are turns of one conversation and
do; to keep them apart, mix the two Chats by rows instead.

Lost, counted by pile: chats with a system message, which may stand only first (`has_system`), longer than `max_tokens`
alone (`too_long`), and those left over (`unused`). Memory: ids and lengths; texts lie in a scratch file that is
mapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.conversations import Chat, check_chats, iterate_chats, write_chats
from ropewalk.stages.data.alignment.scratch import ChatPile, write_pile
from ropewalk.stages.data.alignment.token_counts import TokenCounter
from ropewalk.stages.schema import Artifact, Record, read_artifact, seeded_rng, stable_id, write_artifact

NAME = "p_mix"
VERSION = 1
check = check_chats

PILES = ("long", "short")


class PMixConfig(Record):
    """How chats are drawn."""

    long_fraction: float = Field(default=0.4, ge=0, le=1)
    """Probability that the next chat is a long one."""
    max_tokens: int = Field(ge=1)
    """Greatest length of a conversation: tokens of its messages, those of the template not counted."""
    seed: int = 0
    """Orders the piles and draws from them."""


def draw_conversations(config: PMixConfig, lengths: Mapping[str, list[int]]) -> Iterator[list[tuple[str, int]]]:
    """Chats of each conversation, as pile and place. `lengths` has the tokens of the chats of `long` and `short`."""
    rng = seeded_rng(config.seed, NAME)
    left = {pile: rng.permutation(len(lengths[pile])).tolist()[::-1] for pile in PILES}
    while left["short"]:
        drawn, filled, pile = [], 0, "short"
        while left[pile] and filled + lengths[pile][left[pile][-1]] <= config.max_tokens:
            place = left[pile].pop()
            drawn.append((pile, place))
            filled += lengths[pile][place]
            pile = "long" if rng.random() < config.long_fraction else "short"
        yield drawn


def _usable(config: PMixConfig, folder: Path, counter: TokenCounter, counts: Counter[str], pile: str) -> Iterator[Any]:
    for chat in iterate_chats(folder):
        counts[f"num_{pile}_in"] += 1
        length = counter(*(message["content"] for message in chat.messages))
        if any(message["role"] == "system" for message in chat.messages):
            counts[f"num_{pile}_dropped_has_system"] += 1
        elif length > config.max_tokens:
            counts[f"num_{pile}_dropped_too_long"] += 1
        else:
            yield chat, length


def _join(config: PMixConfig, number: int, chats: list[tuple[str, Chat]]) -> dict[str, Any]:
    messages = [message for _, chat in chats for message in chat.messages]
    parts = [{"pile": pile, "sample_id": chat.sample_id, "num_messages": len(chat.messages)} for pile, chat in chats]
    name = f"{NAME}/{stable_id(NAME, config.seed, number, *(chat.sample_id for _, chat in chats))}"
    return Chat(name, NAME, messages, {"parts": parts}).record()


def run(config: PMixConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the conversations. Raises ValueError on bad input, or if nothing is left."""
    counter, counts = TokenCounter(inputs["tokenizer"]), Counter()
    piles: dict[str, ChatPile] = {}
    for pile in PILES:
        read_artifact(inputs[pile], "chats")
        usable = _usable(config, inputs[pile], counter, counts, pile)
        piles[pile] = write_pile(context.work, pile, usable)
    lengths = {pile: piles[pile].lengths for pile in PILES}

    def records() -> Iterator[dict[str, Any]]:
        for number, drawn in enumerate(draw_conversations(config, lengths)):
            counts.update(f"num_{pile}_used" for pile, _ in drawn)
            yield _join(config, number, [(pile, piles[pile][place]) for pile, place in drawn])
            context.progress(counts["num_short_used"], len(lengths["short"]), "short chats")

    num_kept = write_chats(output.data, records())
    totals = _totals(counts, num_kept)
    if not num_kept:
        raise ValueError(f"slot short holds no chat to begin a conversation with: {totals}")
    write_artifact(output.data, Artifact(kind="chats", counts=totals))
    context.log(totals)


def _totals(counts: Counter[str], num_kept: int) -> dict[str, int]:
    totals = {"num_kept": num_kept}
    for pile in PILES:
        dropped = sum(counts[f"num_{pile}_dropped_{reason}"] for reason in ("has_system", "too_long"))
        counts[f"num_{pile}_unused"] = counts[f"num_{pile}_in"] - dropped - counts[f"num_{pile}_used"]
        for name in ("in", "used", "unused", "dropped_has_system", "dropped_too_long"):
            totals[f"num_{pile}_{name}"] = counts[f"num_{pile}_{name}"]
    return totals
