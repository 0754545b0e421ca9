"""Long answers by AgentWrite: a model plans paragraphs, then writes one after the other.

Reads `chats` (their one user message is the instruction; an answer that may be there is replaced), and the optional
slots of `ropewalk.stages.data.alignment.calls`: `model` and `calls`. Writes Chats whose answer is all paragraphs,
with the plan in `metadata`, and `calls-*.parquet`.

Method: LongWriter (Bai et al., 2024, arXiv 2408.07055; THUDM/LongWriter: agentwrite). The plan has one line a
paragraph with its main point and how many words, 200 to 1000; then paragraph i is asked for with instruction, plan and
the text so far. Plans of more than 50 steps are skipped. Where the code differs, ours: it takes any line of the plan
as a step, so an apology became a paragraph (here a plan must parse, and its paragraphs count from 1), and its cache
knows a step by instruction and line only, so two plans with a line in common shared a paragraph (here a call is its
whole request). The prompts are our own words.

Lost, counted by reason: chats of more than one question (`several_turns`), plans that do not parse
(`unparsable_plan`) or are too long (`too_many_steps`), and samples lost in a call (see `generation.CALL_REASONS`).
Numbers of words outside the limits are the model's: kept, and counted as `num_steps_out_of_range`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.calls import GenerationConfig, open_caller
from ropewalk.stages.data.alignment.conversations import (
    Chat,
    assistant,
    check_chats,
    count_records,
    fill_in,
    iterate_chats,
    require_placeholders,
    user,
)
from ropewalk.stages.data.alignment.generation import CALL_REASONS, Ask, DroppedError, SampleWriter, generate
from ropewalk.stages.schema import Artifact, Record, chats_schema, iterate_table, read_artifact, write_artifact

NAME = "agent_write"
VERSION = 1
check = check_chats

REASONS = ("several_turns", "unparsable_plan", "too_many_steps", *CALL_REASONS)
_STEP = re.compile(
    r"^[\s#>-]*paragraph\s*(\d+)\s*[-–—:.]+\s*(?:main\s+point\s*:)?\s*(.+?)\s*[-–—,;|(]+\s*"
    r"(?:word\s+count\s*:)?[\s~]*(?:about\s+)?(\d[\d,]*)\s*words?\b.*$",
    re.IGNORECASE,
)
_PLAN_PROMPT = """\
Below is a request for a long text. Do not write the text yet: plan it, paragraph by paragraph.

The request:

{instruction}

Give the plan as one line a paragraph and nothing else, in this form:

Paragraph 1 - Main Point: what the paragraph says, in some detail - Word Count: 400 words
Paragraph 2 - Main Point: what the paragraph says, in some detail - Word Count: 700 words

Together the paragraphs must answer the whole request. Give each between {min_words} and {max_words} words, so do not \
divide too finely."""
_WRITE_PROMPT = """\
You are writing a long text, one paragraph at a time. Here are the request, the plan of all paragraphs, and what \
has been written so far.

The request:

{instruction}

The plan:

{plan}

Written so far:

{text}

Now write this paragraph, and only this one:

{step}

Go on from where the text stands without repeating it. A short heading is welcome where it helps. Unless this is the \
last paragraph of the plan, do not conclude."""


class AgentWriteConfig(Record):
    """How the plan is asked for and carried out."""

    generation: GenerationConfig = GenerationConfig(max_new_tokens=4096)
    """The model that plans and writes."""
    max_steps: int = Field(default=50, ge=1)
    """Plans of more paragraphs are dropped."""
    min_words: int = Field(default=200, ge=1)
    """Least length of a paragraph that the plan prompt asks for, in words."""
    max_words: int = Field(default=1000, ge=1)
    """Greatest length of a paragraph that the plan prompt asks for, in words."""
    plan_prompt: str = _PLAN_PROMPT
    """With {instruction}; {min_words} and {max_words} may occur."""
    write_prompt: str = _WRITE_PROMPT
    """With {instruction}, {plan}, {text} and {step}."""

    @model_validator(mode="after")
    def _prompts_ask(self) -> AgentWriteConfig:
        require_placeholders("plan_prompt", self.plan_prompt, "instruction")
        require_placeholders("write_prompt", self.write_prompt, "instruction", "plan", "text", "step")
        if self.max_words < self.min_words:
            raise ValueError(f"max_words {self.max_words} is below min_words {self.min_words}")
        return self


@dataclass(frozen=True)
class Step:
    """One paragraph of a plan."""

    line: str
    num_words: int


def parse_plan(text: str) -> list[Step] | None:
    """The steps of a plan; None unless every line is one and they count from 1."""
    steps = []
    for line in filter(str.strip, text.splitlines()):
        found = _STEP.match(line.replace("*", ""))  # Models like to set labels in bold.
        if found is None or int(found[1]) != len(steps) + 1:
            return None
        steps.append(Step(line.strip(), int(found[3].replace(",", ""))))
    return steps or None


def write_text(config: AgentWriteConfig, chat: Chat, ask: Ask) -> dict[str, Any]:
    """The chat with its long answer. Raises DroppedError and CallFailedError."""
    questions = [message for message in chat.messages if message["role"] == "user"]
    if len(questions) != 1 or any(message["role"] == "tool" for message in chat.messages):
        raise DroppedError("several_turns")
    instruction = questions[0]["content"]
    limits = {"min_words": str(config.min_words), "max_words": str(config.max_words)}
    plan = ask([user(fill_in(config.plan_prompt, instruction=instruction, **limits))])
    steps = parse_plan(plan)
    if steps is None:
        raise DroppedError("unparsable_plan")
    if len(steps) > config.max_steps:
        raise DroppedError("too_many_steps")
    lines = "\n".join(step.line for step in steps)
    paragraphs: list[str] = []
    for step in steps:
        values = {"instruction": instruction, "plan": lines, "text": "\n\n".join(paragraphs), "step": step.line}
        paragraphs.append(ask([user(fill_in(config.write_prompt, **values))]))
    text = "\n\n".join(paragraphs)
    head = [message for message in chat.messages if message["role"] == "system"]
    written = {
        "plan": [step.line for step in steps],
        "planned_words": [step.num_words for step in steps],
        "num_words": len(text.split()),
    }
    metadata = {**chat.metadata, "agent_write": written}
    return Chat(chat.sample_id, chat.source, [*head, questions[0], assistant(text)], metadata).record()


def run(config: AgentWriteConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write an answer to every instruction. Raises ValueError on bad input, or if nothing is left."""
    read_artifact(inputs["chats"], "chats")
    num_samples = count_records(inputs["chats"], "chats")
    writer = SampleWriter(output, "chats", chats_schema(), REASONS, num_samples, config.generation.max_failed_fraction)
    caller = open_caller(config.generation, inputs, context)
    counts = generate(writer, iterate_chats(inputs["chats"]), partial(write_text, config), caller, context)
    details = {"model": caller.model, **_statistics(config, output.data)}
    write_artifact(output.data, Artifact(kind="chats", counts=counts, details=details))


def _statistics(config: AgentWriteConfig, folder: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for written in _written(folder):
        words = written["planned_words"]
        found["num_steps"] += len(words)
        found["num_steps_out_of_range"] += sum(not config.min_words <= count <= config.max_words for count in words)
        found["num_planned_words"] += sum(words)
        found["num_words"] += written["num_words"]
    return dict(found)


def _written(folder: Path) -> Iterator[dict[str, Any]]:
    import json

    for batch in iterate_table(folder, "chats", ["metadata"]):
        for metadata in batch.column("metadata").to_pylist():
            yield json.loads(metadata)["agent_write"]
