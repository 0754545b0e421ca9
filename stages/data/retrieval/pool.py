"""The neighbours artifact, read: which documents are like which, one pool of documents a coarse cluster.

    neighbours-<cluster>.parquet   `doc_id`, `neighbours` (list<int32>: row numbers in the same shard, best first, never
                                   itself, ties by doc_id), `scores` (list<float32>)
    vectors-<cluster>.parquet      retriever `dense`, same rows: `list` (int32, -1: a vector of zeros), `vector`
    bags-<cluster>.parquet         retriever `bm25`, same rows: `terms` (list<int32>, ascending), `counts` (list<int32>)

The rows of retriever `tree` are in the depth-first order of the directory tree. Clusters are numbered from the largest
to the smallest, which is the order to work them off in. A method walks the lists of neighbours; where all of a list are
used, it asks anew among the unused (`Pool.requery`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ropewalk.stages.data.retrieval.bags import Bags, Bm25Requery
from ropewalk.stages.data.retrieval.dense import (
    REQUERY_PROBES,
    DenseRequery,
    DenseSearch,
    fine_lists,
    tie_order,
    unit_vectors,
)
from ropewalk.stages.data.retrieval.tree import TreeRequery
from ropewalk.stages.schema import read_artifact, shard_paths

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


class Requery(Protocol):
    """Asks a cluster anew, among the documents that are still unused."""

    def __call__(self, document: int, k: int, unused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The k best documents of which `unused` (bool `[n]`) is true, never `document` itself.

        Numbers (int64) and scores (float32), best first, ties by doc_id; fewer, or none, if no more are related. A
        document may become unused again.
        """
        ...

    def similarity(self, one: int, other: int) -> float:
        """How alike two documents are, 1 at most: cosine, or 1 / (1 + distance) in a tree."""
        ...


@dataclass(frozen=True)
class Pool:
    """The n documents of a cluster, numbered by their rows."""

    doc_ids: list[str]
    neighbours: np.ndarray
    """int32 `[n, k']`: numbers, best first, -1 behind the last."""
    scores: np.ndarray
    """float32 `[n, k']`, 0 behind the last."""
    requery: Requery

    @classmethod
    def from_vectors(
        cls, doc_ids: Sequence[str], vectors: np.ndarray, num_neighbours: int, *, num_probes: int = REQUERY_PROBES
    ) -> Pool:
        """A pool in memory, with the exact neighbours by cosine of `vectors` (`[n, d]`)."""
        unit, order = unit_vectors(vectors), tie_order(doc_ids)
        lists = fine_lists(unit, order, seed=0)
        found, scores = DenseSearch(unit, lists, order, "exact", num_probes)(0, len(unit), num_neighbours)
        return cls(list(doc_ids), found, scores, DenseRequery(unit, lists, order, num_probes))

    def similarity(self, one: int, other: int) -> float:
        """How alike two documents are; see `Requery`."""
        return self.requery.similarity(one, other)


def num_clusters(folder: Path) -> int:
    """How many clusters a neighbours artifact has."""
    read_artifact(folder, "neighbours")
    return len(shard_paths(folder, "neighbours"))


def cluster_doc_ids(folder: Path, cluster: int) -> list[str]:
    """The ids of a cluster's documents, by number."""
    return _read(folder, "neighbours", cluster, ["doc_id"]).column("doc_id").to_pylist()


def open_pool(folder: Path, cluster: int, *, num_probes: int = REQUERY_PROBES) -> Pool:
    """A cluster of a neighbours artifact; a dense re-query scans `num_probes` fine lists, or more if these run dry.

    Raises ValueError if the folder is no neighbours artifact or its retriever is unknown.
    """
    details = read_artifact(folder, "neighbours").details
    doc_ids, neighbours, scores = read_lists(folder, cluster, details["num_neighbours"])
    requery = open_requery(folder, cluster, details, doc_ids, num_probes)
    return Pool(doc_ids, neighbours, scores, requery)


def read_lists(folder: Path, cluster: int, width: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The ids, neighbours and scores of a cluster, as in `Pool`; `width` is the k' of the artifact."""
    table = _read(folder, "neighbours", cluster)
    neighbours, scores = _padded(table, "neighbours", width, -1), _padded(table, "scores", width, 0)
    return table.column("doc_id").to_pylist(), neighbours, scores


def open_requery(
    folder: Path, cluster: int, details: Mapping[str, Any], doc_ids: Sequence[str], num_probes: int
) -> Requery:
    """What re-asks a cluster, from the shard beside its neighbours; `details` are those of the artifact."""
    retriever = details["retriever"]
    if retriever == "dense":
        return DenseRequery(*read_vectors(folder, cluster), tie_order(doc_ids), num_probes)
    if retriever == "bm25":
        return Bm25Requery(read_bags(folder, cluster), tie_order(doc_ids), details.get("max_query_terms"))
    if retriever == "tree":
        return TreeRequery(doc_ids)
    raise ValueError(f"{folder / 'artifact.json'}: details.retriever {retriever!r} is none of bm25, dense, tree")


def read_vectors(folder: Path, cluster: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a cluster, of length 1, and their fine lists."""
    table = _read(folder, "vectors", cluster)
    return unit_vectors(vector_column(table.column("vector"))), table.column("list").to_numpy()


def read_bags(folder: Path, cluster: int) -> Bags:
    """The terms of a cluster."""
    table = _read(folder, "bags", cluster)
    offsets, terms = _lists(table, "terms")
    return Bags(offsets, terms, _lists(table, "counts")[1])


def vector_column(column: pa.ChunkedArray) -> np.ndarray:
    """float16 `[N, D]` of a column of fixed-size lists."""
    import numpy as np

    size = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, size) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, size), dtype=np.float16)


def _read(folder: Path, name: str, cluster: int, columns: list[str] | None = None) -> pa.Table:
    import pyarrow.parquet as pq

    path = folder / f"{name}-{cluster:05d}.parquet"
    if not path.is_file():
        raise ValueError(f"{folder} has no cluster {cluster}: {path.name} is missing")
    return pq.read_table(path, columns=columns)


def _lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each list of a column begins (int64 `[n + 1]`), and the values of all."""
    import numpy as np

    column = table.column(name).combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), column.flatten().to_numpy()


def _padded(table: pa.Table, name: str, width: int, filler: int) -> np.ndarray:
    import numpy as np

    offsets, values = _lists(table, name)
    lengths = np.diff(offsets)
    result = np.full((len(lengths), width), filler, dtype=values.dtype)
    result[np.arange(width) < lengths[:, None]] = values
    return result
