"""Samples in the order of their scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.selection.scores import read_scores

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True)
class RankedSamples:
    """The samples that have a score."""

    ids: pa.ChunkedArray
    scores: np.ndarray
    """float64 [s]."""
    numbers: np.ndarray
    """[s]: which row of the samples' table each is."""
    order: np.ndarray
    """[s]: entries from the best score to the worst, equal scores by id."""


def ranked_samples(ids: pa.ChunkedArray, scores: Path) -> RankedSamples:
    """Join the samples' ids with a Scores artifact; samples without a score are left out.

    Raises ValueError if a score belongs to no sample: then it was made of other samples.
    """
    import numpy as np
    import pyarrow.compute

    pc: Any = pyarrow.compute
    table = read_scores(scores)
    names = table.column("sample_id")
    found = pc.index_in(names, value_set=ids.combine_chunks())
    if found.null_count:
        odd = names.filter(pc.is_null(found))[0].as_py()
        raise ValueError(
            f"slot scores has sample {odd!r}, which slot samples lacks ({found.null_count} of {len(names)}): the "
            "scores are those of other samples"
        )
    values = table.column("score").to_numpy()
    by_id = np.asarray(pc.rank(names, sort_keys="ascending", tiebreaker="first"))
    return RankedSamples(names, values, found.to_numpy().astype(np.int64), np.lexsort((by_id, -values)))
