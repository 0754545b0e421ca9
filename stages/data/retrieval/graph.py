"""The lists of neighbours of a cluster as arrays: how they are stored, limited and described.

A popular document, a hub, stands in many lists. It is used early, and those who listed it are left with less. A limit
of its listings (`limit_in_degree`) makes room for others; measured hubness is reported either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.retrieval.bags import Bags
from ropewalk.stages.schema import write_shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def neighbours_schema() -> pa.Schema:
    """Arrow schema of `neighbours-*.parquet`."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("neighbours", pa.list_(pa.int32()), nullable=False),
            pa.field("scores", pa.list_(pa.float32()), nullable=False),
        ]
    )


def bags_schema() -> pa.Schema:
    """Arrow schema of `bags-*.parquet`."""
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.list_(pa.int32()), nullable=False) for name in ("terms", "counts")])


def listed_vectors_schema(num_dimensions: int) -> pa.Schema:
    """Arrow schema of the `vectors-*.parquet` of a neighbours artifact."""
    import pyarrow as pa

    vector = pa.list_(pa.float16(), num_dimensions)
    return pa.schema([pa.field("list", pa.int32(), nullable=False), pa.field("vector", vector, nullable=False)])


def write_lists(folder: Path, cluster: int, doc_ids: Sequence[str], found: np.ndarray, scores: np.ndarray) -> None:
    """Write `neighbours-<cluster>.parquet` of found documents (int32 `[n, k]`, -1 behind the last) and scores."""
    import pyarrow as pa

    given = found >= 0
    lengths = given.sum(axis=1)
    columns = [pa.array(doc_ids, pa.string()), lists(lengths, found[given]), lists(lengths, scores[given])]
    write_shard(folder, "neighbours", cluster, pa.table(columns, schema=neighbours_schema()))


def lists(lengths: np.ndarray, values: np.ndarray) -> Any:
    """A list column of values, so many each."""
    import numpy as np
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] >= 2**31:
        raise ValueError(f"a cluster has {offsets[-1]} list entries, more than 2^31: lower cluster_documents")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def limit_in_degree(found: np.ndarray, scores: np.ndarray, order: np.ndarray, limit: int) -> None:
    """Let each document stand in at most `limit` lists: where it scores best, ties by the id of the list's owner.

    In place; the rest of a list moves up.
    """
    import numpy as np

    owners, places = np.nonzero(found >= 0)
    targets, values = found[owners, places], scores[owners, places]
    ranking = np.lexsort((order[owners], -values, targets))
    starts = np.searchsorted(targets[ranking], targets[ranking], side="left")
    over = ranking[np.arange(len(ranking)) - starts >= limit]
    found[owners[over], places[over]] = -1
    scores[owners[over], places[over]] = 0
    kept_first = np.argsort(found < 0, axis=1, kind="stable")
    found[:] = np.take_along_axis(found, kept_first, axis=1)
    scores[:] = np.take_along_axis(scores, kept_first, axis=1)


def in_degrees(found: np.ndarray) -> np.ndarray:
    """int64 `[n]`: in how many lists each document stands."""
    import numpy as np

    return np.bincount(found[found >= 0], minlength=len(found))


def write_vectors(folder: Path, cluster: int, listed: np.ndarray, vectors: np.ndarray) -> None:
    """Write `vectors-<cluster>.parquet` of fine lists (int32 `[n]`) and vectors (float16 `[n, d]`)."""
    import pyarrow as pa

    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    schema = listed_vectors_schema(vectors.shape[1])
    write_shard(folder, "vectors", cluster, pa.table([pa.array(listed), column], schema=schema))


def write_bags(folder: Path, cluster: int, bags: Bags) -> None:
    """Write `bags-<cluster>.parquet`."""
    import numpy as np
    import pyarrow as pa

    lengths = np.diff(bags.offsets)
    columns = [lists(lengths, bags.terms), lists(lengths, bags.counts)]
    write_shard(folder, "bags", cluster, pa.table(columns, schema=bags_schema()))
