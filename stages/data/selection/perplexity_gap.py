"""Scores documents by how much their earlier segments help to predict later ones (the filter named ProLong).

Reads `documents` or `tokens`, and `model` (a small causal language model; published with OPT-350m). Writes Scores.
Method: Chen et al., "Long Context is Not Long at All: A Prospector of Long-Dependency Data for Large Language Models",
ACL 2024, arXiv 2405.17915; code October2001/ProLong:prolong/run.py. Not the ProLong of Princeton.

A document's segments s_0 .. s_(n-1) have `segment_tokens` each; what is behind the last whole one is not read. Of
pairs j < i, `num_pairs` are drawn:

    gap_ij         = (ppl(s_i) - ppl(s_i | s_j)) / ppl(s_i)         dependency strength
    distance_ij    = (i - j) / (max_segments - 1), at most 1        dependency distance
    specificity_i  = 1 - entropy(softmax_j(ppl(s_i) - ppl(s_i | s_j))) / log(number of j), 1 for a single j
    score          = sum over pairs with gap_ij > threshold of (gap_ij + distance_ij) * specificity_i

Perplexities are over a segment's tokens but the first, with no begin token in front. Higher is better.

Where we differ from the published code: it gives 0 to a document with fewer pairs than `num_pairs` (4,200 tokens at the
defaults), where we take all its pairs; it turns errors and NaN into 0, where we stop. Of a document with more than
`max_segments`, so many are drawn and kept in order, and i and j count the drawn ones, as published. A sum over pairs
grows with their number, so documents of few segments score low: `reduction` "mean" divides by the number of pairs.

The draws are keyed by the document's id. Lost: documents of fewer than two segments. Cost a document: `num_pairs`
passes of two segments. Memory: one shard's texts and one batch a worker; a row a document.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.document_reading import (
    DocumentKind,
    DocumentReader,
    ReadDocument,
    document_slot,
    map_documents,
    score_shard,
)
from ropewalk.stages.data.selection.language_model import LanguageModel, Precision, load_model, perplexity, token_losses
from ropewalk.stages.data.selection.scores import check_scores, write_scores
from ropewalk.stages.schema import Record, seeded_rng

NAME = "perplexity_gap"
VERSION = 1
check = check_scores

PARTS = ("mean_gap", "mean_specificity", "num_dependent_pairs", "num_pairs", "num_tokens")


class PerplexityGapConfig(Record):
    """Which pairs are measured, and what counts as a dependency."""

    segment_tokens: int = Field(default=128, ge=2)
    """Length of a segment."""
    max_segments: int = Field(default=256, ge=2)
    """So many segments of a document at most, drawn if it has more; also the unit of the distance."""
    num_pairs: int = Field(default=500, ge=1)
    """So many pairs of a document at most, drawn if it has more."""
    threshold: float = Field(default=0.1, ge=0)
    """Relative gain in perplexity above which a pair counts."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over the pairs: the published sum, or divided by the number of pairs."""
    seed: int = 0
    dtype: Precision = "float32"
    """Of the model's weights and activations."""
    batch_tokens: int = Field(default=16_384, ge=1)
    """Tokens of a batch of pairs; bounds memory, and the last digits of the scores depend on it."""

    @model_validator(mode="after")
    def _segments(self) -> PerplexityGapConfig:
        if self.batch_tokens < 2 * self.segment_tokens:
            raise ValueError(f"batch_tokens {self.batch_tokens} is less than two segments of {self.segment_tokens}")
        return self


def draw_segments(config: PerplexityGapConfig, doc_id: str, ids: Sequence[int]) -> list[Sequence[int]]:
    """The document's whole segments in order, `max_segments` of them drawn if there are more."""
    length = config.segment_tokens
    segments = [ids[first : first + length] for first in range(0, len(ids) - length + 1, length)]
    if len(segments) <= config.max_segments:
        return segments
    rng = seeded_rng(NAME, "segments", config.seed, doc_id)
    drawn = rng.choice(len(segments), config.max_segments, replace=False)
    return [segments[number] for number in sorted(drawn.tolist())]


