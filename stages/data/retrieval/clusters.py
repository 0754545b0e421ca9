"""Divides a corpus into coarse clusters that fit one worker, by vectors or by folders.

By vectors: k-means of a sample gives fine cells, and a second k-means, of their centroids, groups these into coarse
clusters, about two for each `cluster_documents` documents, as cluster sizes differ by a factor of two to five
(shared/specs/data.md 7.1). Every document goes to the nearest cell, and so to its cluster: borders then run between
cells, and cut through fewer neighbourhoods than those of a single k-means do. A cluster that is larger than
`cluster_documents` is halved until its parts fit: along the line between its two centres, at the median, so that the
number and the sizes of all parts follow from the counts alone. Empty clusters are dropped. The sample is drawn by a
hash of the ids, so the cells do not depend on the order of the documents.

By folders: documents are counted by source and first folder; neighbouring folders, in the order of the walk, share a
cluster while they fit. A larger folder is cut into slices of the walk.

Documents then move to their cluster in two phases, so that nobody holds more than a shard or a cluster: each shard is
written once more, divided by cluster (`spread`); each cluster collects its parts from all shards, in their order
(`gather`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ropewalk.stages.data.retrieval.dense import assign, train_centroids, unit_vectors, zero_rows
from ropewalk.stages.data.retrieval.pool import vector_column

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_SAMPLES_PER_CENTROID = 256
_CELLS_PER_CLUSTER = 8
_SPREAD = "spread.arrow"


class Shard(NamedTuple):
    """A shard of the corpus, from one slot or two."""

    documents: Path | None
    vectors: Path | None
    columns: tuple[str, ...]
    """What to move to the clusters."""


class Part(NamedTuple):
    """What a shard has of a group."""

    path: Path
    batch: int
    """Number of the record batch in the file."""


class Group(NamedTuple):
    """A coarse cluster as it was assigned, and the clusters that it is divided into."""

    clusters: tuple[int, ...]
    """Their numbers."""
    parts: tuple[Part, ...]
    """In the order of the shards."""


def num_centroids(num_documents: int, cluster_documents: int) -> int:
    """How many coarse centroids a corpus gets."""
    return 1 if num_documents <= cluster_documents else -(-2 * num_documents // cluster_documents)


def read_shard(shard: Shard, columns: Sequence[str]) -> pa.Table:
    """Columns of a shard, from whichever slot has them. Raises ValueError if its slots disagree in the ids."""
    import pyarrow.parquet as pq

    tables = {
        slot: pq.read_table(path, columns=["doc_id", *(name for name in columns if (name == "vector") == is_vectors)])
        for slot, path, is_vectors in (("documents", shard.documents, False), ("vectors", shard.vectors, True))
        if path is not None
    }
    first, *others = tables.values()
    for other in others:
        _compare_ids(first.column("doc_id").to_pylist(), other.column("doc_id").to_pylist(), shard)
        for name in set(other.column_names) - {"doc_id"}:
            first = first.append_column(name, other.column(name))
    return first.select(["doc_id", *columns])


def _compare_ids(documents: list[str], vectors: list[str], shard: Shard) -> None:
    if documents == vectors:
        return
    missing = next(iter([name for name in documents if name not in set(vectors)]), None)
    where = shard.vectors.name if shard.vectors else ""
    if missing is not None:
        raise ValueError(f"slot vectors is of another corpus: {where} lacks {missing!r} of slot documents")
    number = next((n for n, (one, other) in enumerate(zip(documents, vectors, strict=False)) if one != other), None)
    named = repr(vectors[len(documents) if number is None else number])
    raise ValueError(f"slot vectors is of another corpus: {where} has {named} where slot documents has not")


def read_unit_vectors(table: pa.Table) -> np.ndarray:
    """The column `vector`, each of length 1. Raises ValueError naming the document if one is not finite."""
    import numpy as np

    vectors = vector_column(table.column("vector"))
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        doc_id = table.column("doc_id")[int(finite.argmin())].as_py()
        raise ValueError(f"slot vectors: the vector of document {doc_id!r} holds NaN or infinity")
    return unit_vectors(vectors)


def sample_shard(fraction: float, shard: Shard, folder: Path) -> dict[str, int]:
    """Write the vectors of a fraction of a shard, chosen by a hash of their ids, and the hashes."""
    import numpy as np

    table = read_shard(shard, ["vector"])
    vectors = read_unit_vectors(table)
    ids = table.column("doc_id").to_pylist()
    hashes = np.frombuffer(b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids), "<u8")
    chosen = (hashes < min(fraction, 1.0) * 2.0**64) & ~zero_rows(vectors)
    np.save(folder / "hashes.npy", hashes[chosen])
    np.save(folder / "vectors.npy", vectors[chosen])
    return {"num_sampled": int(chosen.sum())}


def sample_fraction(num_documents: int, number: int) -> float:
    """Which fraction of the documents trains so many centroids."""
    return number * _SAMPLES_PER_CENTROID / num_documents


def train_on_samples(folders: Sequence[Path], number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids of the fine cells, float32 `[C, D]`, and the coarse cluster of each, int32 `[C]`, below `number`.

    Trained on what `sample_shard` wrote. Raises ValueError if there are too few vectors.
    """
    import numpy as np

    hashes = np.concatenate([np.load(folder / "hashes.npy") for folder in folders])
    order = np.argsort(hashes, kind="stable")
    vectors = np.concatenate([np.load(folder / "vectors.npy") for folder in folders])[order]
    if len(vectors) < number:
        raise ValueError(f"slot vectors has only {len(vectors)} vectors that are not zeros, for {number} clusters")
    cells = unit_vectors(train_centroids(vectors, min(number * _CELLS_PER_CLUSTER, len(vectors)), seed))
    return cells, assign(cells, train_centroids(cells, number, seed))


