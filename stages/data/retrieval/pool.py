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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ropewalk.stages.data.retrieval.bags import Bm25Requery
from ropewalk.stages.data.retrieval.dense import (
    REQUERY_PROBES,
    DenseRequery,
    fine_lists,
    nearest,
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
        lists = fine_lists(unit, seed=0)
        found, scores = nearest(unit, lists, order, num_neighbours, "exact", num_probes)
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
    table = _read(folder, "neighbours", cluster)
    doc_ids = table.column("doc_id").to_pylist()
    width = details["num_neighbours"]
    neighbours, scores = _padded(table, "neighbours", width, -1), _padded(table, "scores", width, 0)
    requery = _open_requery(folder, cluster, details["retriever"], doc_ids, num_probes, details.get("max_query_terms"))
    return Pool(doc_ids, neighbours, scores, requery)


def _open_requery(
    folder: Path, cluster: int, retriever: str, doc_ids: list[str], num_probes: int, max_query_terms: int | None
) -> Requery:
    if retriever == "dense":
        table = _read(folder, "vectors", cluster)
        vectors = unit_vectors(vector_column(table.column("vector")))
        return DenseRequery(vectors, table.column("list").to_numpy(), tie_order(doc_ids), num_probes)
    if retriever == "bm25":
        table = _read(folder, "bags", cluster)
        offsets, terms = _lists(table, "terms")
        return Bm25Requery(offsets, terms, _lists(table, "counts")[1], tie_order(doc_ids), max_query_terms)
    if retriever == "tree":
        return TreeRequery(doc_ids)
    raise ValueError(f"{folder / 'artifact.json'}: details.retriever {retriever!r} is none of bm25, dense, tree")


def vector_column(column: pa.ChunkedArray) -> np.ndarray:
    """float16 `[N, D]` of a column of fixed-size lists."""
    import numpy as np

    size = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, size) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.zeros((0, size), dtype=np.float16)


def _read(folder: Path, name: str, cluster: int, columns: list[str] | None = None) -> pa.Table:
    import pyarrow.parquet as pq

    paths = shard_paths(folder, name)
    if not 0 <= cluster < len(paths):
        raise ValueError(f"{folder} has no cluster {cluster}, only 0 to {len(paths) - 1}")
    return pq.read_table(paths[cluster], columns=columns)


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
