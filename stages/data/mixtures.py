"""Published mixtures of long-context training, and curricula of windows, as records that pipelines read.

A `Curriculum` is a sequence of phases; a phase has a window, a mixture and what was published of its training. Numbers
stand here only where a paper or its code states them; None means that it does not. How a pipeline uses them:

    phase = PROLONG.phases[0]                        # 64K
    made = {part.name: rows_of(part, phase) for part in phase.mixture.parts if part.name in my_sources}
    fractions = phase.mixture.fractions(made, missing="renormalise")
    mixed = Step("mix-64k", mix, mix.MixConfig(fractions=fractions, num_rows=phase.num_rows(my_tokens)), inputs=made)
    trained = Step("train-64k", train, train.TrainConfig(..., phases=(train.Phase(rows="rows", num_steps=...),)), ...)

`rows_of` packs a part's documents with `row_tokens=phase.row_tokens` and `attention=phase.attention`. All parts of a
phase have rows of its window; a part with `unit_tokens` is packed from documents of at least that length, or from
groups of related documents that long, several of them in a row where the window is longer. Take one train step a phase
where theta changes between phases, because a step has one rotary embedding; otherwise `train.phases` holds the whole
curriculum. Shares by source inside one corpus, and by length, are made from Tokens by `upsample` before packing.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field, model_validator

from ropewalk.stages.schema import AttentionPolicy, Record

K = 1024
WINDOWS_TOKENS = (8 * K, 64 * K, 512 * K)
"""A base model's window, and the two to which ProLong takes it."""


class Part(Record):
    """One source of a mixture."""

    name: str
    fraction: float = Field(gt=0, le=1)
    """Share of the tokens."""
    unit_tokens: int | None = None
    """Length from which its documents, or groups of them, were taken. None: documents of any length."""


class Mixture(Record):
    """Sources and their shares."""

    name: str
    parts: tuple[Part, ...] = Field(min_length=1)
    source: str
    """Who published it, and where."""

    @model_validator(mode="after")
    def _shares(self) -> Mixture:
        names = [part.name for part in self.parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mixture {self.name}: part {twice[0]!r} occurs twice")
        total = math.fsum(part.fraction for part in self.parts)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"mixture {self.name}: the fractions of its parts sum to {total}, not to 1")
        return self

    def fractions(
        self, slots: Mapping[str, object] | Iterable[str], *, missing: Literal["refuse", "renormalise"] = "refuse"
    ) -> dict[str, float]:
        """What `MixConfig.fractions` takes, for the parts that there are.

        Args:
            slots: The parts that a pipeline has, by name; of a mapping its keys.
            missing: What to do about parts that it lacks: an error, or the others keep their relations to each other.

        Raises ValueError naming parts that are missing, or that the mixture does not have.
        """
        given, names = set(slots), [part.name for part in self.parts]
        if unknown := sorted(given - set(names)):
            raise ValueError(f"mixture {self.name} has no part {unknown[0]!r}{_nearest(unknown[0], names)}")
        lacking = [name for name in names if name not in given]
        if lacking and (missing == "refuse" or not given):
            raise ValueError(
                f"mixture {self.name} also needs {', '.join(lacking)}: give them, or spread their share over the "
                'others with missing="renormalise"'
            )
        total = math.fsum(part.fraction for part in self.parts if part.name in given)
        return {
            part.name: part.fraction / total if lacking else part.fraction for part in self.parts if part.name in given
        }

    def missing_fraction(self, slots: Mapping[str, object] | Iterable[str]) -> float:
        """Share of the mixture that is in parts other than these."""
        given = set(slots)
        return math.fsum(part.fraction for part in self.parts if part.name not in given)


