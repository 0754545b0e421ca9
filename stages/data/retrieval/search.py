"""The work of stage `neighbours` on one cluster: gather its documents, search a range of them, write its lists."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ropewalk.stages.data.retrieval.bags import Bm25Requery, make_bags
from ropewalk.stages.data.retrieval.clusters import Group, divide_by_vector, gather, part_sizes, read_unit_vectors
from ropewalk.stages.data.retrieval.dense import DenseSearch, choose_index, fine_lists, tie_order
from ropewalk.stages.data.retrieval.graph import in_degrees, limit_in_degree, write_bags, write_lists, write_vectors
from ropewalk.stages.data.retrieval.pool import read_bags, read_vectors, vector_column
from ropewalk.stages.data.retrieval.tree import followers, walk_key

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ropewalk.stages.data.retrieval.neighbours import NeighboursConfig

QUERIES_PER_TASK = 8192
SPLIT_BELOW_CLUSTERS = 64
"""With fewer clusters than this the queries of one are shared out too: every worker then opens several clusters."""


class Ready(NamedTuple):
    """A cluster whose documents have been gathered."""

    cluster: int
    num_documents: int
    folder: Path


class Query(NamedTuple):
    """A range of a cluster's documents to search for."""

    ready: Ready
    start: int
    stop: int


def gather_group(config: NeighboursConfig, group: Group, folder: Path) -> dict[str, Any]:
    """Write the ids of each cluster of a group, and its vectors or bags."""
    table = gather(group.parts)
    if config.retriever == "tree":
        return _gather_tree(config, group, table, folder)
    sizes = part_sizes(table.num_rows, config.cluster_documents, halve=True)
    divided: list[Any] = [None]
    if len(sizes) > 1:
        order = tie_order(table.column("doc_id").to_pylist())
        divided = divide_by_vector(read_unit_vectors(table), order, sizes, config.seed)
    gathered = {"num_zero_vectors": 0, "num_terms": 0}
    for cluster, rows in zip(group.clusters, divided, strict=True):
        part = table if rows is None else table.take(rows)
        ids = part.column("doc_id").to_pylist()
        _write_ids(folder, cluster, ids)
        if config.retriever == "bm25":
            bags, _ = make_bags(text.as_py() for text in part.column("text"))
            write_bags(folder, cluster, bags)
            gathered["num_terms"] += len(bags.terms)
        else:
            lists = fine_lists(read_unit_vectors(part), tie_order(ids), config.seed)
            write_vectors(folder, cluster, lists, vector_column(part.column("vector")))
            gathered["num_zero_vectors"] += int((lists < 0).sum())
    return gathered


def _gather_tree(config: NeighboursConfig, group: Group, table: pa.Table, folder: Path) -> dict[str, Any]:
    ids = sorted(table.column("doc_id").to_pylist(), key=walk_key)
    sizes = part_sizes(len(ids), config.cluster_documents, halve=False)
    start = 0
    for cluster, size in zip(group.clusters, sizes, strict=True):
        _write_ids(folder, cluster, ids[start : start + size])
        start += size
    folders = Counter(doc_id.rpartition("/")[0] for doc_id in ids)
    return {"num_folders": len(folders), "largest_folder_documents": max(folders.values())}


def _write_ids(folder: Path, cluster: int, doc_ids: list[str]) -> None:
    (folder / f"ids-{cluster:05d}.json").write_text(json.dumps(doc_ids), encoding="utf-8")


def _read_ids(ready: Ready) -> list[str]:
    return json.loads((ready.folder / f"ids-{ready.cluster:05d}.json").read_text(encoding="utf-8"))


class Searcher:
    """Searches one range of documents after another; keeps the index of the last cluster."""

    def __init__(self, config: NeighboursConfig) -> None:
        self._config = config
        self._opened = -1
        self._search: Any = None

    def __call__(self, query: Query, folder: Path) -> dict[str, Any]:
        """Write the lists of a range as `found.npy` and `scores.npy`."""
        import numpy as np

        if self._opened != query.ready.cluster:
            self._search = None  # Two indexes at once would be twice the memory.
            self._search, self._opened = self._open(query.ready), query.ready.cluster
        found, scores = self._search(query.start, query.stop, self._config.num_neighbours)
        np.save(folder / "found.npy", found)
        np.save(folder / "scores.npy", scores)
        return {}

    def _open(self, ready: Ready) -> Any:
        ids = _read_ids(ready)
        if self._config.retriever == "tree":
            return partial(_range_of_followers, ids)
        if self._config.retriever == "bm25":
            requery = Bm25Requery(read_bags(ready.folder, ready.cluster), tie_order(ids), self._config.max_query_terms)
            return partial(_range_of_requeries, requery, len(ids))
        vectors, lists = read_vectors(ready.folder, ready.cluster)
        kind = choose_index(len(ids), self._config.index)
        return DenseSearch(vectors, lists, tie_order(ids), kind, self._config.num_probes)


def _range_of_followers(doc_ids: Sequence[str], start: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    return followers(doc_ids, range(start, stop), k)


def _range_of_requeries(
    requery: Bm25Requery, num_documents: int, start: int, stop: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    unused = np.ones(num_documents, dtype=bool)
    found = np.full((stop - start, k), -1, dtype=np.int32)
    scores = np.zeros((stop - start, k), dtype=np.float32)
    for document in range(start, stop):
        best, their_scores = requery(document, k, unused)
        found[document - start, : len(best)] = best
        scores[document - start, : len(best)] = their_scores
    return found, scores


def write_cluster(config: NeighboursConfig, searched: tuple[Ready, Sequence[Path]], folder: Path) -> dict[str, Any]:
    """Put the ranges of a cluster together, limit the in-degree, write the lists; returns counts."""
    import numpy as np

    ready, ranges = searched
    ids = _read_ids(ready)
    found = np.concatenate([np.load(path / "found.npy") for path in ranges])
    scores = np.concatenate([np.load(path / "scores.npy") for path in ranges])
    num_found = int((found >= 0).sum())
    if config.max_in_degree is not None:
        limit_in_degree(found, scores, tie_order(ids), config.max_in_degree)
    write_lists(folder, ready.cluster, ids, found, scores)
    degrees = in_degrees(found)
    return {
        "num_found": num_found,
        "num_edges": int((found >= 0).sum()),
        "num_without_neighbours": int((found[:, 0] < 0).sum()),
        "first_scores": float(scores[:, 0].sum(dtype=np.float64)),
        "max_in_degree": int(degrees.max()),
        "in_degrees": dict(Counter(str(int(degree).bit_length()) for degree in degrees)),
        "index": choose_index(len(ids), config.index) if config.retriever == "dense" else config.retriever,
    }


def queries(clusters: Sequence[Ready]) -> Iterator[tuple[str, Query]]:
    """The ranges to search, by name, cluster by cluster."""
    for ready in clusters:
        step = QUERIES_PER_TASK if len(clusters) < SPLIT_BELOW_CLUSTERS else ready.num_documents
        for start in range(0, ready.num_documents, step):
            yield f"{ready.cluster}-{start}", Query(ready, start, min(start + step, ready.num_documents))
