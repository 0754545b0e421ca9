"""Nearest documents by the inner product of vectors of length 1: exact, or through a Faiss index with re-ranking.

An index only proposes candidates. Every score and every order comes from `ropewalk.stages.data.compiled.retrieval`, so
ties go by document id and the same pair has the same score wherever it turns up.

Fine lists are what an inverted file has: the vectors of a cluster, divided by k-means. The neighbours artifact keeps
them, and the masked re-query scans the same ones (`Faiss wiki, "Inverted file"`; measured in shared/specs/data.md 7.1).
k-means runs in Faiss, on one thread and seeded; its bits are those of one kind of processor, whatever else runs there.

A vector of zeros (a document without a term) is in no list: it has no neighbours and is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Index = Literal["exact", "ivf", "ivfpq"]

REQUERY_PROBES = 8
"""Lists that a re-query scans, more if these run dry: 8 of 256 came within 0.2 % of the exact greedy result."""
FEWEST_INDEXED = 1024
"""Below so many documents every search is exact: an index would take longer and find less."""
MOST_EXACT = 16_384
"""`auto` searches clusters up to this size exactly: all products take 2 core-seconds there at 256 dimensions."""
MOST_UNCOMPRESSED = 1_000_000
"""`auto` uses IVF up to this size and IVF+PQ above, where a scan of whole vectors is bound by memory."""
_ITERATIONS = 10
_PRODUCTS_IN_MEMORY = 2**25
_LEAST_SCORED = 4
"""A re-query scores at least this part (one fourth) of what `num_probes` full lists hold."""
_PQ_BYTES = 64
_PQ_SAMPLES_PER_CENTROID = 64
_FEWEST_PER_LIST = 16


def unit_vectors(vectors: Any) -> np.ndarray:
    """float32 `[N, D]` copy of vectors, each of length 1 or all zeros."""
    import numpy as np

    from ropewalk.stages.data.compiled.retrieval import unit_rows

    result = np.array(vectors, dtype=np.float32, order="C", ndmin=2)
    unit_rows(result)
    return result


def tie_order(doc_ids: Sequence[str]) -> np.ndarray:
    """int32 `[N]`: place of each document in the order of ids."""
    import numpy as np

    order = np.empty(len(doc_ids), dtype=np.int32)
    order[sorted(range(len(doc_ids)), key=lambda document: doc_ids[document])] = np.arange(len(doc_ids))
    return order


def zero_rows(vectors: np.ndarray) -> np.ndarray:
    """bool `[N]`: which vectors are all zeros."""
    import numpy as np

    return ~np.any(vectors, axis=1)


@contextmanager
def one_thread() -> Iterator[Any]:
    """Faiss, on one thread while the context lasts: sums then have one order."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def train_centroids(vectors: np.ndarray, num_centroids: int, seed: int) -> np.ndarray:
    """float32 `[C, D]`: spherical k-means of float32 vectors, at least as many as centroids."""
    with one_thread() as faiss:
        kmeans = faiss.Kmeans(
            vectors.shape[1],
            num_centroids,
            niter=_ITERATIONS,
            seed=seed % 2**31,
            spherical=True,
            min_points_per_centroid=1,
        )
        kmeans.train(vectors)
    return kmeans.centroids


def by_dimension(vectors: np.ndarray) -> np.ndarray:
    """float32 `[D * N]`: first dimension of all vectors, second of all, ..."""
    import numpy as np

    return np.ascontiguousarray(vectors.T).reshape(-1)


