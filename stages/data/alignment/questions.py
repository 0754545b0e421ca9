"""Questions that a model writes about a text, and the pieces of long documents that it writes them about."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from ropewalk.stages.data.alignment.conversations import fill_in, require_placeholders, user
from ropewalk.stages.data.alignment.generation import Ask, DroppedError
from ropewalk.stages.schema import Record, seeded_rng

_QUESTION = re.compile(r"^[\s*#]*(\d+)[*\s]*[:.)][*\s]*(\S.*)$")
_BREAKS = ("\n\n", "\n", ". ", " ")
_PROMPT = """\
{text}

--- End of the text ---

Write {num_questions} questions about the text above, each of which a careful reader can answer from it alone. Let \
each connect several places of the text or ask what follows from them, rather than ask for one name or number; let \
no two ask for the same; and word each so that only one answer is right.

Give nothing but the questions, one a line, numbered "1:" to "{num_questions}:"."""


class QuestionConfig(Record):
    """How questions are asked for."""

    num_questions: int = Field(default=4, ge=1)
    """The model writes so many, as in LongPO, and a seeded draw takes one: the first is often the dullest."""
    chunk_characters: int = Field(default=24_000, ge=100)
    """Greatest length of a piece of a document, in characters; it ends at a paragraph, line or word where it can."""
    prompt: str = _PROMPT
    """With {text}; {num_questions} may occur. The answer must be one numbered question a line."""

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str) -> str:
        return require_placeholders("questions.prompt", prompt, "text")


def cut_chunks(text: str, chunk_characters: int) -> list[tuple[int, int]]:
    """Begin and end of the pieces of a text, in characters; together they are the text."""
    chunks, begin = [], 0
    while len(text) - begin > chunk_characters:
        end = _good_end(text, begin, begin + chunk_characters)
        chunks.append((begin, end))
        begin = end
    return [*chunks, (begin, len(text))] if begin < len(text) else chunks


def _good_end(text: str, begin: int, limit: int) -> int:
    """The last paragraph, line, sentence or word end in the second half of a piece, otherwise `limit`."""
    for mark in _BREAKS:
        found = text.rfind(mark, begin + (limit - begin) // 2, limit)
        if found >= 0:
            return found + len(mark)
    return limit


def parse_questions(text: str, num_questions: int) -> list[str] | None:
    """The questions of a numbered list; None unless there are exactly so many, counted from 1."""
    found = [match for line in text.splitlines() if line.strip() for match in [_QUESTION.match(line)]]
    if len(found) != num_questions or not all(found):
        return None
    questions = [match[2].strip(" *") for number, match in enumerate(found, 1) if match and int(match[1]) == number]
    return questions if len(questions) == num_questions else None


def ask_question(config: QuestionConfig, text: str, ask: Ask, *key: str | int) -> str:
    """One question about a text, drawn by `key`. Raises DroppedError and CallFailedError."""
    prompt = fill_in(config.prompt, text=text.strip(), num_questions=str(config.num_questions))
    questions = parse_questions(ask([user(prompt)]), config.num_questions)
    if questions is None:
        raise DroppedError("unparsable_questions")
    return questions[int(seeded_rng("question", *key).integers(len(questions)))]
