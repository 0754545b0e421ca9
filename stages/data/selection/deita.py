"""DEITA's scores: how complex an instruction is, times how good its answer is, summed over the turns of a chat.

Reads `chats`, `complexity_model` and `quality_model` (causal models that were trained to grade; published are
hkust-nlp/deita-complexity-scorer and -quality-scorer). Writes Scores; `diversify` chooses by them. Source: "What Makes
Good Data for Alignment?" (arXiv 2312.15685), hkust-nlp/deita:src/deita/selection/scorer. A prompt asks for a grade,

    grade = sum_g g * softmax over the grades' tokens of the logits of the next token, g = 1 to 6
    score = sum over turns of complexity * quality

The prompts are what the published graders were trained with, so they and the grades are configuration. The ids of the
grades' tokens are looked up in each model's vocabulary; the code has those of Llama and Mistral written into it.

Where we differ from the code: a turn is a user message and the last assistant message before the next one. A last
question without an answer is left out (the code grades an empty answer), and system messages are no turns (the code
takes every second message for a question, whoever it is from). Prompts beyond `max_tokens` lose the end of the texts,
never the words that ask for the grade, and are counted; the code hands them to the model as they are.

Lost: chats without an answered turn (`num_dropped_no_turn`). A worker holds both models. Cost: one pass over each
instruction, one over each turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.conversations import fill_in, require_placeholders
from ropewalk.stages.data.selection.chat_scoring import score_chats
from ropewalk.stages.data.selection.language_model import Precision, TextEncoder, load_model
from ropewalk.stages.data.selection.scores import check_scores, write_scores
from ropewalk.stages.data.vocabulary import load_tokenizer
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "deita"
VERSION = 1
check = check_scores

PARTS = ("complexity", "quality", "num_turns")
_TALLIES = ("num_dropped_no_turn", "num_unanswered_turns", "num_cut_prompts", "num_cut_tokens")
_BATCH_PROMPTS = 16  # Each of them may need a row of logits of every other.


class DeitaConfig(Record):
    """How grades are asked for."""

    complexity_template: str = (
        "You are a helpful assistant. Please identify the complexity score of the following user query. \n"
        "##Query: {instruction}  \n##Complexity: "
    )
    """What `complexity_model` was trained to continue by a grade."""
    quality_template: str = (
        "You are a helpful assistant. Please identify the quality score of the Response corresponding to the Question."
        " \n #Question#:\n{instruction}\n#Response#:\n{output} \n##Quality: "
    )
    """What `quality_model` was trained to continue by a grade."""
    grades: tuple[str, ...] = Field(default=("1", "2", "3", "4", "5", "6"), min_length=2)
    """The tokens that are grades, worth 1, 2, ..."""
    max_tokens: int = Field(default=2_048, ge=8)
    """Longest prompt, begin token included; what is beyond is cut off the end of the texts in it."""
    dtype: Precision = "float32"
    """Of both models' weights and activations."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens of a batch; bounds memory, and the last digits of the scores depend on it."""

    @model_validator(mode="after")
    def _with_placeholders(self) -> Self:
        require_placeholders("complexity_template", self.complexity_template, "instruction")
        require_placeholders("quality_template", self.quality_template, "instruction", "output")
        if len(set(self.grades)) < len(self.grades):
            raise ValueError(f"grades must be distinct, but are {self.grades}")
        return self


def answered_turns(messages: Sequence[Mapping[str, str]]) -> tuple[list[tuple[str, str]], int]:
    """Pairs of a user message and the last assistant message before the next; and how many are unanswered."""
    turns: list[tuple[str, str | None]] = []
    for message in messages:
        if message["role"] == "user":
            turns.append((message["content"], None))
        elif message["role"] == "assistant" and turns:
            turns[-1] = turns[-1][0], message["content"]
    answered = [(question, answer) for question, answer in turns if answer is not None]
    return answered, len(turns) - len(answered)


