"""Conversations as token ids: the tokenizer's chat template, which tokens are targets, and texts that stay texts.

Control tokens. Where a template is rendered to one string and that string is encoded, as stock transformers does
unless told otherwise, a user who types `<|im_end|>` ends the turn. Here a message cannot do that: before rendering,
each spelling of a control token inside a message is broken up by a noncharacter (U+FDD2); after rendering, what is
still whole was written by the template. The template's own ones are then given private spellings, the breaks are taken
out, and the string is encoded by the same tokenizer with its control tokens renamed to those private spellings. So
text is encoded as text, in its context (merges and prefix spaces are those of the whole string), and for chats without
such spellings the ids are those of stock transformers. Control tokens are the special tokens; outside the assistant's
messages also the other added tokens that the template mentions (an assistant's `<think>` is its own).

Targets, exact to the character: where the template marks them (`{% generation %}`) what it marks; otherwise each
assistant message is what is added between the conversation before it, with the generation prompt, and the conversation
through it. That each of the three is a prefix of the next is checked. The white space behind the control token that
ends a turn is no target: generation has stopped. A token is a target if it holds a character that is one.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ropewalk.stages.data.alignment.conversations import Message

Targets = Literal["assistant_turns", "last_turn", "everything"]
Spans = list[tuple[int, int]]
"""Character ranges, begin inclusive, end exclusive, in order."""

_OPEN, _CLOSE, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"  # Noncharacters: never part of text that is exchanged.
_RESERVED = re.compile(f"[{_OPEN}{_CLOSE}{_BREAK}]")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRefusedError(Exception):
    """A chat that cannot be encoded, with the reason to count."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids."""

    input_ids: list[int]
    loss_mask: list[bool]
    """`[t]`: token t is a target."""
    num_spelled: int
    """Control tokens that messages spelled, which stayed text."""
    num_straddling: int
    """Tokens that hold characters of a target and of something else."""


