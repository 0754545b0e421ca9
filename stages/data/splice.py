"""SPLiCe: rows of documents that belong together, found by retrieval (Staniszewski et al., 2023, arXiv 2312.17296).

Reads   slots `tokens` (Tokens) and `documents` (Documents, for the texts; documents without tokens are ignored).
        Deduplicate first: otherwise a row becomes copies of one document.
Writes  Rows (policy `causal`: plain causal attention across documents, no position reset), shuffled by `seed`, and
        `edges-00000.parquet`: who retrieved whom (`row_id`, `parent_doc_id`, `child_doc_id`, `rank`, `score`).
Loses   tails shorter than `min_remainder_tokens`, the last row if `partial_row="drop"`, rows beyond `num_rows`; all
        counted.

A row starts with a random unused document, the root. Breadth first, each document brings in the k nearest that are
unused, until the row is full; the documents are ordered, then cut at the row's end. Where the paper is silent:

* The k nearest are taken among the unused documents (`retrieve.py`): with fixed lists a path dies almost at once.
* When nothing is left to expand, the row goes on with a new random root. Only the last row can stay partial.
* What the cut leaves of a document goes back to the pool. It is retrieved, and retrieves, as its whole document.
* Documents longer than a row become rows of their own first; what is left of them goes to the pool.
* The control, example packing, is the same code with `retriever="random"`.

Popular documents are used early, so late rows may be nearly random: `details.similarity_by_quarter` shows it.
Memory and time hold one pool of about 1e5 documents; cut a larger corpus by coarse cluster, and never by file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.bins import Piece, Plan, cut_long, room_left
from ropewalk.stages.data.retrieve import Bm25, Bm25Neighbours, RandomNeighbours, build_index, iterate_texts
from ropewalk.stages.data.rows import Corpus, Row, RowBuilder, load_corpus, make_row_id, write_rows
from ropewalk.stages.schema import Record, TokenizerInfo, seeded_rng, write_table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "splice"
VERSION = 1
check = check_rows


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
    retriever: Literal["bm25", "random"] = "bm25"
    """`random` is the control, example packing."""
    num_candidates: int = Field(default=32, ge=1)
    """Length of the lists made in advance. It moves work, the rows stay the same; only `rank` in the edges changes."""
    max_query_terms: int | None = Field(default=None, ge=1)
    """Ask with so many terms of a document, the strongest by tf-idf. None asks with the whole document."""
    min_remainder_tokens: int = Field(default=32, ge=1)
    """Shorter tails of cut documents are trimmed away instead of put back into the pool."""
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle, a fair sample of all. None keeps all."""


@dataclass
class Pool:
    """The documents, or what is left of them, that no row has yet."""

    starts: np.ndarray
    """int64 `[num_documents]`: the first token not yet placed."""
    lengths: np.ndarray
    """int64 `[num_documents]`: tokens of each whole document."""
    unused: np.ndarray
    """bool `[num_documents]`."""

    def draw(self, rng: np.random.Generator) -> int | None:
        """An unused document, uniformly; None when there is none."""
        import numpy as np

        left = np.flatnonzero(self.unused)
        return int(left[rng.integers(len(left))]) if len(left) else None

    def take(self, document: int) -> int:
        """Take a document out. Returns the tokens left of it."""
        self.unused[document] = False
        return int(self.lengths[document] - self.starts[document])

    def put_back(self, document: int, start: int) -> None:
        """Put back what is left from `start` on."""
        self.unused[document] = True
        self.starts[document] = start


@dataclass(frozen=True)
class Edge:
    """`parent` brought `child` into row `row` (its place in the order of creation)."""

    row: int
    parent: int
    child: int
    rank: int
    score: float


@dataclass
class Splicing:
    """All rows in the order of creation, and what happened on the way."""

    plan: Plan
    num_own_rows: int
    """Rows of one long document each; they come first."""
    edges: list[Edge] = field(default_factory=list)
    num_roots: int = 0
    num_tokens_trimmed: int = 0