def assign(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int32 `[N]`: the nearest centroid of each vector, the first of equals."""
    import numpy as np

    from ropewalk.stages.data.compiled.retrieval import nearest_centroids

    nearest = np.empty(len(vectors), dtype=np.int32)
    nearest_centroids(vectors, by_dimension(centroids), nearest)
    return nearest


def fine_lists(vectors: np.ndarray, order: np.ndarray, seed: int) -> np.ndarray:
    """int32 `[N]`: the fine list of each vector, about sqrt(N) lists, none of them empty; -1 for zeros.

    `order` is that of `tie_order`: vectors are trained on by id, so the lists do not depend on the order of the corpus.
    """
    import numpy as np

    lists = np.full(len(vectors), -1, dtype=np.int32)
    used = np.argsort(order)
    used = used[~zero_rows(vectors)[used]]
    num_lists = round(len(used) ** 0.5)
    if num_lists < _FEWEST_PER_LIST:
        lists[used] = 0
        return lists
    centroids = train_centroids(vectors[used], num_lists, seed)
    lists[used] = np.unique(assign(vectors[used], centroids), return_inverse=True)[1]
    return lists


def list_centroids(vectors: np.ndarray, lists: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members by list (int32 `[M]`), where each list begins (int64 `[L + 1]`), centroids (float32 `[L, D]`)."""
    import numpy as np

    members = np.argsort(lists, kind="stable").astype(np.int32)
    members = members[np.count_nonzero(lists < 0) :]
    _, counts = np.unique(lists[members], return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    means = [vectors[members[begin:end]].mean(axis=0) for begin, end in pairwise(offsets)]
    return members, offsets, unit_vectors(np.asarray(means, dtype=np.float32).reshape(-1, vectors.shape[1]))


def choose_index(num_documents: int, wanted: Index | Literal["auto"]) -> Index:
    """The index kind for a cluster: what is wanted, or by size; exact where an index makes no sense."""
    if num_documents < FEWEST_INDEXED:
        return "exact"
    if wanted != "auto":
        return wanted
    if num_documents <= MOST_EXACT:
        return "exact"
    return "ivf" if num_documents <= MOST_UNCOMPRESSED else "ivfpq"


class DenseSearch:
    """The nearest others of documents of a cluster."""

    def __init__(self, vectors: np.ndarray, lists: np.ndarray, order: np.ndarray, kind: Index, num_probes: int) -> None:
        """Build the index, if there is to be one.

        Args:
            vectors: From `unit_vectors`.
            lists: From `fine_lists`; read by `ivf` and `ivfpq`.
            order: From `tie_order`.
            kind: `exact` compares all pairs. The others score what lies in the `num_probes` nearest lists.
            num_probes: See `kind`.
        """
        self._vectors, self._order, self._kind = vectors, order, kind
        self._is_zero = zero_rows(vectors)
        self._index = None if kind == "exact" else _build_index(vectors, lists, kind, num_probes)

    def __call__(self, start: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Of documents `start` to `stop`: numbers (int32 `[n, k]`, -1 for none) and scores (float32)."""
        import numpy as np

        found = np.full((stop - start, k), -1, dtype=np.int32)
        scores = np.zeros((stop - start, k), dtype=np.float32)
        # The size of a block says nothing about the result, but it bounds the memory.
        width = len(self._vectors) if self._index is None else 8 * max(self._num_candidates(k), self._vectors.shape[1])
        block = max(1, _PRODUCTS_IN_MEMORY // width)
        for begin in range(start, stop, block):
            rows = slice(begin - start, min(begin + block, stop) - start)
            self._search(begin, found[rows], scores[rows])
        return found, scores

    def _search(self, start: int, found: np.ndarray, scores: np.ndarray) -> None:
        from ropewalk.stages.data.compiled.retrieval import nearest_of_candidates, nearest_of_products

        queries = self._vectors[start : start + len(found)]
        if self._index is None:
            # Each of the two products is off by at most D * 2^-24 for vectors of length 1, in any order of the sum.
            margin = 4 * queries.shape[1] * 2.0**-24
            products = queries @ self._vectors.T
            nearest_of_products(products, start, self._vectors, self._is_zero, self._order, margin, found, scores)
            return
        with one_thread():
            _, candidates = self._index.search(queries, self._num_candidates(found.shape[1]))
        nearest_of_candidates(candidates, start, self._vectors, self._is_zero, self._order, found, scores)

    def _num_candidates(self, k: int) -> int:
        # More than are kept: so that equal scores at the end are told apart by id, and PQ's errors are mended.
        return (4 if self._kind == "ivfpq" else 2) * (k + 1)


def _build_index(vectors: np.ndarray, lists: np.ndarray, kind: Index, num_probes: int) -> Any:
    """A Faiss inverted file over our lists."""
    members, offsets, centroids = list_centroids(vectors, lists)
    num_dimensions = vectors.shape[1]
    with one_thread() as faiss:
        quantizer = faiss.IndexFlatIP(num_dimensions)
        quantizer.add(centroids)
        arguments = (quantizer, num_dimensions, len(offsets) - 1)
        if kind == "ivf":
            index: Any = faiss.IndexIVFFlat(*arguments, faiss.METRIC_INNER_PRODUCT)
        else:
            index = faiss.IndexIVFPQ(*arguments, pq_bytes(num_dimensions), 8, faiss.METRIC_INNER_PRODUCT)
            # Faiss's own defaults, 25 rounds over 65,536 vectors, took a minute where this takes seconds.
            index.pq.cp.niter, index.pq.cp.max_points_per_centroid = _ITERATIONS, _PQ_SAMPLES_PER_CENTROID
            index.pq.cp.min_points_per_centroid = 1
        index.train(vectors[members])
        index.add_with_ids(vectors[members], members.astype("int64"))
    index.nprobe = num_probes
    return index


def pq_bytes(num_dimensions: int) -> int:
    """Bytes of a product-quantised vector: at most 64 and at most one for four dimensions, which it must divide."""
    most = max(1, min(_PQ_BYTES, num_dimensions // 4))
    return max(size for size in range(1, most + 1) if num_dimensions % size == 0)


class DenseRequery:
    """The nearest unused documents, from the nearest fine lists; see `ropewalk.stages.data.retrieval.pool.Requery`.

    Holds the vectors twice, by document and by list: 8 bytes a dimension and document.
    """

    def __init__(
        self, vectors: np.ndarray, lists: np.ndarray, order: np.ndarray, num_probes: int = REQUERY_PROBES
    ) -> None:
        """Vectors as from `unit_vectors`, lists as from `fine_lists`, order as from `tie_order`."""
        import numpy as np

        self._vectors, self._order, self._num_probes = vectors, order, num_probes
        self._is_zero = zero_rows(vectors)
        self._members, self._offsets, centroids = list_centroids(vectors, lists)
        self._live = np.diff(self._offsets)
        # The more documents are used, the more lists it takes to choose among as many.
        self._num_scored = (
            num_probes * len(self._members) // (_LEAST_SCORED * len(self._live)) if len(self._live) else 0
        )
        self._centroids = by_dimension(centroids)
        self._columns = np.empty(len(self._members) * vectors.shape[1], dtype=np.float32)
        for begin, end in pairwise(self._offsets):
            block = self._columns[begin * vectors.shape[1] : end * vectors.shape[1]]
            block[:] = by_dimension(vectors[self._members[begin:end]])

    def __call__(self, document: int, k: int, unused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Requery`. Exact when all lists are scanned."""
        import numpy as np

        from ropewalk.stages.data.compiled.retrieval import nearest_unused

        found, scores = np.empty(k, dtype=np.int32), np.empty(k, dtype=np.float32)
        if self._is_zero[document]:
            return found[:0].astype(np.int64), scores[:0]
        count = nearest_unused(
            self._vectors[document],
            document,
            unused,
            self._num_probes,
            self._num_scored,
            self._centroids,
            self._offsets,
            self._live,
            self._members,
            self._columns,
            self._order,
            found,
            scores,
        )
        return found[:count].astype(np.int64), scores[:count]

    def similarity(self, one: int, other: int) -> float:
        """Cosine of two documents, -1 to 1; 0 for a vector of zeros."""
        from ropewalk.stages.data.compiled.retrieval import dot

        return float(dot(self._vectors[one], self._vectors[other]))