class SpreadByVector:
    """Divides one shard after another by the nearest cell; None: all documents are one cluster."""

    def __init__(self, folder: Path | None) -> None:
        import numpy as np

        self._cells = None if folder is None else np.load(folder / "cells.npy")
        self._clusters = np.zeros(1, np.int32) if folder is None else np.load(folder / "clusters.npy")

    def __call__(self, shard: Shard, folder: Path) -> dict[str, Any]:
        """Write the shard, divided; returns the `sizes` of all groups."""
        import numpy as np

        needed = self._cells is not None and "vector" not in shard.columns
        table = read_shard(shard, [*shard.columns, *(["vector"] if needed else [])])
        if self._cells is None:
            return write_spread(folder, table, np.zeros(table.num_rows, dtype=np.int32), 1)
        groups = self._clusters[assign(read_unit_vectors(table), self._cells)]
        return write_spread(folder, table, groups, int(self._clusters.max()) + 1)


def count_folders(shard: Shard, folder: Path) -> dict[str, Any]:
    """Count the documents of a shard by source and first folder."""
    ids = read_shard(shard, []).column("doc_id").to_pylist()
    return {"folders": dict(Counter(top_folder(doc_id) for doc_id in ids))}


def top_folder(doc_id: str) -> str:
    """Source and first folder of a document; the source alone for a file that is in none."""
    return "/".join(doc_id.split("/")[:-1][:2])


def group_folders(folders: Counter[str], cluster_documents: int) -> list[str]:
    """The first folder of each group, in the order of the walk."""
    starts: list[str] = []
    filled = 0
    for folder in sorted(folders, key=_walk_order):
        if not starts or filled + folders[folder] > cluster_documents:
            starts.append(folder)
            filled = 0
        filled += folders[folder]
    return starts


def _walk_order(folder: str) -> list[str]:
    return folder.split("/")


class SpreadByFolder:
    """Divides one shard after another by the groups of `group_folders`."""

    def __init__(self, starts: Sequence[str]) -> None:
        self._starts = [_walk_order(start) for start in starts]

    def __call__(self, shard: Shard, folder: Path) -> dict[str, Any]:
        """Write the shard, divided; returns the `sizes` of all groups."""
        import numpy as np

        table = read_shard(shard, shard.columns)
        tops = (top_folder(doc_id) for doc_id in table.column("doc_id").to_pylist())
        groups = [bisect_right(self._starts, _walk_order(top)) - 1 for top in tops]
        return write_spread(folder, table, np.asarray(groups, dtype=np.int32), len(self._starts))


