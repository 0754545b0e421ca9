"""In-context pretraining: one walk through all documents, cut into rows (Shi et al., ICLR 2024, arXiv 2310.10638).

Reads   slots `tokens` (Tokens) and `neighbours` (Neighbours of the same documents; the paper's are dense). Deduplicate
        first; the paper drops near-duplicates among neighbours, because they stand next to each other here.
Writes  Rows (policy `causal`), shuffled by `seed`: the paper's code warns of similar rows in one batch.
Loses   the last row if `partial_row="drop"`, rows beyond `num_rows`; both counted.

The path starts at the document of the lowest degree and goes on to the first unvisited of each document's nearest
neighbours, however long it gets. Where all are visited it starts again at the unvisited document of the lowest degree
(algorithm 1). The whole path is then laid end to end and cut every `row_tokens`.

We follow the paper. Its code (`swj0419/in-context-pretraining:sort/sort.py`) does something else:

* It starts at whatever a Python set gives up first, not at the lowest degree.
* It looks at nine neighbours: of ten it skips the first, taken for the document itself.
* It ends a path after 21 documents, and inserts the documents of shorter ones before their nearest neighbour elsewhere;
  that step reads an attribute that is set nowhere.
* It drops a document whose first 100 characters share more than 0.85 of their 3-grams with the document before.

Left open by the paper: the degree is the number of documents joined by an edge in either direction, counted once, in
the whole graph; equal degrees are in a seeded random order. Its algorithm box takes the least similar neighbour, its
text the most similar one; so do we. Paths do not leave a coarse cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.bins import concatenate
from ropewalk.stages.data.packing.clusters import log_details, map_clusters, retriever_of, walk_details
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import finish_rows
from ropewalk.stages.data.packing.walk import Walk
from ropewalk.stages.schema import Record, seeded_rng

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.data.retrieval.pool import Pool

NAME = "document_walk"
VERSION = 1
check = check_rows


class DocumentWalkConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=2)
    """Length of each row, in tokens, the begin token included."""
    seed: int = 0
    """Orders documents of equal degree, and shuffles the finished rows."""
    num_neighbours: int = Field(default=10, ge=1)
    """Edges of each document: the first so many of its list."""
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all."""


def walk_path(neighbours: np.ndarray, mask: np.ndarray, *key: str | int) -> tuple[np.ndarray, int]:
    """All documents of `mask` (bool `[n]`) in the order of the walk, and how often it started.

    `neighbours` is int32 `[n, k]`, best first, -1 behind the last; `key` seeds the order of equal degrees.
    """
    import numpy as np

    from ropewalk.stages.data.compiled.walk import degrees, path_by_degree

    neighbours = np.ascontiguousarray(neighbours)
    shuffled = seeded_rng(*key).permutation(len(neighbours)).astype(np.int32)
    starts = shuffled[np.argsort(degrees(neighbours)[shuffled], kind="stable")]
    path, is_start = np.empty(len(neighbours), np.int32), np.empty(len(neighbours), np.bool_)
    num_visited = path_by_degree(neighbours, mask.copy(), starts, path, is_start)
    return path[:num_visited], int(is_start[:num_visited].sum())


def make_walk(config: DocumentWalkConfig, corpus: Corpus, pool: Pool, unit: int) -> Walk:
    """Plan the rows of a cluster."""
    neighbours = pool.neighbours[:, : config.num_neighbours]
    path, num_roots = walk_path(neighbours, corpus.lengths > 0, config.seed, NAME, unit)
    plan = concatenate(corpus.lengths, config.row_tokens - 1, path)
    return Walk(plan, counts={"num_roots": num_roots, "num_lookups": len(path)})


def run(config: DocumentWalkConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Lay the documents of slot `tokens` end to end, in the order of a walk through slot `neighbours`."""
    shards, info = map_clusters(context, NAME, config, make_walk, inputs["tokens"], inputs["neighbours"])
    details = {"retriever": retriever_of(inputs["neighbours"]), **walk_details(shards)}
    log_details(context, details)
    finish_rows(
        output,
        context,
        shards,
        name=NAME,
        seed=config.seed,
        info=info,
        row_tokens=config.row_tokens,
        num_rows=config.num_rows,
        details=details,
    )
