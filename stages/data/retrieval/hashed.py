"""Vectors of texts without a model: hashed TF-IDF, projected at random.

The weight of a term is (1 + ln count) * idf with idf = ln(1 + (N - df + 0.5) / (df + 0.5)). Signed feature hashing
(Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning") adds it to one of `num_buckets` features;
df is that of the bucket. A sparse random projection (Li, Hastie and Church 2006, "Very Sparse Random Projections")
turns these into `num_dimensions` numbers: each bucket adds to eight of them, with a random sign. The cosine of two such
vectors is that of the TF-IDF vectors, off by about 1 / sqrt(num_dimensions).

Terms are those of BM25 (`ropewalk.stages.data.retrieval.bags`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ropewalk.stages.data.retrieval.bags import Bags, make_bags
from ropewalk.stages.schema import seeded_rng

if TYPE_CHECKING:
    import numpy as np

_ENTRIES = 8


def hash_terms(terms: Sequence[str], num_buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """The bucket (int32) and the sign (float32) of each term: the same in every process and for ever."""
    import numpy as np

    digests = b"".join(hashlib.blake2b(term.encode(), digest_size=8).digest() for term in terms)
    hashes = np.frombuffer(digests, dtype="<u8")
    buckets = (hashes & np.uint64(2**63 - 1)) % np.uint64(num_buckets)
    return buckets.astype(np.int32), np.where(hashes >> np.uint64(63), 1, -1).astype(np.float32)


def bucket_frequencies(bags: Bags, buckets: np.ndarray, num_buckets: int) -> np.ndarray:
    """int64 `[num_buckets]`: in how many documents each bucket occurs."""
    import numpy as np

    documents = np.repeat(np.arange(len(bags.offsets) - 1, dtype=np.int64), np.diff(bags.offsets))
    occurrences = np.unique(documents * num_buckets + buckets[bags.terms])
    return np.bincount(occurrences % num_buckets, minlength=num_buckets)


def inverse_frequencies(frequencies: np.ndarray, num_documents: int) -> np.ndarray:
    """float32 `[num_buckets]`: idf of each bucket."""
    import numpy as np

    # Through math: numpy's logarithm has other last bits on other processors.
    distinct, places = np.unique(frequencies, return_inverse=True)
    values = [math.log1p((num_documents - df + 0.5) / (df + 0.5)) for df in distinct.tolist()]
    return np.asarray(values, dtype=np.float32)[places]


class HashedEncoder:
    """Texts to vectors, given the document frequencies of the corpus."""

    def __init__(self, inverse: np.ndarray, num_dimensions: int, seed: int) -> None:
        """`inverse`: from `inverse_frequencies`."""
        import numpy as np

        self._inverse, self._num_dimensions = inverse, num_dimensions
        rng = seeded_rng(seed, "hashed", len(inverse), num_dimensions)
        self._targets = rng.integers(0, num_dimensions, size=(len(inverse), _ENTRIES), dtype=np.int32)
        self._signs = rng.integers(0, 2, size=(len(inverse), _ENTRIES), dtype=np.int32).astype(np.float32) * 2 - 1

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 `[N, D]`; zeros for a text without a term."""
        import numpy as np

        from ropewalk.stages.data.compiled.retrieval import project

        bags, terms = make_bags(texts)
        vectors = np.zeros((len(texts), self._num_dimensions), dtype=np.float32)
        if terms:
            buckets, signs = hash_terms(terms, len(self._inverse))
            distinct, places = np.unique(bags.counts, return_inverse=True)
            logarithms = np.asarray([1 + math.log(count) for count in distinct.tolist()], dtype=np.float32)
            weights = logarithms[places] * signs[bags.terms]
            weights *= self._inverse[buckets[bags.terms]]
            project(bags.offsets, buckets[bags.terms], weights, self._targets, self._signs, vectors)
        return vectors
