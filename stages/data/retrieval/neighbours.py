"""Finds which documents are like which: the neighbour graph that every packing method walks.

Reads   retriever `dense`: `vectors` (from stage `embed`, or any Vectors); `documents` too, if it is to be checked that
        both are of the same corpus.
        retriever `bm25`: `documents`; `vectors` of the same documents, by which a corpus of more than
        `cluster_documents` is divided.
        retriever `tree`: `documents`, whose ids are paths.
Writes  one shard a coarse cluster, as `ropewalk.stages.data.retrieval.pool` describes and reads them.
Loses   neighbours across clusters, those that `max_in_degree` denies (counted), and those that an approximate index
        overlooks. No document.

The retrievers are those of SPLiCe (arXiv 2312.17296): BM25 over whole documents, an encoder with inner product, and the
tree of a repository. Clusters, and BM25 within clusters, are the plan of shared/specs/data.md 7.1 to 7.3: divided by
likeness, 256 clusters cost next to no quality, divided by file they cost a fourth of it.

Work goes in phases, each cut by shard, cluster or range of queries, so that the bits do not depend on who does it:
train the centroids, spread the shards, gather the clusters, search, and limit and write the lists. Rows keep the order
of the corpus (`tree`: of the walk). Memory: a shard or a cluster a worker; a coarse cluster before it is divided, which
may be several times `cluster_documents`. Scratch: one copy of what is read.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.retrieval.checks import check_neighbours
from ropewalk.stages.data.retrieval.clusters import (
    Shard,
    SpreadByFolder,
    SpreadByVector,
    count_folders,
    group_folders,
    num_centroids,
    plan_groups,
    sample_fraction,
    sample_shard,
    train_on_samples,
)
from ropewalk.stages.data.retrieval.search import Ready, Searcher, gather_group, queries, write_cluster
from ropewalk.stages.schema import Artifact, Record, iterate_table, read_artifact, shard_paths, write_artifact
from ropewalk.stages.shards import Shard as Finished
from ropewalk.stages.shards import map_shards

NAME = "neighbours"
VERSION = 1
check = check_neighbours

_COMPANION = {"dense": "vectors", "bm25": "bags"}


class NeighboursConfig(Record):
    """What is near, and how hard to look."""

    retriever: Literal["bm25", "dense", "tree"]
    """Lexical, by vectors, or by the order of the directory tree."""
    num_neighbours: int = Field(default=32, ge=1)
    """Length of each list. Methods need far more than the k they use: the nearest are soon used."""
    cluster_documents: int = Field(default=100_000, ge=2)
    """Most documents of a cluster. A smaller corpus is one cluster; this bounds the memory of a worker."""
    index: Literal["auto", "exact", "ivf", "ivfpq"] = "auto"
    """How `dense` searches a cluster: all pairs; inverted lists; these with product quantisation, re-ranked by the
    vectors. `auto`: by size. Clusters under 1,024 documents are always searched exactly."""
    num_probes: int = Field(default=16, ge=1)
    """Inverted lists that `ivf` and `ivfpq` look into, of about the square root of the cluster's documents."""
    max_query_terms: int | None = Field(default=None, ge=1)
    """`bm25` asks with so many terms of a document, the strongest by tf-idf. None: with all, the paper's way."""
    max_in_degree: int | None = Field(default=None, ge=1)
    """A document stands in at most so many lists, those where it scores best. None: no limit."""
    seed: int = 0
    """Of all k-means."""


def _corpus(config: NeighboursConfig, inputs: Mapping[str, Path]) -> tuple[list[Shard], int]:
    """The shards of the corpus, by pairs where two slots are given, and the number of its documents."""
    import pyarrow.parquet as pq

    needed = "vectors" if config.retriever == "dense" else "documents"
    if needed not in inputs:
        raise ValueError(f"neighbours: retriever {config.retriever!r} needs an input slot `{needed}`")
    slots: dict[str, list[Path | None]] = {"documents": [], "vectors": []}
    for slot in slots:
        if slot in inputs and (slot == needed or config.retriever != "tree"):
            read_artifact(inputs[slot], slot)  # pyright: ignore[reportArgumentType]
            slots[slot] = [*shard_paths(inputs[slot], slot)]
    counted = slots[needed]
    num_documents = sum(pq.read_metadata(path).num_rows for path in counted if path is not None)
    if not num_documents:
        raise ValueError(f"slot {needed} is empty: there is nothing to find neighbours of")
    if len(slots["documents"]) != len(slots["vectors"]) and all(slots.values()):
        _report_other_shards(inputs)
    pairs = zip(*(slots[slot] or [None] * len(counted) for slot in slots), strict=True)
    columns = {"dense": ("vector",), "bm25": ("text",), "tree": ()}[config.retriever]
    if config.retriever == "bm25" and num_documents > config.cluster_documents:
        if not slots["vectors"]:
            raise ValueError(
                f"slot documents has {num_documents} documents, cluster_documents is {config.cluster_documents}: give "
                "bm25 a slot `vectors` (stage embed) to divide them by, or raise cluster_documents"
            )
        columns = ("text", "vector")
    return [Shard(documents, vectors, columns) for documents, vectors in pairs], num_documents


