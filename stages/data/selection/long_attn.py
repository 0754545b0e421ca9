"""Scores documents by the share of attention that goes far back, and how evenly (LongAttn).

Reads `documents` or `tokens`, and `model` (published: the first layer of Llama-3.1-70B; only the layers asked for are
loaded). Writes Scores. Method: Wu et al., "LongAttn: Selecting Long-context Training Data via Token-level Attention",
arXiv 2502.16860; code Lyun0912-wu/LongAttn:src/LongAttn.py and src/DataProcess.py.

A document of L tokens (begin token included) has in a layer and head the attention A [L, L]; with M the matrix that
keeps the entries whose key is at least L - 3 * floor(L / 4) tokens (L/4) before the query,

    dependency = sum of A * M over L                       the share of attention at a distance, mean over tokens
    spread     = variance of A * M over all L * L entries  (n - 1); low where the far attention is even
    score      = min_max(dependency) - spread_weight * min_max(spread)    over the data set

both being means over heads and layers first. Higher is better. Where all documents have equal values, min-max gives
0.5, as published. We differ in that documents are not padded, and L is each one's own length; sums are float64
(published: float16 weights).

The first `max_tokens` of a document are read. Lost: documents below `min_tokens`. Cost: `num_layers` layers, and of
attention weights 9/32 L * L a head. Memory: see `language_model`; a row a document.
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
from ropewalk.stages.data.selection.scales import min_max
from ropewalk.stages.data.selection.scores import check_scores, with_scores, write_scores
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    import numpy as np

NAME = "long_attn"
VERSION = 1
check = check_scores

PARTS = ("dependency", "spread", "num_tokens")


class LongAttnConfig(Record):
    """Which layers are read, and how the two parts make the score."""

    num_layers: int = Field(default=1, ge=1)
    """The first so many layers are loaded and read."""
    spread_weight: float = Field(default=0.5, ge=0)
    """Weight of the spread."""
    clip_percentile: float = Field(default=100.0, gt=0, le=100)
    """Parts are clipped here before min-max; 100 is the published min-max, which one outlier decides."""
    min_tokens: int = Field(default=4, ge=4)
    """Shorter documents are dropped; begin token included."""
    max_tokens: int = Field(default=32_768, ge=4)
    """What is read of a document, begin token included."""
    dtype: Precision = "float32"
    """Of the model's weights and activations."""

    @model_validator(mode="after")
    def _lengths(self) -> LongAttnConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


def far_moments(layer: LayerAttention) -> tuple[np.ndarray, np.ndarray]:
    """Sum and sum of squares of each head's attention at a distance of a quarter of the sequence or more, float64."""
    import torch

    num_tokens = layer.num_tokens
    distance = num_tokens - 3 * (num_tokens // 4)
    sums = torch.zeros(2, len(layer.query_HLD), dtype=torch.float64, device=layer.query_HLD.device)
    for first, weights_HRS in layer.blocks(distance, num_tokens):
        rows = torch.arange(first, first + weights_HRS.shape[1], device=weights_HRS.device)
        near = torch.arange(weights_HRS.shape[2], device=weights_HRS.device) > rows[:, None] - distance
        far_HRS = weights_HRS.masked_fill(near, 0.0)
        sums[0] += far_HRS.sum((1, 2), dtype=torch.float64)
        sums[1] += far_HRS.square().sum((1, 2), dtype=torch.float64)
    found = sums.cpu().numpy()
    return found[0], found[1]


def measure(config: LongAttnConfig, loaded: LanguageModel, ids: Sequence[int]) -> dict[str, float]:
    """The parts of a sequence's score."""
    import numpy as np

    num_entries = len(ids) ** 2
    dependency: list[np.ndarray] = []
    spread: list[np.ndarray] = []

    def see(layer: LayerAttention) -> None:
        total, squares = far_moments(layer)
        dependency.append(total / len(ids))
        spread.append((squares - total**2 / num_entries) / (num_entries - 1))

    observe_attention(loaded, ids, see, layers=range(config.num_layers))
    return {
        "dependency": float(np.mean(dependency)),
        "spread": float(np.mean(spread)),
        "num_tokens": len(ids),
    }


def combine(config: LongAttnConfig, dependency: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """The scores of a data set."""
    near, even = (min_max(values, clip_percentile=config.clip_percentile) for values in (dependency, spread))
    return near - config.spread_weight * even


class LongAttnScorer:
    """Measures one shard of documents after another."""

    def __init__(self, config: LongAttnConfig, kind: DocumentKind, model: Path) -> None:
        self._config = config
        self._loaded = load_model(model, dtype=config.dtype, window=config.max_tokens, num_layers=config.num_layers)
        self._reader = DocumentReader(kind, model, min_tokens=config.min_tokens, max_tokens=config.max_tokens)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
        """Write `parts`; returns the counts."""
        return score_shard(self._reader, self._measure, PARTS, shard, folder)

    def _measure(self, document: ReadDocument) -> dict[str, float]:
        return measure(self._config, self._loaded, document.ids)


def run(config: LongAttnConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Score every document. Raises ValueError on bad input, or if no document can be scored."""
    import pyarrow as pa

    build = partial(LongAttnScorer, config, document_slot(inputs), inputs["model"])
    tables, counts = map_documents(inputs, context, build)
    whole = pa.concat_tables(tables)
    scores = combine(config, whole.column("dependency").to_numpy(), whole.column("spread").to_numpy())
    write_scores(output, context, with_scores(tables, scores), parts=PARTS, counts=counts)
