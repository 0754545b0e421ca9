"""Passages found for a question: BM25 over passages, and the orders in which they are shown.

BM25 as in Lucene with k1 = 1.2 and b = 0.75, by bm25s; terms are lower-cased runs of letters and digits. Order is
always score, highest first, then document id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np

_TERM = re.compile(r"[^\W_]+")
_FIRST_LOOK = 64

Ranked = TypeVar("Ranked")


@dataclass(frozen=True)
class PassageIndex:
    """An index of passages."""

    doc_ids: list[str]
    texts: list[str]
    places: dict[str, int]
    """Place of each document."""
    tie_order: np.ndarray
    """int64 `[num_passages]`: place in the order of ids."""
    engine: Any

    @classmethod
    def build(cls, doc_ids: Sequence[str], texts: Sequence[str]) -> PassageIndex:
        """Index passages. Raises ValueError if an id occurs twice or there is no word in any of them."""
        import bm25s
        import numpy as np

        places = {doc_id: place for place, doc_id in enumerate(doc_ids)}
        if len(places) < len(doc_ids):
            raise ValueError("slot documents holds a doc_id more than once: deduplicate it by id")
        vocabulary: dict[str, int] = {}
        corpus = [[vocabulary.setdefault(term, len(vocabulary)) for term in _terms(text)] for text in texts]
        if not vocabulary:
            raise ValueError("slot documents holds no word to retrieve by")
        engine = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
        engine.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
        tie_order = np.empty(len(doc_ids), dtype=np.int64)
        tie_order[sorted(range(len(doc_ids)), key=lambda place: doc_ids[place])] = np.arange(len(doc_ids))
        return cls(list(doc_ids), list(texts), places, tie_order, engine)

    def scores(self, question: str) -> np.ndarray:
        """float32 `[num_passages]`: BM25 of every passage."""
        import numpy as np

        terms = [term for term in _terms(question) if term in self.engine.vocab_dict]
        if not terms:
            return np.zeros(len(self.doc_ids), dtype=np.float32)
        return self.engine.get_scores(terms)

    def best(self, scores: np.ndarray, wanted: int, accept: Callable[[int], bool]) -> list[int]:
        """The best passages with a score above 0 that are accepted; fewer if there are not so many."""
        import numpy as np

        found = np.flatnonzero(scores > 0)
        look = min(len(found), wanted + _FIRST_LOOK)
        while True:
            near = found
            if look < len(found):
                threshold = np.partition(scores[found], len(found) - look)[len(found) - look]
                near = found[scores[found] >= threshold]
            order = near[np.lexsort((self.tie_order[near], -scores[near]))].tolist()
            chosen = [place for place in order if accept(place)][:wanted]
            if len(chosen) == wanted or len(near) == len(found):
                return chosen
            look = min(len(found), 4 * look)

    def rank(self, scores: np.ndarray, places: Sequence[int]) -> list[int]:
        """Places by score, highest first, then id."""
        return sorted(places, key=lambda place: (-float(scores[place]), self.doc_ids[place]))


def _terms(text: str) -> list[str]:
    return _TERM.findall(text.lower())


def alternate_inwards(ranked: Sequence[Ranked]) -> list[Ranked]:
    """Best first, second best last, third best second, and so on: the middle, which is read least, gets the worst."""
    return [*ranked[0::2], *reversed(ranked[1::2])]


def insert_at_depth(others: Sequence[Ranked], gold: Sequence[Ranked], depth_fraction: float) -> list[Ranked]:
    """`gold` among `others`, so that the fraction of these before it is nearest to `depth_fraction`."""
    place = int(len(others) * depth_fraction + 0.5)
    return [*others[:place], *gold, *others[place:]]