def gather(
    pool: Pool, neighbours: Any, config: SpliceConfig, row: int, rng: np.random.Generator
) -> tuple[list[int], list[Edge], int]:
    """Documents for one row, in the order of retrieval, the edges between them, and the number of roots drawn."""
    capacity, size, num_roots = config.row_tokens - 1, 0, 0
    chosen: list[int] = []
    edges: list[Edge] = []
    queue: deque[int] = deque()
    while size <= capacity:
        if not queue:
            root = pool.draw(rng)
            if root is None:
                break
            num_roots += 1
            found = [root]
        else:
            parent = queue.popleft()
            hits = neighbours.nearest_unused(parent, config.k, pool.unused, rng)
            edges += [Edge(row, parent, hit.document, hit.rank, hit.score) for hit in hits]
            found = [hit.document for hit in hits]
        for document in found:
            size += pool.take(document) + 1
        chosen += found
        queue.extend(found)
    return chosen, edges, num_roots


def cut_to_row(pool: Pool, documents: list[int], config: SpliceConfig) -> tuple[list[Piece], int]:
    """The pieces that fit a row. Puts the rest back; returns also the tokens of tails too short for that."""
    room, trimmed = config.row_tokens - 1, 0
    pieces: list[Piece] = []
    for document in documents:
        start, end = int(pool.starts[document]), int(pool.lengths[document])
        taken = min(room, end - start)
        left = end - start - taken
        if taken:
            pieces.append(Piece(document, start, taken, left == 0))
            room -= min(room, taken + (left == 0))
        if left >= config.min_remainder_tokens or not taken:
            pool.put_back(document, start + taken)
        else:
            trimmed += left
    return pieces, trimmed


def splice(config: SpliceConfig, lengths: list[int], neighbours: Any) -> Splicing:
    """Put documents of these lengths, in tokens, into rows.

    `neighbours` is a `Bm25Neighbours` or anything with its `nearest_unused`.
    """
    import numpy as np

    own, rest = cut_long(lengths, config.row_tokens - 1)
    pool = Pool(np.zeros(len(lengths), np.int64), np.asarray(lengths, np.int64), np.zeros(len(lengths), bool))
    result = Splicing(plan=own, num_own_rows=len(own))
    for piece in rest:
        if piece.start and piece.num_tokens < config.min_remainder_tokens:
            result.num_tokens_trimmed += piece.num_tokens
        else:
            pool.put_back(piece.document, piece.start)
    while pool.unused.any():
        row = len(result.plan)
        rng = seeded_rng(config.seed, NAME, row)
        documents, edges, num_roots = gather(pool, neighbours, config, row, rng)
        if config.order == "shuffle":
            documents = [documents[place] for place in rng.permutation(len(documents))]
        elif config.order == "reverse":
            documents.reverse()
        pieces, trimmed = cut_to_row(pool, documents, config)
        placed = {piece.document for piece in pieces}
        result.plan.append(pieces)
        result.edges += [edge for edge in edges if edge.child in placed]
        result.num_roots += num_roots
        result.num_tokens_trimmed += trimmed
    return result