class ChatEncoder:
    """Renders and encodes chats with a transformers fast tokenizer."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """Take the tokenizer's template unless one is given.

        Raises ValueError if there is none, or the tokenizer's control tokens cannot be renamed.
        """
        template = chat_template if chat_template is not None else tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ValueError("the tokenizer has no chat template: give one in chat_template")
        if _RESERVED.search(template):
            raise ValueError("chat_template holds a noncharacter from U+FDD0 to U+FDD2, which is used internally")
        self._tokenizer, self._template = tokenizer, template
        self._marks_targets = bool(_GENERATION.search(template))
        added = tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]
        self._control = [token.content for token in added if token.special or token.content in template]
        if not self._control:
            raise ValueError("the tokenizer has no special token: a turn could not be ended")
        self._ids = {text: tokenizer.convert_tokens_to_ids(text) for text in self._control}
        self._found = _pattern([*self._control, _BREAK])
        self._guards = {True: _Guard(self._special), False: _Guard(self._control)}
        self._encoder = _renamed(tokenizer.backend_tokenizer.to_str(), self._ids)
        self._compare_with_stock()

    def __call__(self, messages: Sequence[Message], targets: Targets) -> EncodedChat:
        """Encode a conversation that ends with the assistant.

        Raises ChatRefusedError if the template refuses it or a message holds a noncharacter that is used internally,
        and ValueError if its targets cannot be told.
        """
        guarded, num_spelled = self._guard(messages)
        text = self._render(guarded)
        spans = [(0, len(text))] if targets == "everything" else self._spans(guarded, text, targets)
        return self._encode(text, spans, num_spelled)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that a model answers: the conversation with the generation prompt. Raises ChatRefusedError."""
        guarded, num_spelled = self._guard(messages)
        return self._encode(self._render(guarded, generation=True), [], num_spelled).input_ids

    def _guard(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        guarded, total = [], 0
        for message in messages:
            if _RESERVED.search(message["content"]):
                raise ChatRefusedError("reserved_characters", "a message holds a noncharacter from U+FDD0 to U+FDD2")
            content, count = self._guards[message["role"] == "assistant"](message["content"])
            guarded.append({"role": message["role"], "content": content})
            total += count
        return guarded, total

    def _render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=generation
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja template: {error}") from None
        except jinja2.TemplateError as error:
            raise ChatRefusedError("template_refused", f"the chat template refuses it: {error}") from None

    def _spans(self, messages: Sequence[Message], text: str, targets: Targets) -> Spans:
        if self._marks_targets:
            spans = self._marked(messages, text)
            return spans[-1:] if targets == "last_turn" else spans
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return [self._answer(messages, text, place) for place in answers[-1 if targets == "last_turn" else 0 :]]

    def _marked(self, messages: Sequence[Message], text: str) -> Spans:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, indices = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if rendered[0] != text:
            raise ValueError("the chat template renders a chat in two ways: its generation marks cannot be used")
        return [(int(begin), int(end)) for begin, end in indices[0]]

    def _answer(self, messages: Sequence[Message], text: str, place: int) -> tuple[int, int]:
        before = self._render(messages[:place], generation=True)
        through = self._render(messages[: place + 1])
        if not through.startswith(before) or not text.startswith(through):
            raise ValueError(
                f"the chat template renders the first {place + 1} messages in another way once more follow, so the "
                'targets cannot be told: use targets="last_turn", or a chat_template that marks {% generation %}'
            )
        controls = [found for found in self._found.finditer(through, len(before)) if found[0] != _BREAK]
        end = len(through)
        if controls and not through[controls[-1].end() :].strip():
            end = controls[-1].end()
        return len(before), end

    def _encode(self, text: str, spans: Spans, num_spelled: int) -> EncodedChat:
        plain, place_of = self._respell(text)
        encoding = self._encoder.encode(plain, add_special_tokens=False)
        ends = [(place_of(begin), place_of(end)) for begin, end in spans]
        mask, num_straddling = _mask(encoding.offsets, ends)
        return EncodedChat(encoding.ids, mask, num_spelled, num_straddling)

    def _respell(self, text: str) -> tuple[str, Any]:
        """The text with private control tokens and without breaks, and where its characters have gone."""
        pieces, begins, moved = [], [0], [0]
        last = length = 0
        for found in self._found.finditer(text):
            spelling = "" if found[0] == _BREAK else _private(self._ids[found[0]])
            pieces += [text[last : found.start()], spelling]
            length += found.start() - last + len(spelling)
            last = found.end()
            begins.append(last)
            moved.append(length)
        pieces.append(text[last:])

        def place_of(place: int) -> int:
            index = bisect_right(begins, place) - 1
            return moved[index] + place - begins[index]

        return "".join(pieces), place_of

    def _compare_with_stock(self) -> None:
        text = " ".join(f"{token} one, Two\n" for token in self._control)
        plain, _ = self._respell(text)
        stock = self._tokenizer(text, add_special_tokens=False).input_ids
        if self._encoder.encode(plain, add_special_tokens=False).ids != stock:
            raise ValueError("the tokenizer encodes text in another way when its control tokens are renamed")


class _Guard:
    """Breaks up every spelling of some tokens in a text."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._found = _pattern(tokens) if tokens else re.compile(r"(?!)")
        self._heads = {token[:cut] for token in tokens for cut in range(1, len(token))}
        self._tails = {token[cut:] for token in tokens for cut in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def __call__(self, text: str) -> tuple[str, int]:
        """The text without whole spellings, and how many there were."""
        # A break behind the last character, too: of tokens that overlap, neither is left whole.
        text, total = self._found.subn(lambda found: _BREAK.join([*found[0], ""]), text)
        return self._guard_ends(text), total

    def _guard_ends(self, text: str) -> str:
        """Break what the template's own text could complete to a token; templates may trim a message."""
        end = len(text.rstrip())
        if any(text[max(0, end - size) : end] in self._heads for size in range(1, self._longest)):
            text = text[:end] + _BREAK + text[end:]
        begin = len(text) - len(text.lstrip())
        if any(text[begin : begin + size] in self._tails for size in range(1, self._longest)):
            text = text[:begin] + _BREAK + text[begin:]
        return text


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    # The longest of those that begin at a place, as tokenizers match added tokens.
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _private(token_id: int) -> str:
    return f"{_OPEN}{token_id}{_CLOSE}"


def _renamed(tokenizer_json: str, ids: dict[str, int]) -> Any:
    """A `tokenizers.Tokenizer` whose tokens `ids` have private spellings; offsets count the white space of a token."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer_json)
    names = {text: _private(token_id) for text, token_id in ids.items()}
    for token in content["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False, single_word=False)
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    # A post-processor may cut white space off the offsets; it adds nothing here.
    content.update(post_processor=None, truncation=None, padding=None)
    encoder: Any = Tokenizer.from_str(json.dumps(content))
    for text, token_id in ids.items():
        if encoder.token_to_id(names[text]) != token_id:
            raise ValueError(f"the tokenizer's token {text!r} cannot be renamed: its id would change")
    return encoder


def _mask(offsets: Sequence[tuple[int, int]], spans: Spans) -> tuple[list[bool], int]:
    """Which tokens overlap a span, and how many of these also hold other characters. Both are in order."""
    mask, num_straddling, current = [], 0, 0
    for begin, end in offsets:
        while current < len(spans) and spans[current][1] <= begin:
            current += 1
        inside = current < len(spans) and spans[current][0] < max(end, begin + 1)
        mask.append(inside)
        num_straddling += inside and (begin < spans[current][0] or end > spans[current][1])
    return mask, num_straddling
