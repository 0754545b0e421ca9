"""BM25 over whole documents, kept as bags of terms.

Scores are BM25 with b = 0.75 and k1 = 1.2 and idf = ln(1 + (N - df + 0.5) / (df + 0.5)) (the defaults of retriv, which
SPLiCe used); the constant factor k1 + 1 is left out. The query is a whole document, each term as often as it occurs, or
its `max_query_terms` strongest by count times idf. N, df and the mean length are those of the cluster.

Terms are lower-cased runs of two or more letters or digits: identifiers split at underscores, no stemming (wrong for
code) and no stop words (their idf is next to nothing). A document without a term finds nothing and is not found.

bm25s weighs the terms. The query is our own loop, which takes all terms of a document at once, knows which documents
are used, and orders by score and id. A score is added up in the order of the terms, so it does not depend on the order
of the documents.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

B, K1 = 0.75, 1.2
TERM = re.compile(r"[^\W_]{2,}")


def terms_of(text: str) -> list[str]:
    """The terms of a text, in order."""
    return TERM.findall(text.lower())


class Bags(NamedTuple):
    """The terms of N documents."""

    offsets: np.ndarray
    """int64 `[N + 1]`: where the terms of each document begin."""
    terms: np.ndarray
    """int32: distinct terms, ascending, numbered in alphabetical order."""
    counts: np.ndarray
    """int32: how often each occurs in the document."""


def make_bags(texts: Iterable[str]) -> tuple[Bags, list[str]]:
    """Count the terms of texts; also returns the terms by number."""
    import numpy as np

    vocabulary: dict[str, int] = {}
    terms, counts, ends = array("i"), array("i"), [0]
    for text in texts:
        bag = Counter(terms_of(text))
        terms.extend(vocabulary.setdefault(term, len(vocabulary)) for term in bag)
        counts.extend(bag.values())
        ends.append(len(terms))
    offsets = np.asarray(ends, dtype=np.int64)
    names = sorted(vocabulary)
    alphabetical = np.empty(len(names), dtype=np.int32)
    alphabetical[[vocabulary[term] for term in names]] = np.arange(len(names), dtype=np.int32)
    numbers = alphabetical[np.asarray(terms, dtype=np.int32)]
    order = np.lexsort((numbers, np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))))
    return Bags(offsets, numbers[order], np.asarray(counts, dtype=np.int32)[order]), names


def _weigh(bags: Bags, num_terms: int) -> dict[str, Any]:
    """Postings by term and their weights, from bm25s."""
    import bm25s
    import numpy as np

    repeated = np.repeat(bags.terms, bags.counts)
    ends = np.concatenate([[0], np.cumsum(bags.counts, dtype=np.int64)])[bags.offsets]
    corpus = [repeated[begin:end].tolist() for begin, end in pairwise(ends)]
    engine = bm25s.BM25(k1=K1, b=B, method="lucene")
    vocabulary = {str(term): term for term in range(num_terms)}
    engine.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
    return engine.scores


class Bm25Requery:
    """The nearest unused documents by BM25, exactly; see `ropewalk.stages.data.retrieval.pool.Requery`."""

    def __init__(self, bags: Bags, order: np.ndarray, max_query_terms: int | None = None) -> None:
        """Order as from `tie_order`; queries of all terms, or of the strongest."""
        import numpy as np

        offsets, terms, counts = bags
        num_terms = int(terms.max()) + 1 if len(terms) else 0
        num_documents = len(offsets) - 1
        self._bags, self._order, self._max_query_terms = bags, order, max_query_terms
        frequency = np.bincount(terms, minlength=num_terms)
        self._idf = np.log1p((num_documents - frequency + 0.5) / (frequency + 0.5))
        weighed = _weigh(bags, num_terms) if num_terms else None
        self._term_offsets = np.zeros(1, dtype=np.int64) if weighed is None else weighed["indptr"].astype(np.int64)
        self._postings = np.zeros(0, dtype=np.int32) if weighed is None else weighed["indices"]
        self._weights = np.zeros(0, dtype=np.float32) if weighed is None else weighed["data"]
        squares = (counts * self._idf[terms]) ** 2 if num_terms else np.zeros(0)
        sums = np.concatenate([[0.0], np.cumsum(squares)])[offsets]
        self._norms = np.sqrt(np.diff(sums))
        self._all_scores = np.zeros(num_documents, dtype=np.float64)

    def __call__(self, document: int, k: int, unused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Requery`."""
        import numpy as np

        from ropewalk.stages.data.compiled.retrieval import nearest_of_scores

        found, scores = np.empty(k, dtype=np.int64), np.empty(k, dtype=np.float32)
        count = nearest_of_scores(self.scores(document), document, unused, self._order, found, scores)
        return found[:count], scores[:count]

    def scores(self, document: int) -> np.ndarray:
        """float64 `[N]`: BM25 of every document, itself too, for `document` as the query. Overwritten by the next."""
        from ropewalk.stages.data.compiled.retrieval import add_postings

        self._all_scores[:] = 0
        terms, counts = self._query(document)
        add_postings(terms, counts, self._term_offsets, self._postings, self._weights, self._all_scores)
        return self._all_scores

    def similarity(self, one: int, other: int) -> float:
        """Cosine of the tf-idf vectors of two documents, 0 to 1."""
        import numpy as np

        if not self._norms[one] or not self._norms[other]:
            return 0.0
        terms, here, there = np.intersect1d(
            self._bag(one)[0], self._bag(other)[0], assume_unique=True, return_indices=True
        )
        shared = (self._bag(one)[1][here] * self._bag(other)[1][there] * self._idf[terms] ** 2).sum()
        return float(shared / (self._norms[one] * self._norms[other]))

    def _bag(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        place = slice(self._bags.offsets[document], self._bags.offsets[document + 1])
        return self._bags.terms[place], self._bags.counts[place]

    def _query(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        terms, counts = self._bag(document)
        if self._max_query_terms is None or len(terms) <= self._max_query_terms:
            return terms, counts
        strongest = np.sort(np.argsort(-counts * self._idf[terms], kind="stable")[: self._max_query_terms])
        return terms[strongest], counts[strongest]