class Grader:
    """A model that grades texts."""

    def __init__(self, config: DeitaConfig, folder: Path, slot: str, template: str) -> None:
        self._config, self._template = config, template
        self._encoder = TextEncoder(folder)
        self._grades = grade_ids(folder, slot, config.grades)
        self._loaded = load_model(folder, dtype=config.dtype, window=config.max_tokens)
        self._tail = template[template.rindex("}") + 1 :]

    def __call__(self, texts: Sequence[Mapping[str, str]], counts: Counter[str]) -> list[float]:
        """The grade of each template filled in; cuts are counted."""
        prompts = [self.prompt(fill_in(self._template, **values), counts) for values in texts]
        grades = [0.0] * len(prompts)
        for batch in _batches(prompts, self._config.batch_tokens):
            for number, logits in zip(batch, self._logits([prompts[n] for n in batch]), strict=True):
                grades[number] = expected_grade(logits)
        return grades

    def prompt(self, text: str, counts: Counter[str]) -> list[int]:
        """The tokens of a filled template, cut in front of its last words if there are too many."""
        encoded, room = self._encoder.encode(text), self._config.max_tokens - len(self._encoder.prefix)
        num_cut = max(0, len(encoded.ids) - room)
        end = encoded.first_token_beyond(len(text) - len(self._tail))
        if num_cut > end:
            raise ValueError(f"max_tokens {self._config.max_tokens} has no room for the template: raise it")
        counts["num_cut_prompts"] += num_cut > 0
        counts["num_cut_tokens"] += num_cut
        return [*self._encoder.prefix, *encoded.ids[: end - num_cut], *encoded.ids[end:]]

    def _logits(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The grades' logits behind each prompt, float64 [b, g]."""
        import torch

        lengths = torch.tensor([len(prompt) for prompt in prompts])
        places, which = torch.unique(lengths - 1, return_inverse=True)
        ids_BL = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self._loaded.check_ids(prompt)
            ids_BL[row, : len(prompt)] = torch.as_tensor(prompt)
        device = self._loaded.device
        with torch.inference_mode():
            # Padding is behind every prompt, where no token of it looks.
            logits_BPV = self._loaded.model(ids_BL.to(device), use_cache=False, logits_to_keep=places.to(device)).logits
        rows = logits_BPV[torch.arange(len(prompts)), which.to(device)]
        return rows[:, self._grades].double().cpu().numpy()


def grade_ids(folder: Path, slot: str, grades: Sequence[str]) -> list[int]:
    """The ids of the grades in a model's vocabulary. Raises ValueError naming one that is no token of it."""
    vocabulary = load_tokenizer(folder).get_vocab()
    for grade in grades:
        if grade not in vocabulary:
            raise ValueError(f"slot {slot}: its tokenizer has no token {grade!r}, so it cannot give that grade")
    return [vocabulary[grade] for grade in grades]


def expected_grade(logits: np.ndarray) -> float:
    """The mean of 1, 2, ... under the softmax of the grades' logits."""
    import numpy as np

    powers = np.exp(logits - logits.max())
    return float((powers * np.arange(1, len(logits) + 1)).sum() / powers.sum())


def _batches(prompts: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of prompts of about one length, longest last."""
    batch: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number)):
        if batch and ((len(batch) + 1) * len(prompts[number]) > batch_tokens or len(batch) == _BATCH_PROMPTS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


class DeitaScorer:
    """Scores chats with both graders."""

    def __init__(self, config: DeitaConfig, complexity: Path, quality: Path) -> None:
        self._complexity = Grader(config, complexity, "complexity_model", config.complexity_template)
        self._quality = Grader(config, quality, "quality_model", config.quality_template)

    def __call__(self, rows: Sequence[Mapping[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
        """The scores of chats; those without a turn are counted."""
        found: list[tuple[Mapping[str, Any], list[tuple[str, str]]]] = []
        for row in rows:
            turns, num_unanswered = answered_turns(row["messages"])
            counts["num_unanswered_turns"] += num_unanswered
            counts["num_dropped_no_turn"] += not turns
            found += [(row, turns)] if turns else []
        texts = [{"instruction": question, "output": answer} for _, turns in found for question, answer in turns]
        complexities, qualities = self._complexity(texts, counts), self._quality(texts, counts)
        records, first = [], 0
        for row, turns in found:
            end = first + len(turns)
            records.append(
                {
                    "sample_id": row["sample_id"],
                    "source": row["source"],
                    "score": sum(a * b for a, b in zip(complexities[first:end], qualities[first:end], strict=True)),
                    "complexity": sum(complexities[first:end]),
                    "quality": sum(qualities[first:end]),
                    "num_turns": len(turns),
                }
            )
            first = end
        return records


def run(config: DeitaConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every chat. Raises ValueError on bad input, or if no chat can be scored."""
    build = partial(DeitaScorer, config, inputs["complexity_model"], inputs["quality_model"])
    scored = score_chats(context, inputs["chats"], build, ("score", *PARTS), _TALLIES)
    write_scores(output, context, scored.tables, parts=PARTS, counts=scored.counts)
