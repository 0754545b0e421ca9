"""What packing gives a long-context model to learn from, measured on finished rows: pure functions.

A pair is two positions of a row of which the later may see the earlier, under the row's attention policy. Positions
hold tokens of documents, and how related two of them are is the cosine of their documents' vectors, cut at 0 (1 within
a document). Both sums over pairs below are exact and take S^2 steps for a row of S segments: with D a distance,

    pairs of segments a before b that are more than D apart = F(end_b - 1 - D - start_a) - F(start_b - 1 - D - start_a)
    F(t) = sum of min(max(u, 0), length_a) over u up to t

`far_potential` is the mean over positions of the related, visible, far part of the row: what attention over a long
distance could use. A row of one long document has about (1 - D/L)^2 / 2; rows of unrelated short documents have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RowMeasures:
    """Of one row. Means have their denominators beside them, so that rows can be added up."""

    num_documents: int
    sum_adjacent: float
    """Sum of cosines of documents that follow each other."""
    num_adjacent: int
    sum_all: float
    """Sum of cosines over all pairs of different documents."""
    num_all: int
    visible_pairs: float
    visible_distance: float
    """Sum of the distances of visible pairs, in tokens."""
    related_pairs: float
    """Visible pairs weighted by how related they are."""
    related_distance: float
    far_potential: float


def measure_row(
    segments: Sequence[Mapping[str, Any]], policy: str, vectors: Mapping[str, np.ndarray], row_tokens: int, far: int
) -> RowMeasures:
    """Measure a row.

    Args:
        segments: Of the row: `doc_id`, `num_tokens`, `row_start`.
        policy: `causal`, `document` or `anchor` (the anchor token is in no segment: as `document`).
        vectors: Unit vector of each document, float `[d]`.
        row_tokens: Length of the row.
        far: Distance in tokens that counts as far.
    """
    import numpy as np

    names = [segment["doc_id"] for segment in segments]
    starts = np.array([segment["row_start"] for segment in segments], np.float64)
    lengths = np.array([segment["num_tokens"] for segment in segments], np.float64)
    cosines = _cosines(names, vectors)
    visible = np.triu(np.ones((len(names), len(names)), bool))
    if policy != "causal":
        runs = np.cumsum([0, *(left != right for left, right in pairwise(names))])
        visible &= runs[:, None] == runs
    pairs = np.where(visible, _pairs_beyond(starts, lengths, 0), 0.0)
    distances = np.where(visible, _sum_of_distances(starts, lengths), 0.0)
    far_pairs = np.where(visible, _pairs_beyond(starts, lengths, far), 0.0)
    weights = np.maximum(cosines, 0.0)
    adjacent = [cosines[i, i + 1] for i in range(len(names) - 1) if names[i] != names[i + 1]]
    distinct = list(dict.fromkeys(names))
    between = _cosines(distinct, vectors)[np.triu_indices(len(distinct), 1)]
    return RowMeasures(
        num_documents=len(distinct),
        sum_adjacent=float(sum(adjacent)),
        num_adjacent=len(adjacent),
        sum_all=float(between.sum()),
        num_all=len(between),
        visible_pairs=float(pairs.sum()),
        visible_distance=float(distances.sum()),
        related_pairs=float((weights * pairs).sum()),
        related_distance=float((weights * distances).sum()),
        far_potential=float((weights * far_pairs).sum()) / row_tokens**2,
    )


def _cosines(names: Sequence[str], vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    import numpy as np

    matrix = np.stack([np.asarray(vectors[name], np.float64) for name in names])
    cosines = matrix @ matrix.T
    same = np.array(names)[:, None] == np.array(names)
    return np.where(same, 1.0, cosines)


def _pairs_beyond(starts: np.ndarray, lengths: np.ndarray, distance: int) -> np.ndarray:
    """float64 `[S, S]`: pairs (j in a, i in b) with i - j > distance, for a in rows and b in columns, a up to b."""
    import numpy as np

    def below(limit: np.ndarray) -> np.ndarray:
        size = lengths[:, None]
        inside = np.clip(limit, 0, size)
        return inside * (inside + 1) / 2 + size * np.maximum(limit - size, 0)

    first = starts[None, :] - 1 - distance - starts[:, None]
    return below(first + lengths[None, :]) - below(first)


def _sum_of_distances(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float64 `[S, S]`: sum of i - j over the pairs (j in a, i in b), a up to b; within a segment those with i > j."""
    import numpy as np

    centres = starts + (lengths - 1) / 2
    between = lengths[:, None] * lengths[None, :] * (centres[None, :] - centres[:, None])
    within = lengths * (lengths - 1) / 2 * (lengths + 1) / 3
    return np.where(np.eye(len(starts), dtype=bool), within, between)