class WindowPhase(Record):
    """A stretch of training at one window."""

    name: str
    row_tokens: int = Field(gt=0)
    """The window."""
    mixture: Mixture
    attention: AttentionPolicy | None = None
    """Of packed rows."""
    batch_tokens: int | None = None
    """Tokens of an optimiser step."""
    num_steps: int | None = None
    """Optimiser steps."""
    num_tokens: int | None = None
    """Tokens of the phase."""
    learning_rate: float | None = None
    """Peak."""
    min_learning_rate_fraction: float | None = None
    """Where the schedule ends, of the peak."""
    warmup_fraction: float | None = None
    """Of the steps."""
    rope_theta: float | None = None
    """Base of the rotary embedding."""
    notes: tuple[str, ...] = ()
    """What else was published, and where sources disagree."""

    def num_rows(self, num_tokens: int | None = None) -> int:
        """Rows of the window that hold about so many tokens; None: as many as were published.

        Raises ValueError if nothing was published, or it is less than a row.
        """
        wanted = self.num_tokens if num_tokens is None else num_tokens
        if wanted is None:
            raise ValueError(f"phase {self.name}: how many tokens it had was not published, so give num_tokens")
        if wanted < self.row_tokens:
            raise ValueError(f"phase {self.name}: {wanted} tokens are less than one row of {self.row_tokens}")
        return wanted // self.row_tokens


class Curriculum(Record):
    """Phases in order."""

    name: str
    phases: tuple[WindowPhase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _windows_grow(self) -> Curriculum:
        windows = [phase.row_tokens for phase in self.phases]
        if windows != sorted(windows):
            raise ValueError(f"curriculum {self.name}: windows must not shrink, but they are {windows}")
        return self


def grow_windows(
    mixture: Mixture, num_tokens: Mapping[int, int], *, attention: AttentionPolicy = "document"
) -> Curriculum:
    """A curriculum of our own: one mixture at several windows, shortest first.

    Args:
        mixture: What every phase is made of.
        num_tokens: Tokens of the phase, by window; `WINDOWS_TOKENS` has the usual ones.
        attention: Of all rows.
    """
    phases = tuple(
        WindowPhase(
            name=f"{mixture.name}-{_short(window)}",
            row_tokens=window,
            mixture=mixture,
            attention=attention,
            num_tokens=num_tokens[window],
        )
        for window in sorted(num_tokens)
    )
    return Curriculum(name=f"{mixture.name}-windows", phases=phases)


def find_curriculum(name: str) -> Curriculum:
    """A published curriculum. Raises ValueError naming the nearest one."""
    if name not in CURRICULA:
        raise ValueError(f"there is no curriculum {name!r}{_nearest(name, list(CURRICULA))}")
    return CURRICULA[name]


def _short(window: int) -> str:
    return f"{window // K}k" if window % K == 0 else str(window)


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]!r}?" if close else f": there are {', '.join(names)}"


_PROLONG_SHORT = (
    Part(name="fineweb_edu", fraction=0.10),
    Part(name="fineweb_2023_50", fraction=0.10),
    Part(name="stackexchange", fraction=0.04),
    Part(name="wikipedia", fraction=0.04),
    Part(name="tulu_v2", fraction=0.03),
    Part(name="arxiv", fraction=0.03),
    Part(name="open_web_math", fraction=0.03),
    Part(name="textbooks", fraction=0.03),
)

PROLONG_64K_MIXTURE = Mixture(
    name="prolong-64k",
    parts=(
        Part(name="code_repos", fraction=0.30, unit_tokens=64 * K),
        Part(name="books", fraction=0.30, unit_tokens=64 * K),
        *_PROLONG_SHORT,
    ),
    source="Gao et al., 2024, arXiv 2410.02660; princeton-nlp/ProLong, train_64K.sh",
)

PROLONG_512K_MIXTURE = Mixture(
    name="prolong-512k",
    parts=(
        Part(name="code_repos_512k", fraction=0.15, unit_tokens=512 * K),
        Part(name="code_repos_64k", fraction=0.15, unit_tokens=64 * K),
        Part(name="books_512k", fraction=0.05, unit_tokens=512 * K),
        Part(name="books_64k", fraction=0.25, unit_tokens=64 * K),
        *_PROLONG_SHORT,
    ),
    source="Gao et al., 2024, arXiv 2410.02660; princeton-nlp/ProLong, train_512K.sh",
)

