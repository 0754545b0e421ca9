"""Choice by similarity: facility location, graph cut, and a walk that keeps what is unlike everything kept so far.

Sources: facility location f(S) = sum_i max_{j in S} s_ij and graph cut f(S) = sum_i sum_{j in S} s_ij - lambda
sum_{j, k in S} s_jk, maximised greedily as in submodlib (which SMART and Superfiltering call); the walk is DEITA's
(arXiv 2312.15685, algorithm 1). DEITA's code looks at batches and drops a sample that is like an earlier one of its
batch even if that one was itself dropped; the paper compares with what was kept, and so do we.

A similarity matrix is square, so it is only ever made for a part of bounded size (`split_parts`): 8,192 samples are
256 MiB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Similarity = Literal["cosine", "euclidean"]
"""`cosine` of two vectors, -1 to 1; `euclidean`: 1 minus half the distance of the unit vectors, 0 to 1."""

_BLOCK = 256  # Samples that are walked over at a time.
_CHUNK = 2048  # Kept vectors that are compared at a time.


def unit_vectors(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, d] scaled to length 1, as float32, and their lengths. Zero rows stay zero."""
    import numpy as np

    from ropewalk.stages.data.compiled.submodular import unit_rows

    units = np.array(vectors, dtype=np.float32, order="C")
    lengths = np.zeros(len(units))
    unit_rows(units, lengths)
    return units, lengths


def similarity_kernel(units: np.ndarray, similarity: Similarity) -> np.ndarray:
    """All similarities [n, n] of unit vectors, float32 and symmetric to the bit.

    submodlib's Euclidean similarity is exp(-distance / d). For distances of at most 2 and hundreds of dimensions that
    is a straight line to within one part in d, so the line itself is used; it orders candidates alike, and depends on
    neither d nor the machine's exp.
    """
    import numpy as np

    cosines = cross_similarities(units, units)
    if similarity == "cosine":
        return cosines
    return np.float32(1) - np.sqrt(np.maximum(np.float32(2) - 2 * cosines, np.float32(0))) / np.float32(2)


def cross_similarities(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines [a, b] of unit vectors [a, d] and [b, d]."""
    import numpy as np

    return _cosines(rows, np.ascontiguousarray(others.T))


def _cosines(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    import numpy as np

    from ropewalk.stages.data.compiled.submodular import products

    out = np.empty((len(rows), columns.shape[1]), dtype=np.float32)
    products(rows, columns, out)
    return out


def facility_location_order(kernel: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """The `budget` samples that represent all others best, greedily, best first, and their gains."""
    from ropewalk.stages.data.compiled.submodular import facility_location

    chosen, gains, _ = facility_location(kernel, _checked(budget, kernel))
    return chosen, gains


def graph_cut_order(kernel: np.ndarray, budget: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """The `budget` entries that are like all and unlike each other, greedily, best first, and their gains."""
    from ropewalk.stages.data.compiled.submodular import graph_cut

    return graph_cut(kernel, _checked(budget, kernel), penalty)


def _checked(budget: int, kernel: np.ndarray) -> int:
    if not 0 <= budget <= len(kernel):
        raise ValueError(f"{budget} of {len(kernel)} cannot be chosen")
    return budget


def distinct_order(blocks: Iterable[np.ndarray], limit: float, budget: int) -> tuple[list[int], int]:
    """Walk over unit vectors, best sample first, and keep each whose cosine to all kept is at most `limit`.

    Args:
        blocks: The vectors, [a, d] at a time.
        limit: The largest cosine allowed.
        budget: The walk ends when so many are kept.

    Returns the numbers of the kept in order, and how many samples were walked over. Time: samples walked times kept
    times d; memory: the vectors of the kept and one block.
    """
    import numpy as np

    from ropewalk.stages.data.compiled.submodular import keep_distinct

    kept: list[int] = []
    columns: list[np.ndarray] = []
    walked = 0
    for block in (piece for whole in blocks for piece in _pieces(whole)):
        dropped = np.zeros(len(block), dtype=np.bool_)
        for earlier in columns:
            dropped |= (_cosines(block, earlier) > np.float32(limit)).any(axis=1)
        similar = cross_similarities(block, block)
        seen = keep_distinct(similar, dropped, float(np.float32(limit)), budget - len(kept))
        fresh = np.flatnonzero(~dropped[:seen])
        kept.extend((walked + fresh).tolist())
        _append_columns(columns, block[fresh])
        walked += seen
        if len(kept) == budget:
            break
    return kept, walked


def _append_columns(chunks: list[np.ndarray], rows: np.ndarray) -> None:
    """Add rows to chunks [d, b] of vectors that stand as columns, the last of which grows up to a bound."""
    import numpy as np

    if chunks and chunks[-1].shape[1] < _CHUNK:
        chunks[-1] = np.ascontiguousarray(np.concatenate([chunks[-1], rows.T], axis=1))
    elif len(rows):
        chunks.append(np.ascontiguousarray(rows.T))


def _pieces(block: np.ndarray) -> Iterable[np.ndarray]:
    return (block[begin : begin + _BLOCK] for begin in range(0, len(block), _BLOCK))


def split_parts(ids: Sequence[str], limit: int) -> list[np.ndarray]:
    """Cut samples into the fewest parts of at most `limit`, of sizes that differ by one, in an order drawn by id.

    Returns the numbers of each part, ascending. The order is by the ids' hashes, so that a part is a fair sample of
    the whole whatever the order of the table is.
    """
    import numpy as np

    num_parts = max(1, -(-len(ids) // limit))
    if num_parts == 1:
        return [np.arange(len(ids))]
    order = sorted(range(len(ids)), key=lambda number: (hashlib.sha256(ids[number].encode()).digest(), number))
    return [np.sort(part) for part in np.array_split(np.array(order), num_parts)]
