"""Walks from document to document: rows filled with what retrieval calls near, no document used twice.

The methods that pack by retrieval share this: `Unused` (in `compiled/walk.py`) knows what no row has yet; a `Walk` is
what comes out, rows in the order of creation; `similarity_of` samples how alike neighbours in its rows are.

A document's list of neighbours is made in advance. When all in it are used, the pool is asked once more, with the used
ones masked (`Pool.requery`): so "the nearest unused document" is meant literally, at the price of a list look-up for
nine documents in ten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.schema import seeded_rng

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.data.compiled.walk import Rows as CompiledRows
    from ropewalk.stages.data.compiled.walk import Unused
    from ropewalk.stages.data.packing.bins import RowPlan
    from ropewalk.stages.data.retrieval.pool import Pool

ORDERS = ("identity", "shuffle", "reverse")
FIT_CANDIDATES = 16
"""So many documents a masked query is asked for where one that fits is looked for."""
MAX_PAIRS = 1024
"""Pairs of documents compared for each quarter of a unit: similarity is a statistic, and costs more than the walk."""


@dataclass(frozen=True)
class Edges:
    """Who brought in whom: E edges."""

    rows: np.ndarray
    """int32 `[E]`: the child's row, by its place in the order of creation."""
    parents: np.ndarray
    """int32 `[E]`: documents."""
    children: np.ndarray
    """int32 `[E]`: documents."""
    ranks: np.ndarray
    """int32 `[E]`: place in the parent's list, from 0; -1 if the masked query found it, -2 if drawn at random."""
    scores: np.ndarray
    """float32 `[E]`."""


@dataclass(frozen=True)
class Walk:
    """Rows in the order of creation, and what happened on the way."""

    plan: RowPlan
    num_own_rows: int = 0
    """Rows of one long document each; they come first."""
    counts: Mapping[str, int] = field(default_factory=dict)
    edges: Edges | None = None


def make_unused(lengths: np.ndarray, starts: np.ndarray, mask: np.ndarray, *key: str | int) -> Unused:
    """What there is to place; `key` seeds all that is random in the walk.

    Args:
        lengths: int64 `[n]`: tokens of each whole document.
        starts: int64 `[n]`: the first token to place.
        mask: bool `[n]`: which documents can be taken.
        key: Names the walk: seed, stage, unit.
    """
    import numpy as np

    from ropewalk.stages.data.compiled.walk import Unused

    rng = seeded_rng(*key)
    return Unused(
        lengths=np.asarray(lengths, np.int64),
        starts=starts.astype(np.int64),
        mask=mask.astype(np.bool_),
        order=rng.permutation(len(lengths)).astype(np.int32),
        passed=np.zeros(len(lengths), np.bool_),
        counters=np.array([0, np.count_nonzero(mask)], np.int64),
        random=rng.integers(2**64, size=1, dtype=np.uint64),
    )


def own_rows(lengths: np.ndarray, capacity: int, min_remainder: int) -> tuple[RowPlan, np.ndarray, np.ndarray, int]:
    """Cut documents longer than a row into rows of their own.

    Returns those rows; of all documents what is left: where it starts (int64 `[n]`) and whether there is any (bool
    `[n]`); and the tokens of rests too short to keep.
    """
    import numpy as np

    from ropewalk.stages.data.packing.bins import cut_long

    full, documents, rest_starts = cut_long(lengths, capacity)
    left = lengths[documents] - rest_starts
    kept = (rest_starts == 0) | (left >= min_remainder)
    starts, mask = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.bool_)
    starts[documents], mask[documents] = rest_starts, kept
    return full, starts, mask, int(left[~kept].sum())


