"""Which documents are like which: BM25 over whole documents, and the nearest that are still unused.

Scores are BM25 with b = 0.75 and k1 = 1.2 and idf = ln(1 + (N - df + 0.5) / (df + 0.5)) (the defaults of retriv, which
SPLiCe used); the constant factor k1 + 1 is left out. The query is a whole document, each term as often as it occurs.
Terms are lower-cased runs of two or more letters or digits: identifiers split at underscores, no stemming (wrong for
code) and no stop words (their idf is next to nothing).

Order is always score, highest first, then document id, so that ties cannot depend on a library's sort.

Methods need the k nearest documents *that are still unused*. A list made in advance runs dry, as near neighbours are
often mutual: so each document has a list of `num_candidates`, made in parallel, and when fewer than k of it are unused
the document is asked again with the used ones masked. The result is exact: it equals asking anew every time.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ropewalk.stages.schema import iterate_table
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.context import Context

B, K1 = 0.75, 1.2
TERM = re.compile(r"[^\W_]{2,}")
DOCUMENTS_PER_TASK = 256


class Hit(NamedTuple):
    """A document found near another."""

    document: int
    score: float
    rank: int
    """Place in the candidate list, from 0; -1 if the masked query found it."""


@dataclass(frozen=True)
class Bm25:
    """An index of N documents over V terms. Build it with `build_index`."""

    tie_order: np.ndarray
    """int64 `[N]`: place of each document in the order of ids."""
    terms: list[np.ndarray]
    """N times int64: the distinct terms of each document, ascending."""
    term_counts: list[np.ndarray]
    """N times int64: how often each occurs."""
    term_offsets: np.ndarray
    """int64 `[V + 1]`: where each term's postings begin."""
    postings: np.ndarray
    """int32: documents by term."""
    weights: np.ndarray
    """float32: what one occurrence in a query adds to the score of each posting's document."""
    max_query_terms: int | None
    """Ask only with so many terms, those with the highest count times idf. None asks with all."""

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.terms)

    def idf(self, terms: np.ndarray) -> np.ndarray:
        """float64: inverse document frequency of terms."""
        import numpy as np

        frequency = self.term_offsets[terms + 1] - self.term_offsets[terms]
        return np.log1p((self.num_documents - frequency + 0.5) / (frequency + 0.5))

    def scores(self, document: int) -> np.ndarray:
        """float64 `[N]`: BM25 of every document for `document` as the query; 0 for itself."""
        import numpy as np

        terms, counts = self.terms[document], self.term_counts[document]
        if self.max_query_terms is not None and len(terms) > self.max_query_terms:
            strongest = np.argsort(-counts * self.idf(terms), kind="stable")[: self.max_query_terms]
            terms, counts = terms[strongest], counts[strongest]
        begins = self.term_offsets[terms]
        lengths = self.term_offsets[terms + 1] - begins
        # The postings of all terms at once: term by term, once per occurrence, bm25s takes ten times as long.
        shifts = begins - np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(terms) else begins
        places = np.repeat(shifts, lengths) + np.arange(lengths.sum())
        added = self.weights[places].astype(np.float64) * np.repeat(counts, lengths)
        scores = np.bincount(self.postings[places], weights=added, minlength=self.num_documents)
        scores[document] = 0.0
        return scores

    def nearest(self, scores: np.ndarray, k: int) -> np.ndarray:
        """The k documents with the highest score above 0, fewer if there are not so many, in order."""
        import numpy as np

        found = np.flatnonzero(scores > 0)
        if len(found) > k:
            threshold = np.partition(scores[found], len(found) - k)[len(found) - k]
            found = found[scores[found] >= threshold]
        return found[np.lexsort((self.tie_order[found], -scores[found]))][:k]

    def similarity(self, one: int, other: int) -> float:
        """Cosine of the tf-idf vectors of two documents, 0 to 1."""
        import numpy as np

        _, here, there = np.intersect1d(self.terms[one], self.terms[other], assume_unique=True, return_indices=True)
        vectors = [self.term_counts[d] * self.idf(self.terms[d]) for d in (one, other)]
        norm = float(np.sqrt((vectors[0] ** 2).sum() * (vectors[1] ** 2).sum()))
        return float((vectors[0][here] * vectors[1][there]).sum()) / norm if norm else 0.0