def write_spread(folder: Path, table: pa.Table, groups: np.ndarray, num_groups: int) -> dict[str, Any]:
    """Write a shard with one record batch for each group that it has documents of; their order stays."""
    import numpy as np
    import pyarrow as pa

    # Texts of a shard may exceed the 2 GiB of a string column.
    large = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in table.schema]
    table = table.cast(pa.schema(large))
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=num_groups)
    ends = np.cumsum(sizes)
    with pa.OSFile(str(folder / _SPREAD), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        for begin, end in pairwise([0, *ends.tolist()]):
            if begin < end:
                writer.write_table(table.take(order[begin:end]).combine_chunks())
    return {"sizes": sizes.tolist()}


def plan_groups(
    spreads: Sequence[tuple[Path, Sequence[int]]], cluster_documents: int, *, halve: bool
) -> tuple[list[Group], list[int]]:
    """Number the clusters, the largest first, ties in the order of the groups.

    Args:
        spreads: Of every shard, in order: its folder, and the `sizes` that `write_spread` returned.
        cluster_documents: Most documents of a cluster.
        halve: Divide larger groups by halving, else into slices.
    Returns the groups that have documents, and the size of every cluster.
    """
    totals = [sum(group) for group in zip(*(sizes for _, sizes in spreads), strict=True)]
    divided = [part_sizes(total, cluster_documents, halve=halve) for total in totals]
    places = [(-size, group, part) for group, sizes in enumerate(divided) for part, size in enumerate(sizes)]
    numbers = {(group, part): number for number, (_, group, part) in enumerate(sorted(places))}
    parts: list[list[Part]] = [[] for _ in totals]
    for folder, sizes in spreads:
        present = [group for group, size in enumerate(sizes) if size]
        for batch, group in enumerate(present):
            parts[group].append(Part(folder / _SPREAD, batch))
    groups = [
        Group(tuple(numbers[group, part] for part in range(len(divided[group]))), tuple(parts[group]))
        for group, total in enumerate(totals)
        if total
    ]
    return groups, [-size for size, _, _ in sorted(places)]


def part_sizes(num_documents: int, cluster_documents: int, *, halve: bool) -> list[int]:
    """The sizes of the parts of a group, none of them over `cluster_documents`."""
    if not num_documents:
        return []
    num_parts = -(-num_documents // cluster_documents)
    if halve:
        return _halves(num_documents, (num_parts - 1).bit_length())
    cuts = [num_documents * part // num_parts for part in range(num_parts + 1)]
    return [end - begin for begin, end in pairwise(cuts)]


def _halves(num_documents: int, depth: int) -> list[int]:
    if not depth:
        return [num_documents]
    first = num_documents // 2
    return [*_halves(first, depth - 1), *_halves(num_documents - first, depth - 1)]


def divide_by_vector(vectors: np.ndarray, order: np.ndarray, sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """Rows (ascending) of the parts of a group, with the sizes that `part_sizes` gave; `order` as of `tie_order`."""
    import numpy as np

    # By id, so that the parts do not depend on the order of the corpus.
    return [np.sort(rows) for rows in _divide(vectors, np.argsort(order), list(sizes), seed)]


def _divide(vectors: np.ndarray, rows: np.ndarray, sizes: list[int], seed: int) -> list[np.ndarray]:
    import numpy as np

    from ropewalk.stages.data.compiled.retrieval import products_with

    if len(sizes) == 1:
        return [rows]
    centroids = train_centroids(vectors[rows], 2, seed)
    products = np.empty(len(rows), dtype=np.float32)
    products_with(vectors[rows], centroids[1] - centroids[0], products)
    ranking = np.argsort(products, kind="stable")
    half = len(sizes) // 2
    first, second = np.split(ranking, [sum(sizes[:half])])
    return [
        *_divide(vectors, rows[np.sort(first)], sizes[:half], seed),
        *_divide(vectors, rows[np.sort(second)], sizes[half:], seed),
    ]


def gather(parts: Sequence[Part]) -> pa.Table:
    """What all shards have of a group, in their order. Raises ValueError if an id occurs twice."""
    import pyarrow as pa

    table = pa.Table.from_batches([_read_part(part) for part in parts])
    ids = table.column("doc_id").to_pylist()
    if len(set(ids)) < len(ids):
        twice = next(name for name, times in Counter(ids).items() if times > 1)
        raise ValueError(f"document id {twice!r} occurs twice")
    return table


def _read_part(part: Part) -> pa.RecordBatch:
    import pyarrow as pa

    # Mapped: only the pages of this group are read.
    return pa.ipc.open_file(pa.memory_map(str(part.path))).get_batch(part.batch)