def adjacent_documents(plan: RowPlan, num_own_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of documents that follow each other in a row: both (int32), and the quarter of creation (0 to 3)."""
    import numpy as np

    rows = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_offsets))
    left, right = plan.documents[:-1], plan.documents[1:]
    pairs = np.flatnonzero((rows[1:] == rows[:-1]) & (left != right) & (rows[:-1] >= num_own_rows))
    quarters = (rows[pairs] - num_own_rows) * 4 // max(1, plan.num_rows - num_own_rows)
    return left[pairs], right[pairs], quarters


def similarity_of(walk: Walk, pool: Pool, *key: str | int) -> list[list[float]]:
    """The number of pairs and their mean similarity: adjacent ones by quarter of creation, then random ones.

    Means are over at most `MAX_PAIRS` pairs each, drawn with `key`.
    """
    import numpy as np

    rng = seeded_rng(*key)
    left, right, quarters = adjacent_documents(walk.plan, walk.num_own_rows)
    found = []
    for quarter in range(4):
        places = np.flatnonzero(quarters == quarter)
        sample = rng.choice(places, min(len(places), MAX_PAIRS), replace=False) if len(places) else places
        found.append([len(places), _mean_similarity(pool, left[sample], right[sample])])
    placed = np.unique(walk.plan.documents)
    drawn = rng.choice(placed, size=(MAX_PAIRS if len(placed) > 1 else 0, 2))
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    return [*found, [len(drawn), _mean_similarity(pool, drawn[:, 0], drawn[:, 1])]]


def _mean_similarity(pool: Pool, left: np.ndarray, right: np.ndarray) -> float:
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    return sum(float(pool.similarity(one, other)) for one, other in pairs) / max(1, len(left))


def similarity_details(units: Sequence[list[list[float]]]) -> dict[str, Any]:
    """For `details`: means over the units' pairs; None where there is no pair."""
    columns = list(zip(*units, strict=True))
    adjacent = [pair for column in columns[:4] for pair in column]
    return {
        "num_pairs": int(sum(number for number, _ in adjacent)),
        "similarity_adjacent": _weighted(adjacent),
        "similarity_random": _weighted(columns[4] if columns else ()),
        "similarity_by_quarter": [_weighted(column) for column in columns[:4]],
    }


def _weighted(pairs: Sequence[Sequence[float]]) -> float | None:
    number = sum(weight for weight, _ in pairs)
    return round(sum(weight * mean for weight, mean in pairs) / number, 6) if number else None


def splice_documents(
    lengths: np.ndarray,
    pool: Pool | None,
    capacity: int,
    *,
    k: int = 1,
    order: Literal["identity", "shuffle", "reverse"] = "identity",
    noise: float = 0.0,
    max_overflow_tokens: int | None = None,
    min_remainder_tokens: int = 1,
    key: tuple[str | int, ...] = (),
) -> Walk:
    """Fill rows of `capacity` positions by SPLiCe; see `ropewalk.stages.data.splice` for the method.

    Args:
        lengths: int64 `[n]`: tokens of each document of the pool; documents without tokens are left out.
        pool: Who is near whom. None: every document is drawn at random.
        capacity: Positions of a row, the begin token not counted.
        k: How many documents each brings in.
        order: Of the documents in a row, before the cut.
        noise: Probability that a document brought in is a random one.
        max_overflow_tokens: See `SpliceConfig`.
        min_remainder_tokens: See `SpliceConfig`.
        key: Names the walk: seed, stage, unit.
    """
    import numpy as np

    from ropewalk.stages.data.compiled import walk as compiled

    own, starts, mask, trimmed = own_rows(lengths, capacity, min_remainder_tokens)
    unused = make_unused(lengths, starts, mask, *key)
    rows = _make_rows(lengths - starts, mask, capacity)
    state = np.zeros(compiled.NUM_STATES, np.int64)
    state[compiled.NUM_ANSWERS] = -1
    answers, scores = np.empty(max(k, FIT_CANDIDATES), np.int32), np.empty(max(k, FIT_CANDIDATES), np.float32)
    nobody = np.full((len(lengths), 1), -1, np.int32)
    arguments = (
        unused,
        nobody if pool is None else pool.neighbours,
        np.zeros((len(lengths), 1), np.float32) if pool is None else pool.scores,
        capacity,
        k,
        ORDERS.index(order),
        -1 if max_overflow_tokens is None else max_overflow_tokens,
        min_remainder_tokens,
        1.0 if pool is None else noise,
        np.empty(len(lengths), np.int32),
        answers,
        scores,
        state,
        rows,
    )
    chosen = arguments[9]
    while compiled.splice_rows(*arguments) == compiled.ASK:
        assert pool is not None, "without a pool every document is drawn"
        wanted = int(state[compiled.WANTED])
        number = wanted if max_overflow_tokens is None else max(wanted, FIT_CANDIDATES)
        found, found_scores = pool.requery(int(chosen[state[compiled.HEAD] - 1]), number, unused.mask)
        state[compiled.NUM_ANSWERS] = len(found)
        answers[: len(found)], scores[: len(found)] = found, found_scores
    return _finish_walk(own, rows, state, trimmed)


def _make_rows(left: np.ndarray, mask: np.ndarray, capacity: int) -> CompiledRows:
    """Room for all that `splice_rows` can write: rows but the last are full, and each cuts one document at most."""
    import numpy as np

    from ropewalk.stages.data.compiled.walk import Rows

    num = len(left)
    most_rows = (int(left[mask].sum()) + num) // capacity + 1
    most = num + most_rows
    return Rows(
        np.empty(most_rows, np.int64),
        np.empty(most, np.int32),
        np.empty(most, np.int64),
        np.empty(most, np.int32),
        np.empty(most, np.bool_),
        np.empty(most + num, np.int32),
        np.empty(most + num, np.int32),
        np.empty(most + num, np.int32),
        np.empty(most + num, np.int32),
        np.empty(most + num, np.float32),
        np.full(num, -1, np.int32),
    )


def _finish_walk(own: RowPlan, rows: CompiledRows, state: np.ndarray, trimmed: int) -> Walk:
    import numpy as np

    from ropewalk.stages.data.compiled import walk as compiled
    from ropewalk.stages.data.packing.bins import RowPlan

    pieces, edges = slice(state[compiled.NUM_PIECES]), slice(state[compiled.NUM_EDGES])
    offsets = np.concatenate([[0], rows.ends[: state[compiled.NUM_ROWS]]])
    spliced = RowPlan.from_columns(
        offsets, rows.documents[pieces], rows.starts[pieces], rows.num_tokens[pieces], rows.is_end[pieces]
    )
    counts = {
        "num_roots": int(state[compiled.NUM_ROOTS]),
        "num_lookups": int(state[compiled.NUM_LOOKUPS]),
        "num_requeries": int(state[compiled.NUM_REQUERIES]),
        "num_tokens_trimmed": trimmed + int(state[compiled.NUM_TRIMMED]),
    }
    found = Edges(
        rows.edge_rows[edges] + np.int32(own.num_rows),
        rows.parents[edges],
        rows.children[edges],
        rows.ranks[edges],
        rows.scores[edges],
    )
    return Walk(RowPlan.concatenate([own, spliced]), own.num_rows, counts, found)