def similarity_statistics(splicing: Splicing, index: Bm25, seed: int) -> dict[str, Any]:
    """How alike neighbours in a row are: mean tf-idf cosine, against random pairs, and by quarter of creation."""
    rows = splicing.plan[splicing.num_own_rows :]
    values: list[list[float]] = []
    for row in rows:
        values.append([index.similarity(left.document, right.document) for left, right in pairwise(row)])
    num_pairs = sum(map(len, values))
    drawn = seeded_rng(seed, NAME, "pairs").integers(index.num_documents, size=(num_pairs, 2)).tolist()
    at_random = [index.similarity(left, right) for left, right in drawn if left != right]
    quarters = [values[len(values) * part // 4 : len(values) * (part + 1) // 4] for part in range(4)]
    return {
        "num_pairs": num_pairs,
        "similarity_adjacent": _mean([value for row in values for value in row]),
        "similarity_random": _mean(at_random),
        "similarity_by_quarter": [_mean([value for row in quarter for value in row]) for quarter in quarters],
    }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def build_rows(
    config: SpliceConfig, plan: Plan, order: list[int], corpus: Corpus, info: TokenizerInfo, row_ids: dict[int, str]
) -> Iterator[Row]:
    """Lay the rows `order` of the plan; notes each one's id."""
    for row in order:
        builder = RowBuilder(corpus, info, config.row_tokens)
        for piece in plan[row]:
            builder.place(piece.document, piece.start, piece.num_tokens)
            if piece.is_end:
                builder.separate()
        row_ids[row] = make_row_id(NAME, config.seed, row, builder.segments)
        yield builder.finish(row_ids[row], "causal")


def edges_schema() -> pa.Schema:
    """Arrow schema of the edges: `rank` is -1 where the list in advance had run dry."""
    import pyarrow as pa

    names = ("row_id", "parent_doc_id", "child_doc_id")
    strings = [pa.field(name, pa.string(), nullable=False) for name in names]
    return pa.schema(
        [*strings, pa.field("rank", pa.int32(), nullable=False), pa.field("score", pa.float32(), nullable=False)]
    )


def run(config: SpliceConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Splice the documents of slot `tokens`, retrieved by their texts in slot `documents`, into rows."""
    corpus, info = load_corpus(inputs["tokens"], context.work)
    index = build_index(corpus.doc_ids, iterate_texts(inputs["documents"]), config.max_query_terms)
    neighbours: Bm25Neighbours | RandomNeighbours = RandomNeighbours()
    if config.retriever == "bm25":
        neighbours = Bm25Neighbours.build(index, config.num_candidates, context)
    lengths = corpus.lengths.tolist()
    splicing = splice(config, lengths, neighbours)
    num_spliced = len(splicing.plan) - splicing.num_own_rows
    details = similarity_statistics(splicing, index, config.seed) | {
        "num_spliced_rows": num_spliced,
        "roots_per_row": round(splicing.num_roots / max(1, num_spliced), 6),
        "fallback_fraction": round(neighbours.num_fallbacks / max(1, neighbours.num_lookups), 6),
        "trimmed_fraction": round(splicing.num_tokens_trimmed / max(1, sum(lengths)), 6),
    }
    context.log({name: float(value) for name, value in details.items() if isinstance(value, int | float)})
    dropped = _drop_partial_row(config, splicing)
    order = seeded_rng(config.seed, NAME, "rows").permutation(len(splicing.plan)).tolist()
    kept, over = order[: config.num_rows], order[config.num_rows :] if config.num_rows else []
    counts = {
        "num_documents_in": len(lengths),
        "num_own_rows": sum(row < splicing.num_own_rows for row in kept),
        "num_tokens_in": sum(lengths),
        "num_tokens_trimmed": splicing.num_tokens_trimmed,
        "num_tokens_dropped_partial_row": dropped,
        "num_tokens_dropped_over_limit": sum(piece.num_tokens for row in over for piece in splicing.plan[row]),
    }
    row_ids: dict[int, str] = {}
    rows = build_rows(config, splicing.plan, kept, corpus, info, row_ids)
    write_rows(
        output,
        context,
        rows,
        info=info,
        row_tokens=config.row_tokens,
        num_rows=len(kept),
        counts=counts,
        details=details,
    )
    edges = (_edge_record(edge, corpus, row_ids) for edge in splicing.edges if edge.row in row_ids)
    write_table(output.data, "edges", edges_schema(), edges)


def _drop_partial_row(config: SpliceConfig, splicing: Splicing) -> int:
    spliced = splicing.plan[splicing.num_own_rows :]
    if config.partial_row == "pad" or not spliced or not room_left(spliced[-1], config.row_tokens - 1):
        return 0
    return sum(piece.num_tokens for piece in splicing.plan.pop())


def _edge_record(edge: Edge, corpus: Corpus, row_ids: Mapping[int, str]) -> dict[str, Any]:
    return {
        "row_id": row_ids[edge.row],
        "parent_doc_id": corpus.doc_ids[edge.parent],
        "child_doc_id": corpus.doc_ids[edge.child],
        "rank": edge.rank,
        "score": edge.score,
    }
