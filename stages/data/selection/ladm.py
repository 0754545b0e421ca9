"""Scores documents by how attention of late chunks spreads over far earlier spans (LADM).

Reads `documents` or `tokens`, and `model` (the published Long Attention Calculator, or any model whose window is as
long as the documents). Writes Scores. Method: Chen et al., "LADM: Long-context Training Data Selection with
Attention-based Dependency Measurement for LLMs", ACL 2025, arXiv 2503.02502; code ZNLP/LADM:modeling_llama2.py.

A document of L tokens (begin token included) is read once. In each layer, for chunks of `chunk_tokens` that begin at
t = L - chunk_tokens, t - stride, ...:

    w      = softmax of the chunk's queries over the keys before the chunk, summed over its tokens, mean over heads
    PFS_k  = sum of w over the span of `chunk_tokens` that begins at t - k * interval, k = 1, 2, ... while the span lies
             behind the first chunk, which is left out for the attention it draws whatever it holds
    AFS    = sum over k of PFS_k * k * interval / L, times std over k of PFS_k (n - 1), times t / L
    score  = mean over chunks and layers of AFS

with interval = `interval_chunks` and stride = `stride_chunks` chunks. Chunks with `min_spans` spans or fewer are left
out, as published (4). Higher is better. Weights are float32 (published: float16).

The first `max_tokens` of a document are read. Lost: documents too short for one chunk with enough spans. Cost: one pass
a document, and of attention weights L * L / (2 * stride_chunks) a head and layer. Memory: see
`language_model`; one chunk's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from ropewalk.stages.data.selection.language_model import (
    LanguageModel,
    LayerAttention,
    Precision,
    load_model,
    observe_attention,
)
from ropewalk.stages.data.selection.scores import check_scores, write_scores
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "ladm"
VERSION = 1
check = check_scores

PARTS = ("mean_focus", "mean_spread", "num_chunks", "num_tokens")


class LadmConfig(Record):
    """The grid of chunks and spans."""

    chunk_tokens: int = Field(default=128, ge=1)
    """Length of a chunk, and of a span."""
    interval_chunks: int = Field(default=4, ge=1)
    """Distance between spans, in chunks."""
    stride_chunks: int = Field(default=4, ge=1)
    """Distance between the chunks that are looked at, in chunks."""
    min_spans: int = Field(default=4, ge=2)
    """A chunk is looked at only if it begins behind the first chunk and this many intervals."""
    max_tokens: int = Field(default=32_768, ge=8)
    """What is read of a document, begin token included."""
    dtype: Precision = "float32"
    """Of the model's weights and activations."""

    @model_validator(mode="after")
    def _room(self) -> LadmConfig:
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is less than the {self.min_tokens} that a chunk needs")
        return self

    @property
    def first_begin(self) -> int:
        """Chunks begin behind this place, in tokens."""
        return self.chunk_tokens * (1 + self.min_spans * self.interval_chunks)

    @property
    def min_tokens(self) -> int:
        """The shortest sequence that has a chunk to look at."""
        return self.first_begin + self.chunk_tokens + 1


def chunk_begins(config: LadmConfig, num_tokens: int) -> list[int]:
    """Where the chunks of a sequence begin, last first."""
    stride = config.chunk_tokens * config.stride_chunks
    return list(range(num_tokens - config.chunk_tokens, config.first_begin, -stride))


def focus_of_spans(config: LadmConfig, layer: LayerAttention, begin: int) -> np.ndarray:
    """PFS of the spans of one chunk, nearest first, float64."""
    import numpy as np
    import torch

    chunk, interval = config.chunk_tokens, config.chunk_tokens * config.interval_chunks
    weights_HRS = layer.weights(begin, begin + chunk, num_keys=begin)
    weights = (weights_HRS.sum((0, 1), dtype=torch.float64) / len(weights_HRS)).cpu().numpy()
    spans = range(begin - interval, chunk - 1, -interval)
    return np.asarray([weights[span : span + chunk].sum() for span in spans])


def chunk_score(config: LadmConfig, focus: np.ndarray, begin: int, num_tokens: int) -> tuple[float, float, float]:
    """AFS of a chunk, and what it is made of: the focus weighted by distance, and the spread."""
    import numpy as np

    distances = np.arange(1, len(focus) + 1) * config.chunk_tokens * config.interval_chunks / num_tokens
    weighted, spread = float(focus @ distances), float(focus.std(ddof=1))
    return weighted * spread * begin / num_tokens, weighted, spread


def measure(config: LadmConfig, loaded: LanguageModel, ids: Sequence[int]) -> dict[str, float]:
    """Score and parts of a sequence of at least `min_tokens`."""
    import numpy as np

    begins = chunk_begins(config, len(ids))
    found: list[tuple[float, float, float]] = []

    def see(layer: LayerAttention) -> None:
        for begin in begins:
            found.append(chunk_score(config, focus_of_spans(config, layer, begin), begin, len(ids)))

    observe_attention(loaded, ids, see)
    score, focus, spread = np.mean(found, axis=0).tolist()
    parts = {"mean_focus": focus, "mean_spread": spread, "num_chunks": len(begins), "num_tokens": len(ids)}
    return {"score": score, **parts}


class LadmScorer:
    """Scores one shard of documents after another."""

    def __init__(self, config: LadmConfig, kind: DocumentKind, model: Path) -> None:
        self._config = config
        self._loaded = load_model(model, dtype=config.dtype, window=config.max_tokens)
        self._reader = DocumentReader(kind, model, min_tokens=config.min_tokens, max_tokens=config.max_tokens)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write `parts`; returns the counts."""
        return score_shard(self._reader, self._measure, ["score", *PARTS], shard, folder)

    def _measure(self, document: ReadDocument) -> dict[str, float]:
        return measure(self._config, self._loaded, document.ids)


def run(config: LadmConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every document. Raises ValueError on bad input, or if no document can be scored."""
    build = partial(LadmScorer, config, document_slot(inputs), inputs["model"])
    tables, counts = map_documents(inputs, context, build)
    write_scores(output, context, tables, parts=PARTS, counts=counts)
