"""SPLiCe: rows of documents that belong together, found by retrieval (Staniszewski et al., 2023, arXiv 2312.17296).

Reads   slots `tokens` (Tokens) and `neighbours` (Neighbours of the same documents; `retriever="random"` needs none).
        Deduplicate first: otherwise a row becomes copies of one document. Decontaminate first, too: retrieval brings
        the pieces of a benchmark together.
Writes  Rows (policy `causal`: plain causal attention across documents, no position reset), shuffled by `seed`, and
        `edges-<unit>.parquet`: who brought in whom (`row_id`, `parent_doc_id`, `child_doc_id`, `rank`, `score`), except
        for rows of left-overs.
Loses   tails shorter than `min_remainder_tokens`, the last row if `partial_row="drop"`, rows beyond `num_rows`; all
        counted.

A row starts with a random unused document, the root. Breadth first, each document brings in the k nearest that are
unused, until the row is full; the documents are ordered, then cut at the row's end. The official code could not be
read; where the paper is silent:

* The k nearest are taken among the unused documents: with fixed lists a path dies almost at once (nearest neighbours
  are mutual). The list made in advance is looked up; when fewer than k of it are unused, the same index is asked again
  with the used ones masked (`details.requery_fraction`).
* When nothing is left to expand, the row goes on with a new random root (`details.roots_per_row`). A root is uniform
  among the unused documents, at constant cost. Only the last row of a cluster can stay partial; see `clusters.py`.
* What the cut leaves of a document goes back to the pool. It is retrieved, and retrieves, as its whole document.
* `max_overflow_tokens` prefers the nearest document of the list that overflows the row by no more than that; if there
  is none, the nearest is cut all the same, so that rows are full. The paper's method is None.
* Documents longer than a row become rows of their own first; what is left of them goes to the pool.
* Ties go by document id; a document never retrieves itself (by id, not by rank: a duplicate can score higher).
* The control, example packing, is the same code with every document drawn at random.

Popular documents are used early, so late rows may be nearly random: `details.similarity_by_quarter` shows it.
The unit of work is a coarse cluster, so rows depend on the clusters, but never on workers or shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.clusters import (
    Job,
    build_unit,
    link_edges,
    log_details,
    map_clusters,
    map_job,
    retriever_of,
    walk_details,
)
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import TokenUnit, finish_rows, load_tokenizer_info, load_tokens, token_units
from ropewalk.stages.data.packing.walk import Walk, splice_documents
from ropewalk.stages.schema import Record

if TYPE_CHECKING:
    from ropewalk.stages.data.retrieval.pool import Pool

NAME = "splice"
VERSION = 2
check = check_rows

GROUP_TOKENS = 2**27
"""Tokens of a unit of the control without neighbours: half a gigabyte of ids."""


class SpliceConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=2)
    """Length of each row, in tokens, the begin token included."""
    seed: int = 0
    """Draws the roots and shuffles the finished rows."""
    k: int = Field(default=1, ge=1)
    """How many documents each document brings in. 1, a path, is the paper's default and best."""
    order: Literal["identity", "shuffle", "reverse"] = "identity"
    """Order of the documents in a row, applied before the cut, so that it decides which document is cut."""
    retriever: Literal["neighbours", "random"] = "neighbours"
    """`random` is the control, example packing: of a cluster, or without slot `neighbours` of some Tokens shards."""
    noise_fraction: float = Field(default=0.0, ge=0, le=1)
    """Probability that a document brought in is a random one, the paper's noisy retriever (which only at 0.9 is as bad
    as example packing)."""
    max_overflow_tokens: int | None = Field(default=None, ge=0)
    """Pass over documents that overflow the row by more than this, as long as another of the list does not. None takes
    the nearest whatever its length."""
    min_remainder_tokens: int = Field(default=32, ge=1)
    """Shorter tails of cut documents are trimmed away instead of put back into the pool."""
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle, a fair sample of all. None keeps all."""


def make_walk(config: SpliceConfig, corpus: Corpus, pool: Pool | None, unit: int) -> Walk:
    """Plan the rows of a unit."""
    return splice_documents(
        corpus.lengths,
        pool if config.retriever == "neighbours" else None,
        config.row_tokens - 1,
        k=config.k,
        order=config.order,
        noise=config.noise_fraction,
        max_overflow_tokens=config.max_overflow_tokens,
        min_remainder_tokens=config.min_remainder_tokens,
        key=(config.seed, NAME, unit),
    )


def _build_random(job: Job, unit: TokenUnit, folder: Path) -> dict[str, Any]:
    return build_unit(job, load_tokens(unit.paths, job.info), None, unit.number, folder)


def run(config: SpliceConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Splice the documents of slot `tokens`, with their neighbours of slot `neighbours`, into rows."""
    if "neighbours" in inputs:
        shards, info = map_clusters(context, NAME, config, make_walk, inputs["tokens"], inputs["neighbours"])
        retriever = retriever_of(inputs["neighbours"])
    elif config.retriever == "random":
        info, retriever = load_tokenizer_info(inputs["tokens"]), None
        units = list(token_units(inputs["tokens"], GROUP_TOKENS).values())
        job = Job(NAME, config, info, make_walk, len(units) == 1)
        shards = map_job(context, job, partial(_build_random, job), units)
    else:
        raise ValueError(
            'splice needs slot neighbours, an output of the neighbours stage; only retriever="random" does without'
        )
    details = {"retriever": "random" if config.retriever == "random" else retriever, **walk_details(shards)}
    log_details(context, details)
    kept = finish_rows(
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
    link_edges(output, shards, kept)