def build_index(doc_ids: Sequence[str], texts: Iterable[tuple[str, str]], max_query_terms: int | None = None) -> Bm25:
    """Index the documents `doc_ids`, whose texts are among the pairs (document id, text).

    Raises ValueError if a text is missing or there is no word in any of them.
    """
    import bm25s
    import numpy as np

    place = {doc_id: document for document, doc_id in enumerate(doc_ids)}
    vocabulary: dict[str, int] = {}
    corpus: list[array[int] | None] = [None] * len(doc_ids)
    for doc_id, text in texts:
        if doc_id in place:
            words = TERM.findall(text.lower())
            corpus[place[doc_id]] = array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words])
    missing = [doc_id for doc_id, words in zip(doc_ids, corpus, strict=True) if words is None]
    if missing:
        raise ValueError(f"slot documents lacks {missing[0]!r} and {len(missing) - 1} more documents of slot tokens")
    if not vocabulary:
        raise ValueError("slot documents holds no word of two letters to retrieve by: pack these documents instead")
    engine = bm25s.BM25(k1=K1, b=B, method="lucene")
    engine.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
    distinct = [np.unique(np.asarray(words, dtype=np.int64), return_counts=True) for words in corpus]
    tie_order = np.empty(len(doc_ids), dtype=np.int64)
    tie_order[sorted(range(len(doc_ids)), key=lambda document: doc_ids[document])] = np.arange(len(doc_ids))
    return Bm25(
        tie_order=tie_order,
        terms=[terms for terms, _ in distinct],
        term_counts=[counts for _, counts in distinct],
        term_offsets=np.asarray(engine.scores["indptr"], dtype=np.int64),
        postings=engine.scores["indices"],
        weights=engine.scores["data"],
        max_query_terms=max_query_terms,
    )


def iterate_texts(folder: Path) -> Iterable[tuple[str, str]]:
    """Pairs of document id and text of a Documents artifact."""
    for batch in iterate_table(folder, "documents", ["doc_id", "text"]):
        yield from zip(batch.column("doc_id").to_pylist(), batch.column("text").to_pylist(), strict=True)


@dataclass(frozen=True)
class CandidateLists:
    """Task of `map_shards`: the candidate lists of a range of documents."""

    index: Bm25
    num_candidates: int

    def __call__(self, documents: range, folder: Path) -> dict[str, int]:
        """Write the nearest documents of each, in order."""
        import numpy as np

        found, scores = [], []
        for document in documents:
            all_scores = self.index.scores(document)
            found.append(self.index.nearest(all_scores, self.num_candidates))
            scores.append(all_scores[found[-1]])
        np.save(folder / "lengths.npy", np.asarray([len(nearest) for nearest in found], dtype=np.int64))
        np.save(folder / "documents.npy", np.concatenate(found).astype(np.int64))
        np.save(folder / "scores.npy", np.concatenate(scores).astype(np.float64))
        return {"num_documents": len(documents)}


def _read_lists(folder: Path) -> Iterator[list[Hit]]:
    """What `CandidateLists` wrote."""
    import numpy as np

    lengths, documents, scores = (np.load(folder / f"{name}.npy") for name in ("lengths", "documents", "scores"))
    ends = np.cumsum(lengths)
    for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        pairs = zip(documents[start:end].tolist(), scores[start:end].tolist(), strict=True)
        yield [Hit(other, score, rank) for rank, (other, score) in enumerate(pairs)]


class Bm25Neighbours:
    """The nearest unused documents by BM25, from lists made in advance where these suffice."""

    def __init__(self, index: Bm25, lists: list[list[Hit]]) -> None:
        self.index = index
        self.lists = lists
        self.num_lookups = 0
        self.num_fallbacks = 0

    @classmethod
    def build(cls, index: Bm25, num_candidates: int, context: Context) -> Bm25Neighbours:
        """Make the lists of all documents, in parallel where the context can; finished ones outlive a crash."""
        starts = range(0, index.num_documents, DOCUMENTS_PER_TASK)
        tasks = {str(start): range(start, min(start + DOCUMENTS_PER_TASK, index.num_documents)) for start in starts}
        build = partial(CandidateLists, index, num_candidates)
        work = map_shards(context, build, tasks, label="candidates", unit="retrieval tasks")
        lists = [hits for shard in work for hits in _read_lists(shard.folder)]
        return cls(index, lists)

    def nearest_unused(self, document: int, k: int, unused: np.ndarray, rng: np.random.Generator) -> list[Hit]:
        """The k nearest documents of which `unused` (bool `[N]`) is true, fewer only if no more share a term."""
        self.num_lookups += 1
        hits = [hit for hit in self.lists[document] if unused[hit.document]][:k]
        if len(hits) == k:
            return hits
        self.num_fallbacks += 1
        scores = self.index.scores(document) * unused
        ranks = {hit.document: hit.rank for hit in hits}
        found = self.index.nearest(scores, k).tolist()
        return [Hit(other, float(scores[other]), ranks.get(other, -1)) for other in found]


class RandomNeighbours:
    """Example packing, the control: any unused documents, drawn uniformly."""

    num_lookups = 0
    num_fallbacks = 0

    def nearest_unused(self, document: int, k: int, unused: np.ndarray, rng: np.random.Generator) -> list[Hit]:
        """k unused documents at random, fewer if there are not so many; score 0."""
        import numpy as np

        left = np.flatnonzero(unused)
        chosen = rng.choice(left, size=min(k, len(left)), replace=False).tolist() if len(left) else []
        return [Hit(int(other), 0.0, rank) for rank, other in enumerate(chosen)]
