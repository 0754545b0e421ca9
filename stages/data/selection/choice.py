"""Which samples of a table are best by their scores, and how many there are room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.data.quotas import largest_remainder
from ropewalk.stages.data.selection.scores import source_codes
from ropewalk.stages.schema import iterate_table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TableKind = Literal["documents", "tokens", "chats"]


@dataclass(frozen=True)
class Candidates:
    """The samples of a table, in its order. Arrays are [n]."""

    id_ranks: np.ndarray
    """The place of each id among all, in ascending order."""
    names: Sequence[str]
    """Of the sources."""
    sources: np.ndarray
    """Which of the names each sample has."""
    scores: np.ndarray
    """NaN for samples without one."""
    sizes: np.ndarray
    """What each takes of the room there is."""

    @classmethod
    def of(cls, ids: pa.ChunkedArray, sources: pa.ChunkedArray, scores: np.ndarray, sizes: np.ndarray) -> Candidates:
        """The samples of a table with distinct ids."""
        import numpy as np
        import pyarrow.compute

        pc: Any = pyarrow.compute
        ranks = np.empty(len(ids), dtype=np.int64)
        ranks[pc.sort_indices(ids).to_numpy()] = np.arange(len(ids))
        return cls(ranks, *source_codes(sources), scores, sizes)

    @property
    def scored(self) -> np.ndarray:
        """Which samples have a score, bool [n]."""
        import numpy as np

        return ~np.isnan(self.scores)

    def ranked(self, among: np.ndarray) -> np.ndarray:
        """Numbers of the scored samples among those marked, best first, ties by id."""
        import numpy as np

        numbers = np.flatnonzero(among & self.scored)
        return numbers[np.lexsort((self.id_ranks[numbers], -self.scores[numbers]))]


def choose(
    candidates: Candidates, wanted: int | None, *, min_score: float | None = None, by_source: bool = False
) -> np.ndarray:
    """Which samples are kept, bool [n].

    Args:
        candidates: The samples.
        wanted: Room, in the unit of the sizes: the best are kept up to the first that would exceed it. None: no limit.
        min_score: Samples below it are not kept.
        by_source: Divide the room among the sources in proportion to what their scored samples take, by the largest
            remainder, and rank each source on its own.
    """
    import numpy as np

    keep = np.zeros(len(candidates.scores), dtype=bool)
    if by_source:
        ranked = {name: candidates.ranked(candidates.sources == code) for code, name in enumerate(candidates.names)}
    else:
        ranked = {"": candidates.ranked(~keep)}
    available = {name: int(candidates.sizes[numbers].sum()) for name, numbers in ranked.items()}
    rooms = available if wanted is None or not any(available.values()) else largest_remainder(available, wanted)
    for name, numbers in ranked.items():
        fitting = numbers[np.cumsum(candidates.sizes[numbers]) <= rooms[name]]
        keep[fitting] = True
    if min_score is not None:
        keep &= candidates.scores >= min_score
    return keep


def check_same_samples(ids: pa.ChunkedArray, scored: pa.ChunkedArray, counts: Mapping[str, int], where: Path) -> None:
    """Raises ValueError unless each scored id is one of the table's, and those without a score were counted as dropped.

    `counts` are those of the Scores artifact at `where`.
    """
    import pyarrow.compute

    pc: Any = pyarrow.compute
    extra = scored.filter(pc.invert(pc.is_in(scored, value_set=ids)))
    if len(extra):
        raise ValueError(f"{where} has a score for {extra[0].as_py()!r}, which the table lacks: score this table")
    num_dropped = sum(value for name, value in counts.items() if name.startswith("num_dropped_"))
    missing = ids.filter(pc.invert(pc.is_in(ids, value_set=scored)))
    if len(missing) != num_dropped:
        named = f", such as {missing[0].as_py()!r}" if len(missing) else ""
        raise ValueError(
            f"{where} lacks a score for {len(missing)} samples of the table{named}, but the scoring dropped "
            f"{num_dropped}: score this table"
        )


def match_scores(ids: pa.ChunkedArray, scores: pa.Table, column: str) -> np.ndarray:
    """A column of Scores for every id, float64; NaN, or 0 for a part, where there is none."""
    import numpy as np
    import pyarrow.compute

    pc: Any = pyarrow.compute
    places = pc.index_in(ids, value_set=scores.column("sample_id")).fill_null(-1).to_numpy()
    absent = np.nan if column == "score" else 0.0
    return np.append(scores.column(column).to_numpy(), absent)[places]


def table_sizes(kind: TableKind, folder: Path) -> np.ndarray:
    """The size of every sample of a table, int64: tokens of Tokens, bytes of the others."""
    import numpy as np

    column = {"documents": "num_bytes", "tokens": "input_ids", "chats": "messages"}[kind]
    return np.concatenate([sizes_of(kind, batch.column(0)) for batch in iterate_table(folder, kind, [column])])


def sizes_of(kind: TableKind, column: Any) -> np.ndarray:
    """The same of one batch's column: `num_bytes`, `input_ids` or `messages`, whose contents count."""
    import numpy as np

    if kind == "documents":
        return column.to_numpy()
    if kind == "tokens":
        return column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    sizes = [sum(len((turn["content"] or "").encode()) for turn in messages) for messages in column.to_pylist()]
    return np.asarray(sizes, dtype=np.int64)
