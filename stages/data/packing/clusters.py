"""Rows made cluster by cluster from a neighbours artifact: what the methods that pack by retrieval share.

A coarse cluster is the unit of work: its pool is opened, its tokens are gathered, a method's walk plans its rows, and
these are laid and written. Memory is that of the largest cluster for each worker. The row that the last documents of a
cluster do not fill is left over; the left-overs of all clusters are packed once more at the end, each cluster's as one
run, in random order, so that a thousand clusters have one padded row, not a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ropewalk.stages.data.packing.bins import RowPlan, concatenate
from ropewalk.stages.data.packing.gather import GatheredTokens, gather_tokens
from ropewalk.stages.data.packing.row_batches import batches_of_rows, lay_rows
from ropewalk.stages.data.packing.row_files import UnitWriter
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import load_left, load_tokenizer_info, map_units, sum_counts
from ropewalk.stages.data.packing.walk import Edges, Walk, similarity_details, similarity_of
from ropewalk.stages.data.retrieval.pool import num_clusters, open_pool
from ropewalk.stages.schema import TokenizerInfo, read_artifact, seeded_rng, write_shard
from ropewalk.stages.shards import Shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ropewalk.stages.context import Context, Output
    from ropewalk.stages.data.retrieval.pool import Pool


class RowsConfig(Protocol):
    """What this module reads of a method's config."""

    @property
    def row_tokens(self) -> int:
        """Length of each row."""
        ...

    @property
    def seed(self) -> int:
        """Seeds everything random."""
        ...

    @property
    def partial_row(self) -> Literal["pad", "drop"]:
        """What becomes of the last row if it is not full."""
        ...


@dataclass(frozen=True)
class Job:
    """What all units of a run share; picklable."""

    name: str
    """The method's."""
    config: Any
    """A `RowsConfig`."""
    info: TokenizerInfo
    make: Callable[..., Walk]
    """`make(config, corpus, pool, unit)` plans the rows of a unit; `pool` is None where there is none."""
    is_only: bool
    """There is one unit: what does not fill a row is not left."""


def map_clusters(
    context: Context, name: str, config: Any, make: Callable[..., Walk], tokens: Path, neighbours: Path
) -> tuple[list[Shard], TokenizerInfo]:
    """Build the rows of every cluster, and of what they leave; `make` as in `Job`."""
    info = load_tokenizer_info(tokens)
    num = num_clusters(neighbours)
    gathered = gather_tokens(context, tokens, neighbours, info)
    job = Job(name, config, info, make, num == 1)
    return map_job(context, job, partial(build_cluster, job, neighbours, gathered), range(num)), info


def map_job(
    context: Context, job: Job, build: Callable[[Any, Path], dict[str, Any]], units: Sequence[Any]
) -> list[Shard]:
    """Build all units in the order given, and what they leave."""
    named = {f"unit-{number:05d}": unit for number, unit in enumerate(units)}
    return map_units(context, build, named, build_rest=partial(build_left, job))


def build_cluster(job: Job, neighbours: Path, gathered: GatheredTokens, cluster: int, folder: Path) -> dict[str, Any]:
    """The rows of one cluster."""
    pool = open_pool(neighbours, cluster)
    return build_unit(job, gathered.corpus(cluster, pool.doc_ids), pool, cluster, folder)


def build_unit(job: Job, corpus: Corpus, pool: Pool | None, unit: int, folder: Path) -> dict[str, Any]:
    """Plan and write the rows of a unit; returns its counts, and `similarity` if there is a pool."""
    lengths = corpus.lengths
    walk = job.make(job.config, corpus, pool, unit)
    room = walk.plan.room(job.config.row_tokens - 1)
    full, partial_rows = (room == 0).nonzero()[0], room.nonzero()[0]
    counts: dict[str, Any] = {
        "num_documents_in": int((lengths > 0).sum()),
        "num_tokens_in": int(lengths.sum()),
        "num_own_rows": walk.num_own_rows,
        "num_tokens_dropped_partial_row": 0,
        **walk.counts,
    }
    with UnitWriter(folder, job.config.row_tokens, "causal") as writer:
        row_ids = write_plan(writer, job, walk.plan.rows(full), corpus)
        rest = walk.plan.rows(partial_rows)
        if job.is_only:
            more, dropped = write_last(writer, job, rest, corpus)
            row_ids += more
            counts["num_tokens_dropped_partial_row"] = dropped
        elif rest.num_rows:
            writer.leave(rest, corpus)
        counts |= writer.counts
    if walk.edges is not None:
        write_edges(folder, walk.edges, full.tolist() + partial_rows.tolist(), row_ids, corpus.doc_ids)
    if pool is not None:
        counts["similarity"] = similarity_of(walk, pool, job.config.seed, job.name, unit, "pairs")
    return counts


