"""A chat as the tokens of a probe model, which knows of every token whose words it stands for.

The template is rendered once with a mark in place of every message; what lies between the marks is the template's own
text, in which special tokens are special; what the messages say is encoded by itself and stays text, whatever it
spells. So words and template cannot be mistaken for each other, and no message can end a turn. Tokens that would reach
across the border of a message are therefore two here, and a template that trims a message does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropewalk.stages.data.selection.language_model import TextEncoder
from ropewalk.stages.data.vocabulary import load_tokenizer

_MARK = re.compile("\ufdd0([0-9]+)\ufdd1")  # Between noncharacters, which no template contains.


class TemplateRefusedError(Exception):
    """The template raises an error for the chat, or leaves out or repeats a message."""


@dataclass(frozen=True)
class TurnTokens:
    """A chat as tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]
    """Tokens `[first, end)` of each message."""
    blank: list[bool]
    """Tokens that stand for line breaks alone."""


class TurnEncoder:
    """The tokenizer and chat template of a model folder."""

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        """Take the tokenizer's template unless one is given. Raises ValueError if there is none."""
        self._tokenizer, self._text = load_tokenizer(folder), TextEncoder(folder)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {folder} has no chat template: give one in chat_template")

    def encode(self, messages: Sequence[Mapping[str, str]]) -> TurnTokens:
        """The tokens of a chat. Raises TemplateRefusedError."""
        ids: list[int] = []
        blank: list[bool] = []
        spans: list[tuple[int, int]] = []
        for piece, number in self._pieces([message["role"] for message in messages]):
            own = self._tokenizer(piece, add_special_tokens=False).input_ids if piece else []
            ids += own
            blank += [False] * len(own)
            if number is not None:
                found = self._text.encode(messages[number]["content"])
                spans.append((len(ids), len(ids) + len(found.ids)))
                ids += found.ids
                blank += [not messages[number]["content"][begin:end].strip("\r\n") for begin, end in found.offsets]
        return TurnTokens(ids, spans, blank)

    def _pieces(self, roles: Sequence[str]) -> list[tuple[str, int | None]]:
        """The template's texts, each with the number of the message behind it; the last has none."""
        import jinja2

        marked = [{"role": role, "content": f"\ufdd0{number}\ufdd1"} for number, role in enumerate(roles)]
        try:
            text: Any = self._tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=False)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja template: {error}") from None
        except jinja2.TemplateError as error:
            raise TemplateRefusedError(str(error)) from None
        # Splitting at a pattern with a group gives texts and numbers by turns.
        parts = _MARK.split(text)
        numbers = [int(number) for number in parts[1::2]]
        if numbers != list(range(len(roles))):
            raise TemplateRefusedError(f"of {len(roles)} messages it writes {numbers}")
        return list(zip(parts[::2], [*numbers, None], strict=True))
