"""Instruction-following difficulty: how much less an instruction helps to predict its answer than it should.

Reads `chats` and `model` (any small causal model; Superfiltering shows that GPT-2 124M ranks as large ones do). Writes
Scores. Source: Cherry LLM (arXiv 2308.12032, section 2.2) and Superfiltering (arXiv 2402.00530;
tianyi-lab/Superfiltering:code_ifd/data_analysis.py). With a prompt x and its answer y

    ifd = ppl(y | x) / ppl(y)          ppl = exp of the mean negative log likelihood of y's tokens

An ifd of 1 or more says that the prompt does not help: the pair is taken for misaligned, and dropped. Below 1, the
higher the better. One finite number that orders so:

    score = ifd where ifd < 1, otherwise -ifd                          (above 0, or -1 and below)

so that `min_score` 0 drops exactly the misaligned, and the best tenth is the published choice wherever so many are
aligned. The published code takes int(52002 * rate) samples whatever came in: Alpaca's size is a constant in it.
`num_misaligned` counts the misaligned.

x is every message before the last answer, each through `message_template`; y is that answer (the published data have
one turn, and its instruction and input are joined as `message_template` joins two messages).

Where we differ from the published code:
* Both perplexities run over the same tokens. In the code the first token of y counts in ppl(y | x) alone. The paper's
  sums begin with the first token, which needs something in front of it: here the begin token, as for both. Where a
  tokenizer has neither begin nor end token, the first token of y counts in neither.
* x and y are tokenised apart, so that y's tokens are the same in both.
* Beyond `max_tokens` the end of y is cut, in both perplexities, and counted. In the code a prompt of that length ends
  in NaN, any error in a perplexity of 0, and a division by zero in an ifd of 0, which are then selected from.

Lost, by reason: chats without an answer, with nothing before it, whose answer has no token, or whose prompt leaves no
room. Cost a sample: one pass over x and y, one over y.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.conversations import fill_in, require_placeholders
from ropewalk.stages.data.selection.chat_scoring import score_chats
from ropewalk.stages.data.selection.language_model import Precision, TextEncoder, load_model, token_losses, truncate
from ropewalk.stages.data.selection.scores import check_scores, with_scores, write_scores
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "ifd"
VERSION = 1
check = check_scores

PARTS = ("ifd", "ppl", "ppl_given_prompt", "num_tokens", "num_answer_tokens")
REASONS = ("no_answer", "no_prompt", "empty_answer", "prompt_too_long")
_TALLIES = (*(f"num_dropped_{reason}" for reason in REASONS), "num_cut_samples", "num_cut_tokens")


class IfdConfig(Record):
    """How chats are read."""

    max_tokens: int = Field(default=1024, ge=2)
    """Longest prompt and answer together, begin token included; the end of longer answers is cut."""
    message_template: str = "{content}\n"
    """How a message of the prompt is written; `{role}` and `{content}` are filled in."""
    dtype: Precision = "float32"
    """Of the model's weights and activations."""
    batch_tokens: int = Field(default=4_096, ge=1)
    """Tokens of a batch; bounds memory, and the last digits of the scores depend on it."""

    @field_validator("message_template")
    @classmethod
    def _with_content(cls, template: str) -> str:
        return require_placeholders("message_template", template, "content")


@dataclass(frozen=True)
class PromptedAnswer:
    """A prompt and its answer as tokens."""

    prompt: list[int]
    answer: list[int]


class IfdScorer:
    """Scores chats with a model."""

    def __init__(self, config: IfdConfig, folder: Path) -> None:
        self._config, self._encoder = config, TextEncoder(folder)
        self._loaded = load_model(folder, dtype=config.dtype, window=config.max_tokens)

    def __call__(self, rows: Sequence[Mapping[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
        """The perplexities of chats; those that cannot be scored are counted."""
        found = [(row, self.lay_out(row["messages"], counts)) for row in rows]
        pairs = [(row, pair) for row, pair in found if pair is not None]
        prefix = self._encoder.prefix
        sequences, firsts = [], []
        for _, pair in pairs:
            for prompt in (pair.prompt, []):
                sequences.append([*prefix, *prompt, *pair.answer])
                firsts.append(len(prefix) + len(prompt) + self._skipped)
        losses = token_losses(self._loaded, sequences, batch_tokens=self._config.batch_tokens, first_targets=firsts)
        return [
            {
                "sample_id": row["sample_id"],
                "source": row["source"],
                **perplexities(losses[2 * number], losses[2 * number + 1]),
                "num_tokens": len(sequences[2 * number]),
                "num_answer_tokens": len(pair.answer),
            }
            for number, (row, pair) in enumerate(pairs)
        ]

    @property
    def _skipped(self) -> int:
        """Tokens of an answer that have no loss: the first, where nothing stands in front of it."""
        return 0 if self._encoder.prefix else 1

    def lay_out(self, messages: Sequence[Mapping[str, str]], counts: Counter[str]) -> PromptedAnswer | None:
        """The tokens of a chat, cut to the window, or None if it is dropped; both are counted."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            counts["num_dropped_no_answer"] += 1
            return None
        template = self._config.message_template
        text = "".join(fill_in(template, **message) for message in messages[: answers[-1]])
        prompt = self._encoder.encode(text).ids
        answer = self._encoder.encode(messages[answers[-1]]["content"]).ids
        room = self._config.max_tokens - len(self._encoder.prefix) - len(prompt)
        for reason, drops in (
            ("no_prompt", not prompt),
            ("empty_answer", len(answer) <= self._skipped),
            ("prompt_too_long", room <= self._skipped),
        ):
            if drops:
                counts[f"num_dropped_{reason}"] += 1
                return None
        kept, num_cut = truncate(answer, room, keep="head")
        counts["num_cut_samples"] += num_cut > 0
        counts["num_cut_tokens"] += num_cut
        return PromptedAnswer(prompt, kept)


def perplexities(given_prompt: np.ndarray, alone: np.ndarray) -> dict[str, float]:
    """The parts of the score, from the losses of the same tokens with and without the prompt."""
    with_prompt, without = float(given_prompt.mean()), float(alone.mean())
    if not (with_prompt < 700 and without < 700):
        raise ValueError(f"an answer has the mean losses {with_prompt} and {without}: the model overflows; widen dtype")
    return {
        "ifd": math.exp(with_prompt - without),
        "ppl": math.exp(without),
        "ppl_given_prompt": math.exp(with_prompt),
    }


def scores_of(ifd: np.ndarray) -> np.ndarray:
    """Below 1 the ifd itself, otherwise minus it: all that is misaligned is below 0, the worst last."""
    import numpy as np

    return np.where(ifd < 1, ifd, -ifd)


def run(config: IfdConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every chat. Raises ValueError on bad input, or if no chat can be scored."""
    import numpy as np

    scored = score_chats(context, inputs["chats"], partial(IfdScorer, config, inputs["model"]), PARTS, _TALLIES)
    scores = scores_of(np.concatenate([table.column("ifd").to_numpy() for table in scored.tables]))
    counts = {**scored.counts, "num_misaligned": int((scores < 0).sum())}
    write_scores(output, context, with_scores(scored.tables, scores), parts=PARTS, counts=counts)