def _report_other_shards(inputs: Mapping[str, Path]) -> None:
    ids = {
        slot: [name for batch in iterate_table(inputs[slot], slot, ["doc_id"]) for name in batch.column(0).to_pylist()]
        for slot in ("documents", "vectors")
    }
    missing = sorted(set(ids["documents"]) ^ set(ids["vectors"]))
    named = f", as {missing[0]!r} shows, which only one of them has" if missing else ""
    raise ValueError(f"slot vectors is not of the documents of slot documents{named}: embed these documents")


def _spread(
    config: NeighboursConfig, shards: Mapping[str, Shard], num_documents: int, context: Context
) -> list[Finished]:
    """Divide every shard by coarse cluster."""
    if config.retriever == "tree":
        folders: Counter[str] = Counter()
        for shard in map_shards(context, count_folders, shards, label="folders", unit="shards counted"):
            folders.update(shard.counts["folders"])
        divide: Any = partial(SpreadByFolder, group_folders(folders, config.cluster_documents))
    else:
        number = num_centroids(num_documents, config.cluster_documents)
        divide = partial(SpreadByVector, None)
        if number > 1:
            divide = partial(SpreadByVector, _train(config, shards, num_documents, number, context))
    return list(map_shards(context, divide, shards, label="spread", unit="shards spread"))


def _train(
    config: NeighboursConfig, shards: Mapping[str, Shard], num_documents: int, number: int, context: Context
) -> Path:
    import numpy as np

    sample = partial(sample_shard, sample_fraction(num_documents, number))
    sampled = list(map_shards(context, sample, shards, label="sample", unit="shards sampled"))
    cells, clusters = train_on_samples([shard.folder for shard in sampled], number, config.seed)
    folder = context.work / f"cells-{uuid.uuid4().hex}"
    folder.mkdir()
    np.save(folder / "cells.npy", cells)
    np.save(folder / "clusters.npy", clusters)
    return folder


def _gather(
    config: NeighboursConfig, spreads: Sequence[Finished], context: Context
) -> tuple[list[Ready], dict[str, int]]:
    """The clusters by number, and what was counted in gathering."""
    parts = [(shard.folder, shard.counts["sizes"]) for shard in spreads]
    groups, sizes = plan_groups(parts, config.cluster_documents, halve=config.retriever != "tree")
    items = {str(number): group for number, group in enumerate(groups)}
    ready: list[Ready] = []
    gathered: Counter[str] = Counter()
    work = map_shards(context, partial(gather_group, config), items, label="gather", unit="coarse clusters gathered")
    for group, shard in zip(groups, work, strict=True):
        ready += [Ready(cluster, sizes[cluster], shard.folder) for cluster in group.clusters]
        largest = max(gathered["largest_folder_documents"], shard.counts.get("largest_folder_documents", 0))
        gathered.update(shard.counts)
        gathered["largest_folder_documents"] = largest
    if config.retriever == "bm25" and not gathered["num_terms"]:
        raise ValueError("slot documents holds no word of two letters or digits to retrieve by")
    return sorted(ready), dict(gathered)


def _search(config: NeighboursConfig, clusters: Sequence[Ready], context: Context) -> list[Finished]:
    """The finished clusters, by number."""
    items = dict(queries(clusters))
    ranges: dict[int, list[Path]] = {ready.cluster: [] for ready in clusters}
    searched = map_shards(context, partial(Searcher, config), items, label="search", unit="searches")
    for query, shard in zip(items.values(), searched, strict=True):
        ranges[query.ready.cluster].append(shard.folder)
    work = {str(ready.cluster): (ready, ranges[ready.cluster]) for ready in clusters}
    return list(map_shards(context, partial(write_cluster, config), work, label="write", unit="clusters"))


