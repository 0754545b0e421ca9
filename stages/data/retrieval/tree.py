"""A directory tree as a retriever: what belongs together already lies together.

The `Repo` variant of SPLiCe (arXiv 2312.17296): documents in the order of a depth-first walk of the tree, the files of
a folder before its sub-folders, each sorted by name. The tree is read off the ids, `<source>/<relative path>`. The next
document is the next one in that order that is unused, after the last the first. Where all files lie in one folder the
order is that of their names, which means little; the stage reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def walk_key(doc_id: str) -> tuple[tuple[int, str], ...]:
    """Sorts ids depth first, the files of a folder before its sub-folders."""
    *folders, name = doc_id.split("/")
    return (*((1, folder) for folder in folders), (0, name))


def distance(one: str, other: str) -> int:
    """Steps from the folder of one document up and down to that of another; 0 in the same folder."""
    here, there = one.split("/")[:-1], other.split("/")[:-1]
    common = 0
    for left, right in zip(here, there, strict=False):
        if left != right:
            break
        common += 1
    return len(here) + len(there) - 2 * common


def followers(doc_ids: Sequence[str], documents: range, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k ids after each of `documents`, the first after the last: numbers (int32, -1 for none) and scores."""
    import numpy as np

    found = np.full((len(documents), k), -1, dtype=np.int32)
    scores = np.zeros((len(documents), k), dtype=np.float32)
    for row, document in enumerate(documents):
        others = [(document + step) % len(doc_ids) for step in range(1, min(k + 1, len(doc_ids)))]
        found[row, : len(others)] = others
        scores[row, : len(others)] = [1 / (1 + distance(doc_ids[document], doc_ids[other])) for other in others]
    return found, scores


class TreeRequery:
    """The next unused documents in the order of the walk; see `ropewalk.stages.data.retrieval.pool.Requery`."""

    def __init__(self, doc_ids: Sequence[str]) -> None:
        """Ids in the order of the walk."""
        self._doc_ids = doc_ids

    def __call__(self, document: int, k: int, unused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Requery`."""
        import numpy as np

        from ropewalk.stages.data.compiled.retrieval import next_unused

        found = np.empty(k, dtype=np.int64)
        found = found[: next_unused(document, unused, found)]
        scores = [self.similarity(document, other) for other in found.tolist()]
        return found, np.asarray(scores, dtype=np.float32)

    def similarity(self, one: int, other: int) -> float:
        """1 / (1 + steps between the folders of two documents)."""
        return 1 / (1 + distance(self._doc_ids[one], self._doc_ids[other]))