def build_left(job: Job, paths: tuple[Path, ...], folder: Path) -> dict[str, Any]:
    """Rows of what the units left: each one's pieces in their order, the units in a random one."""
    import numpy as np
    import pyarrow.parquet as pq

    corpus = load_left(paths)
    ends = [0, *accumulate(pq.read_metadata(path).num_rows for path in paths)]
    runs = seeded_rng(job.config.seed, job.name, "left").permutation(len(paths))
    order = np.concatenate([np.arange(ends[run], ends[run + 1]) for run in runs.tolist()])
    plan = concatenate(corpus.lengths, job.config.row_tokens - 1, order)
    is_partial = plan.room(job.config.row_tokens - 1) > 0
    with UnitWriter(folder, job.config.row_tokens, "causal") as writer:
        write_plan(writer, job, plan.rows(np.flatnonzero(~is_partial)), corpus)
        _, dropped = write_last(writer, job, plan.rows(np.flatnonzero(is_partial)), corpus)
        return writer.counts | {"num_tokens_dropped_partial_row": dropped, "num_rows_of_left_overs": plan.num_rows}


def write_plan(writer: UnitWriter, job: Job, plan: RowPlan, corpus: Corpus) -> list[str]:
    """Lay and write rows, a batch at a time. Returns their ids."""
    row_ids: list[str] = []
    for selection in batches_of_rows(plan.num_rows, job.config.row_tokens):
        batch = lay_rows(plan.rows(selection), corpus, job.info, job.config.row_tokens)
        names = batch.row_ids(job.name, job.config.seed, selection.tolist(), corpus)
        writer.write(batch, corpus, names)
        row_ids += names
    return row_ids


def write_last(writer: UnitWriter, job: Job, plan: RowPlan, corpus: Corpus) -> tuple[list[str], int]:
    """Pad or drop rows that are not full. Returns the ids of those written, and the tokens dropped."""
    if job.config.partial_row == "drop":
        return [], int(plan.num_tokens.sum())
    return write_plan(writer, job, plan, corpus), 0


def edges_schema() -> pa.Schema:
    """Arrow schema of the edges.

    `rank` is the place in the parent's list, -1 where the masked query found the child, -2 where a draw did.
    """
    import pyarrow as pa

    names = ("row_id", "parent_doc_id", "child_doc_id")
    strings = [pa.field(name, pa.string(), nullable=False) for name in names]
    return pa.schema(
        [*strings, pa.field("rank", pa.int32(), nullable=False), pa.field("score", pa.float32(), nullable=False)]
    )


def write_edges(folder: Path, edges: Edges, rows: list[int], row_ids: list[str], doc_ids: Sequence[str]) -> None:
    """Write a unit's edges with the number of the row among those written. `rows`: which these were, in order."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = np.full(max(rows, default=-1) + 1, -1, np.int64)
    place[rows[: len(row_ids)]] = np.arange(len(row_ids))
    written = place[edges.rows]
    kept = np.flatnonzero(written >= 0)
    columns: dict[str, Any] = {
        "row": pa.array(written[kept]),
        "row_id": pa.array([row_ids[row] for row in written[kept].tolist()], pa.string()),
        "parent_doc_id": pa.array([doc_ids[document] for document in edges.parents[kept].tolist()], pa.string()),
        "child_doc_id": pa.array([doc_ids[document] for document in edges.children[kept].tolist()], pa.string()),
        "rank": pa.array(edges.ranks[kept], pa.int32()),
        "score": pa.array(edges.scores[kept], pa.float32()),
    }
    pq.write_table(pa.table(columns), folder / "edges.parquet")


def link_edges(output: Output, shards: Sequence[Shard], kept: Sequence[np.ndarray]) -> None:
    """Write `edges-<unit>.parquet` of all units, without those of rows that were not kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number, (shard, rows) in enumerate(zip(shards, kept, strict=True)):
        path = shard.folder / "edges.parquet"
        if path.exists():
            table = pq.read_table(path)
            table = table.filter(pa.array(rows[table.column("row").to_numpy()]))
            write_shard(output.data, "edges", number, table.drop_columns(["row"]).cast(edges_schema()))


def walk_details(shards: Sequence[Shard]) -> dict[str, Any]:
    """For `details`: similarity of adjacent and random documents of a cluster, roots, re-queries, what was trimmed."""
    counts = sum_counts(shards)
    num_rows = counts["num_rows"] - counts["num_own_rows"]
    shares = {
        "roots_per_row": (counts.get("num_roots", 0), num_rows),
        "requery_fraction": (counts.get("num_requeries", 0), counts.get("num_lookups", 0)),
        "trimmed_fraction": (counts.get("num_tokens_trimmed", 0), counts["num_tokens_in"]),
    }
    similarity = [shard.counts["similarity"] for shard in shards if "similarity" in shard.counts]
    return {
        "num_units": sum("num_tokens_in" in shard.counts for shard in shards),
        **(similarity_details(similarity) if similarity else {}),
        **{name: round(part / max(1, whole), 6) for name, (part, whole) in shares.items()},
    }


def log_details(context: Context, details: Mapping[str, Any]) -> None:
    """Report the numbers among the details."""
    context.log({name: float(value) for name, value in details.items() if isinstance(value, int | float)})


def retriever_of(neighbours: Path) -> str:
    """The retriever that a neighbours artifact names."""
    return str(read_artifact(neighbours, "neighbours").details.get("retriever", "unknown"))