def _details(
    config: NeighboursConfig, clusters: Sequence[Ready], gathered: Mapping[str, int], written: Sequence[Finished]
) -> dict[str, Any]:
    sizes = [ready.num_documents for ready in clusters]
    degrees: Counter[int] = Counter()
    for shard in written:
        degrees.update({int(bits): number for bits, number in shard.counts["in_degrees"].items()})
    details: dict[str, Any] = {
        "retriever": config.retriever,
        "num_clusters": len(clusters),
        "num_neighbours": config.num_neighbours,
        "cluster_documents": {"largest": sizes[0], "median": sizes[len(sizes) // 2], "smallest": sizes[-1]},
        "clusters_by_index": dict(Counter(shard.counts["index"] for shard in written)),
        "mean_first_score": round(sum(shard.counts["first_scores"] for shard in written) / sum(sizes), 6),
        "max_in_degree": max(shard.counts["max_in_degree"] for shard in written),
        "documents_by_in_degree": [
            {"from": 2**bits // 2, "to": max(0, 2**bits - 1), "num_documents": degrees[bits]}
            for bits in sorted(degrees)
        ],
    }
    if config.retriever == "bm25":
        details["max_query_terms"] = config.max_query_terms
    if config.retriever == "tree":
        details["num_folders"] = gathered["num_folders"]
        # Near 1: a flat directory, whose order says nothing.
        details["largest_folder_fraction"] = round(gathered["largest_folder_documents"] / sum(sizes), 6)
    return details


def run(config: NeighboursConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the neighbour graph. Raises ValueError on bad input."""
    started = time.perf_counter()
    corpus, num_documents = _corpus(config, inputs)
    shards = {str(number): shard for number, shard in enumerate(corpus)}
    clusters, gathered = _gather(config, _spread(config, shards, num_documents, context), context)
    prepared = time.perf_counter()
    written = _search(config, clusters, context)
    for ready, shard in zip(clusters, written, strict=True):
        shard.link_into(output.data)
        if companion := _COMPANION.get(config.retriever):
            name = f"{companion}-{ready.cluster:05d}.parquet"
            os.link(ready.folder / name, output.data / name)
    details = _details(config, clusters, gathered, written)
    if config.retriever == "dense":
        details["num_dimensions"] = _num_dimensions(output.data)
    counts = _counts(num_documents, clusters, gathered, written)
    write_artifact(output.data, Artifact(kind="neighbours", counts=counts, details=details))
    _write_observed(output.observed, details, num_documents, started, prepared)
    context.log({**counts, "num_clusters": len(clusters), "mean_first_score": details["mean_first_score"]})


def _num_dimensions(folder: Path) -> int:
    import pyarrow.parquet as pq

    schema: Any = pq.read_schema(shard_paths(folder, "vectors")[0])
    return schema.field("vector").type.list_size


def _counts(
    num_documents: int, clusters: Sequence[Ready], gathered: Mapping[str, int], written: Sequence[Finished]
) -> dict[str, int]:
    total: Counter[str] = Counter()
    for shard in written:
        total.update({name: shard.counts[name] for name in ("num_found", "num_edges", "num_without_neighbours")})
    num_kept = sum(ready.num_documents for ready in clusters)
    if num_kept != num_documents:
        raise RuntimeError(f"neighbours lost count of documents: {num_documents} in, {num_kept} in clusters")
    return {
        "num_in": num_documents,
        "num_kept": num_kept,
        "num_without_neighbours": total["num_without_neighbours"],
        "num_zero_vectors": gathered.get("num_zero_vectors", 0),
        "num_edges_in": total["num_found"],
        "num_edges": total["num_edges"],
        "num_edges_dropped_in_degree": total["num_found"] - total["num_edges"],
    }


def _write_observed(
    folder: Path, details: Mapping[str, Any], num_documents: int, started: float, prepared: float
) -> None:
    from matplotlib.figure import Figure

    ended = time.perf_counter()
    measured = {
        "prepare_seconds": prepared - started,
        "search_seconds": ended - prepared,
        "documents_per_second": num_documents / (ended - started),
    }
    (folder / "throughput.json").write_text(json.dumps(measured) + "\n")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    degrees = details["documents_by_in_degree"]
    axes.bar([f"{entry['from']:,}" for entry in degrees], [entry["num_documents"] for entry in degrees])
    axes.set(xlabel="lists that a document stands in, from", ylabel="documents")
    figure.savefig(folder / "in_degrees.png")