def draw_pairs(config: PerplexityGapConfig, doc_id: str, num_segments: int) -> list[tuple[int, int]]:
    """Pairs (i, j), j < i, in order; `num_pairs` of them drawn if there are more."""
    num_pairs = num_segments * (num_segments - 1) // 2
    if num_pairs <= config.num_pairs:
        return [(later, earlier) for later in range(num_segments) for earlier in range(later)]
    rng = seeded_rng(NAME, "pairs", config.seed, doc_id)
    drawn = sorted(rng.choice(num_pairs, config.num_pairs, replace=False).tolist())
    return [_pair(number) for number in drawn]


def _pair(number: int) -> tuple[int, int]:
    """The pair at a place in the order (1, 0), (2, 0), (2, 1), (3, 0), ..."""
    later = (1 + math.isqrt(1 + 8 * number)) // 2
    return later, number - later * (later - 1) // 2


def specificity(gains: Sequence[float]) -> float:
    """How much one earlier segment stands out: 1 less the entropy of the softmax of the gains, relative to its most."""
    if len(gains) == 1:
        return 1.0
    powers = [math.exp(gain - max(gains)) for gain in gains]
    shares = [power / math.fsum(powers) for power in powers]
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0)
    return min(max(1 - entropy / math.log(len(gains)), 0.0), 1.0)


def dependency(
    config: PerplexityGapConfig, alone: Mapping[int, float], given: Mapping[tuple[int, int], float]
) -> dict[str, float]:
    """Score and parts of a document, of the perplexities of segments alone (by i) and given another (by i, j)."""
    gains: dict[int, list[float]] = defaultdict(list)
    for (later, _), found in given.items():
        gains[later].append(alone[later] - found)
    specific = {later: specificity(values) for later, values in gains.items()}
    relative = {pair: (alone[pair[0]] - found) / alone[pair[0]] for pair, found in given.items()}
    dependent = {pair: gap for pair, gap in relative.items() if gap > config.threshold}
    unit = config.max_segments - 1
    total = math.fsum(
        (gap + min((later - earlier) / unit, 1.0)) * specific[later] for (later, earlier), gap in dependent.items()
    )
    return {
        "score": total / len(given) if config.reduction == "mean" else total,
        "mean_gap": math.fsum(relative.values()) / len(relative),
        "mean_specificity": math.fsum(specific.values()) / len(specific),
        "num_dependent_pairs": len(dependent),
        "num_pairs": len(given),
    }


def measure(config: PerplexityGapConfig, loaded: LanguageModel, doc_id: str, ids: Sequence[int]) -> dict[str, float]:
    """Score and parts of a document of two segments or more."""
    segments = draw_segments(config, doc_id, ids)
    pairs = draw_pairs(config, doc_id, len(segments))
    later = sorted({pair[0] for pair in pairs})
    losses = token_losses(loaded, [segments[number] for number in later], batch_tokens=config.batch_tokens)
    alone = {
        number: perplexity(found, f"a segment of document {doc_id!r}")
        for number, found in zip(later, losses, strict=True)
    }
    sequences = [[*segments[before], *segments[number]] for number, before in pairs]
    firsts = [config.segment_tokens + 1] * len(pairs)
    losses = token_losses(loaded, sequences, batch_tokens=config.batch_tokens, first_targets=firsts)
    given = {
        pair: perplexity(found, f"a segment of document {doc_id!r}") for pair, found in zip(pairs, losses, strict=True)
    }
    return {**dependency(config, alone, given), "num_tokens": len(ids)}


class GapScorer:
    """Scores one shard of documents after another."""

    def __init__(self, config: PerplexityGapConfig, kind: DocumentKind, model: Path) -> None:
        self._config = config
        # Segments are drawn from the whole document.
        self._reader = DocumentReader(
            kind, model, min_tokens=2 * config.segment_tokens, max_tokens=None, enable_begin=False
        )
        self._loaded = load_model(model, dtype=config.dtype)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write `parts`; returns the counts."""
        return score_shard(self._reader, self._measure, ["score", *PARTS], shard, folder)

    def _measure(self, document: ReadDocument) -> dict[str, float]:
        return measure(self._config, self._loaded, document.doc_id, document.ids)


def run(config: PerplexityGapConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every document. Raises ValueError on bad input, or if no document can be scored."""
    build = partial(GapScorer, config, document_slot(inputs), inputs["model"])
    tables, counts = map_documents(inputs, context, build)
    write_scores(output, context, tables, parts=PARTS, counts=counts)
