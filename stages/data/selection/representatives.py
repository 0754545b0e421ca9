"""Chooses the samples that represent the others, part by part: facility location on workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.context import Context
from ropewalk.stages.data.selection.sample_vectors import SampleVectors
from ropewalk.stages.data.selection.submodular import Similarity, facility_location_order, similarity_kernel
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Part:
    """A run of vectors among which some are chosen."""

    vectors: SampleVectors
    begin: int
    end: int
    budget: int
    """How many to choose; at most the vectors of the run that are not zero."""
    similarity: Similarity


def run_positions(parts: Sequence[np.ndarray], num_samples: int) -> np.ndarray:
    """The places [n] of samples in a file where each part is one run, the parts in order; all are in one part."""
    import numpy as np

    positions = np.empty(num_samples, dtype=np.int64)
    positions[np.concatenate(parts)] = np.arange(num_samples)
    return positions


def choose_representatives(context: Context, parts: Mapping[str, Part]) -> Iterator[tuple[str, np.ndarray]]:
    """By part: the places in its run of the chosen, best first.

    A worker holds one part's vectors and their similarities: 4 bytes times the square of its size.
    """
    import numpy as np

    for shard in map_shards(context, _choose, parts, label="representatives", unit="parts"):
        yield shard.name, np.array(shard.counts["chosen"], dtype=np.int64)


def _choose(part: Part, folder: Path) -> dict[str, Any]:
    import numpy as np

    if part.budget == 0:
        return {"chosen": []}
    units = part.vectors.rows(part.begin, part.end)
    alive = np.flatnonzero(units.any(axis=1))
    if part.budget == len(alive):
        return {"chosen": alive.tolist()}
    chosen, _ = facility_location_order(similarity_kernel(units[alive], part.similarity), part.budget)
    return {"chosen": alive[chosen].tolist()}