PROLONG = Curriculum(
    name="prolong",
    phases=(
        WindowPhase(
            name="prolong-64k",
            row_tokens=64 * K,
            mixture=PROLONG_64K_MIXTURE,
            attention="document",
            batch_tokens=4 * K * K,
            num_steps=5000,
            num_tokens=5000 * 4 * K * K,
            learning_rate=1e-5,
            min_learning_rate_fraction=0.1,
            warmup_fraction=0.1,
            rope_theta=8e6,
            notes=(
                "starts from Llama-3-8B-Instruct",
                "cosine schedule; AdamW 0.9/0.95, weight decay 0.1, gradients clipped at 1",
                "60 % long, 40 % short: all data long costs more than it gives",
                "rows of a step are sorted by length",
            ),
        ),
        WindowPhase(
            name="prolong-512k",
            row_tokens=512 * K,
            mixture=PROLONG_512K_MIXTURE,
            attention="document",
            batch_tokens=8 * K * K,
            num_steps=2500,
            num_tokens=2500 * 8 * K * K,
            learning_rate=5e-6,
            rope_theta=1.28e8,
            notes=(
                "learning rate as in the script; the paper says 1e-5",
                "the schedule starts anew, the optimiser's state is kept; sequence parallel 8",
            ),
        ),
    ),
)
"""From 8K to 64K to 512K, 20B tokens each. Then 1B tokens of UltraChat, which no phase here describes."""

LLAMA_2_LONG = Curriculum(
    name="llama-2-long",
    phases=(
        WindowPhase(
            name="llama-2-long-32k",
            row_tokens=32 * K,
            mixture=Mixture(
                name="llama-2-long",
                parts=(Part(name="upsampled", fraction=1.0),),
                source="Xiong et al., 2023, arXiv 2309.16039, tables 7 and 8: the variant that can be made again",
            ),
            num_tokens=400_000_000_000,
            rope_theta=5e5,
            notes=(
                "their own mix is not published. Of the variants that are described, the Llama 2 mix with its long "
                "documents upsampled comes nearest (NarrativeQA 22.2; own mix 23.7; Llama 2 mix 18.2; without long "
                "data 19.5): part `upsampled` is the output of stage `upsample` on a short-context mix",
                "theta before: 1e4. Second-hand: 32K at 7B and 13B, 16K at the larger sizes; 100,000 steps; learning "
                "rate 2e-5 or 1e-5 by size",
                "quality of the long documents counts for more than their length; loss on prompts, too, helps in "
                "instruction tuning (Qasper 38.9 against 35.7)",
            ),
        ),
    ),
)
"""Effective long-context scaling: one long phase on the model's own kind of data."""

OLMO_3_LONGMINO = Curriculum(
    name="olmo-3-longmino",
    phases=(
        WindowPhase(
            name="longmino-64k",
            row_tokens=64 * K,
            mixture=Mixture(
                name="olmo-3-longmino",
                parts=(Part(name="long", fraction=0.34), Part(name="short", fraction=0.66)),
                source="OLMo 3 report, 2025: Dolma 3 Longmino",
            ),
            attention="document",
            num_tokens=50_000_000_000,
            notes=(
                "`long`: PDFs between the 20 % that compress best and the 20 % that compress worst (stage "
                "`filter_documents`, drop_most_repetitive_fraction and drop_least_repetitive_fraction 0.2), and "
                "synthetic aggregation tasks (CWE, REX)",
                "66 % long instead of 34 % cost 2.5 points on short tasks instead of 0.8",
                "best-fit packing; window before: 8K; YaRN on full-attention layers only",
                "50B tokens at 7B, 100B at 32B; 8-way context parallel",
            ),
        ),
    ),
)
"""A third long, two thirds short."""

CURRICULA = {each.name: each for each in (PROLONG, LLAMA_2_LONG, OLMO_3_LONGMINO)}
"""By name."""
