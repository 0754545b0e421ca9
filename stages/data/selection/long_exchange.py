"""Reads one chat as a long context, an instruction about it and a response, and lays it out as tokens.

The template is GATEAU's (S1s-Z/GATEAU:select/hmg/compute_hmg_64k.py), character by character:

    ### Input:<context>

     ### Instruction: <instruction>

     ### Response: <response>

with a blank in front of the second and third heading. The instruction is the last block of the user turn, blocks being
parted by blank lines, and blanks at its end ignored; the context is all before it, the blank line included, so that two
blank lines stand between them. The text is tokenised once, and its parts are found by the characters that each token
stands for: the published `split("### Response: ")` goes wrong where a context holds that heading, and tokenising a part
alone counts other tokens than the whole has. A token that lies across the beginning of a part belongs to the part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ropewalk.stages.data.selection.language_model import TextEncoder

INPUT, INSTRUCTION, RESPONSE = "### Input:", "\n\n ### Instruction: ", "\n\n ### Response: "
_BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n")


class UnusableError(Exception):
    """A sample that cannot be scored; the message is the reason that is counted."""


@dataclass(frozen=True)
class LongExchange:
    """A user turn in two parts, and the answer to it."""

    context: str
    instruction: str
    response: str

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> LongExchange:
        """Read a chat of one user turn and one assistant turn; system turns are left out.

        Raises UnusableError with the reason "not_one_exchange", "no_context" or "no_response".
        """
        turns = [turn for turn in messages if turn["role"] != "system"]
        if [turn["role"] for turn in turns] != ["user", "assistant"]:
            raise UnusableError("not_one_exchange")
        question, response = (turns[0]["content"] or "").rstrip(), turns[1]["content"] or ""
        breaks = list(_BLANK_LINE.finditer(question))
        if not breaks or not question[: breaks[-1].start()].strip():
            raise UnusableError("no_context")
        if not response.strip():
            raise UnusableError("no_response")
        return cls(question[: breaks[-1].end()], question[breaks[-1].end() :], response)


@dataclass(frozen=True)
class ExchangeTokens:
    """The tokens of the template, part by part, in order; the begin token is not among them."""

    context: list[int]
    """With the heading of the input, which is part of the first segment."""
    instruction_heading: list[int]
    instruction: list[int]
    response_heading: list[int]
    response: list[int]

    @property
    def question(self) -> list[int]:
        """What stands between context and response."""
        return [*self.instruction_heading, *self.instruction, *self.response_heading]

    def __len__(self) -> int:
        """Tokens of all parts."""
        return len(self.context) + len(self.question) + len(self.response)


def lay_out(exchange: LongExchange, encoder: TextEncoder) -> ExchangeTokens:
    """The tokens of an exchange in the template. Raises UnusableError("no_response") if the response has none."""
    pieces = [INPUT + exchange.context, INSTRUCTION, exchange.instruction, RESPONSE, exchange.response]
    encoded = encoder.encode("".join(pieces))
    borders, place = [0], 0
    for piece in pieces[:-1]:
        place += len(piece)
        borders.append(encoded.first_token_beyond(place))
    borders.append(len(encoded.ids))
    parts = [encoded.ids[first:end] for first, end in pairwise(borders)]
    if not parts[-1]:
        raise UnusableError("no_response")
    return ExchangeTokens(*parts)
