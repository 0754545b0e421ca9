"""The inner loops of retrieval: scores and the k best of them.

An order is always score, highest first, then place in the order of ids (`tie_order`), so that equal scores cannot be
told apart by a library's sort. The score of two vectors is the float32 sum of their products, added one by one in the
order of the dimensions: the same bits from every loop here, whatever it computes beside it, and on every processor.
Loops go over documents inside and over dimensions outside, which is what a compiler can vectorise without adding in
another order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_CHUNK = 256


@njit(cache=True)
def unit_rows(vectors: np.ndarray) -> None:
    """Give the rows of `vectors` (float32 `[N, D]`) length 1, in place; those of zeros stay."""
    for row in range(vectors.shape[0]):
        total = 0.0  # In double precision, where no square of a float32 overflows or vanishes.
        for dimension in range(vectors.shape[1]):
            total += np.float64(vectors[row, dimension]) ** 2
        if total > 0:
            norm = np.sqrt(total)
            for dimension in range(vectors.shape[1]):
                vectors[row, dimension] = vectors[row, dimension] / norm


@njit(cache=True)
def dot(one: np.ndarray, other: np.ndarray) -> np.float32:
    """The product of two vectors."""
    total = np.float32(0)
    for dimension in range(len(one)):
        total += one[dimension] * other[dimension]
    return total


@njit(cache=True)
def keep_best(
    found: np.ndarray, scores: np.ndarray, count: int, document: int, score: np.float32, tie_order: np.ndarray
) -> int:
    """Insert a document into the first `count` of `found`, if it is good enough; returns the new count."""
    place = count
    while place > 0 and (
        score > scores[place - 1] or (score == scores[place - 1] and tie_order[document] < tie_order[found[place - 1]])
    ):
        place -= 1
    if place == len(found):
        return count
    end = min(count, len(found) - 1)
    for slot in range(end, place, -1):
        found[slot], scores[slot] = found[slot - 1], scores[slot - 1]
    found[place], scores[place] = document, score
    return end + 1


@njit(cache=True)
def nearest_of_products(
    products: np.ndarray,
    first: int,
    vectors: np.ndarray,
    is_zero: np.ndarray,
    tie_order: np.ndarray,
    margin: float,
    found: np.ndarray,
    scores: np.ndarray,
) -> None:
    """The k nearest of the documents `first`, `first + 1`, ..., exactly.

    Args:
        products: float32 `[Q, N]`: a library's products of these documents with all. They differ from ours in the last
            bits, so they only say which documents can be among the k nearest.
        first: Number of the first query.
        vectors: float32 `[N, D]`, of length 1.
        is_zero: bool `[N]`: rows of zeros, near to nothing.
        tie_order: int32 `[N]`.
        margin: Twice what a library's product and ours may differ.
        found: int32 `[Q, k]`, filled with -1; the result.
        scores: float32 `[Q, k]`; the result.
    """
    best = np.empty(found.shape[1], dtype=np.float32)
    for row in range(products.shape[0]):
        query, count = first + row, 0
        if is_zero[query]:
            continue
        least = _kth_best(products[row], query, is_zero, best) - margin
        for begin in range(0, products.shape[1], _CHUNK):
            chunk = products[row, begin : begin + _CHUNK]
            if not _any_from(chunk, least):
                continue
            for place in range(len(chunk)):
                document = begin + place
                if chunk[place] >= least and document != query and not is_zero[document]:
                    score = dot(vectors[query], vectors[document])
                    count = keep_best(found[row], scores[row], count, document, score, tie_order)


@njit(cache=True)
def _any_from(values: np.ndarray, least: np.floating) -> bool:
    """Is any value `least` or more? A sum of comparisons, which vectorises where a branch does not."""
    count = 0
    for place in range(len(values)):
        count += values[place] >= least
    return count > 0


@njit(cache=True)
def _kth_best(products: np.ndarray, query: int, is_zero: np.ndarray, best: np.ndarray) -> np.float32:
    """The k-th highest product with another document, k the length of `best`, or minus infinity."""
    best[:] = -np.inf
    last = len(best) - 1
    for begin in range(0, len(products), _CHUNK):
        chunk = products[begin : begin + _CHUNK]
        if not _any_from(chunk, best[last]):
            continue
        for offset in range(len(chunk)):
            product, document = chunk[offset], begin + offset
            if product <= best[last] or document == query or is_zero[document]:
                continue
            place = last
            while place > 0 and product > best[place - 1]:
                best[place] = best[place - 1]
                place -= 1
            best[place] = product
    return best[last]


@njit(cache=True)
def nearest_of_candidates(
    candidates: np.ndarray,
    first: int,
    vectors: np.ndarray,
    is_zero: np.ndarray,
    tie_order: np.ndarray,
    found: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Like `nearest_of_products`, among the candidates (int64 `[Q, C]`, -1 for none) that an index found."""
    for row in range(candidates.shape[0]):
        query, count = first + row, 0
        if is_zero[query]:
            continue
        for document in candidates[row]:
            if document >= 0 and document != query and not is_zero[document]:
                score = dot(vectors[query], vectors[document])
                count = keep_best(found[row], scores[row], count, document, score, tie_order)


@njit(cache=True)
def _products_by_column(query: np.ndarray, columns: np.ndarray, stride: int, num: int, products: np.ndarray) -> None:
    """Products with the first `num` of `stride` vectors that lie dimension by dimension in `columns`."""
    for place in range(num):
        products[place] = 0
    for dimension in range(len(query)):
        factor = query[dimension]
        column = columns[dimension * stride : dimension * stride + num]
        for place in range(num):
            products[place] += factor * column[place]


@njit(cache=True)
def products_with(vectors: np.ndarray, direction: np.ndarray, products: np.ndarray) -> None:
    """The product of each vector with one direction."""
    for row in range(len(vectors)):
        products[row] = dot(vectors[row], direction)


@njit(cache=True)
def nearest_centroids(vectors: np.ndarray, centroids: np.ndarray, nearest: np.ndarray) -> None:
    """The nearest centroid of each vector, the first of equals; centroids lie dimension by dimension."""
    num_centroids = len(centroids) // vectors.shape[1]
    products = np.empty(num_centroids, dtype=np.float32)
    for row in range(len(vectors)):
        _products_by_column(vectors[row], centroids, num_centroids, num_centroids, products)
        nearest[row] = np.argmax(products)


@njit(cache=True)
def _swap(members: np.ndarray, columns: np.ndarray, begin: int, stride: int, one: int, other: int) -> None:
    members[begin + one], members[begin + other] = members[begin + other], members[begin + one]
    num_dimensions = len(columns) // len(members)
    for dimension in range(num_dimensions):
        start = begin * num_dimensions + dimension * stride
        columns[start + one], columns[start + other] = columns[start + other], columns[start + one]


@njit(cache=True)
def _settle(members: np.ndarray, columns: np.ndarray, begin: int, stride: int, live: int, unused: np.ndarray) -> int:
    """Bring back members that are unused again, and move the used behind the rest once they are most; the new count.

    The order inside a list has no meaning: what is found is ordered by score and id.
    """
    num_used = 0
    for place in range(live):
        num_used += not unused[members[begin + place]]
    if 2 * num_used > live:
        place = 0
        while place < live:
            if unused[members[begin + place]]:
                place += 1
            else:
                live -= 1
                _swap(members, columns, begin, stride, place, live)
    for place in range(live, stride):
        if unused[members[begin + place]]:
            _swap(members, columns, begin, stride, place, live)
            live += 1
    return live


@njit(cache=True)
def nearest_unused(
    query: np.ndarray,
    document: int,
    unused: np.ndarray,
    num_probes: int,
    num_scored: int,
    centroids: np.ndarray,
    offsets: np.ndarray,
    live: np.ndarray,
    members: np.ndarray,
    columns: np.ndarray,
    tie_order: np.ndarray,
    found: np.ndarray,
    scores: np.ndarray,
) -> int:
    """The nearest documents of which `unused` is true, from the nearest lists.

    Args:
        query: float32 `[D]`.
        document: The query's number, never found.
        unused: bool `[N]`.
        num_probes: Fewest lists to search.
        num_scored: Fewest documents to score. More lists are searched until there were so many, and k were found.
        centroids: float32, the L centroids dimension by dimension.
        offsets: int64 `[L + 1]`: where each list begins in `members`.
        live: int64 `[L]`: how many of each list are scored; those behind them are used. Updated.
        members: int32 `[M]`: documents by list. Reordered inside a list.
        columns: float32: the members' vectors, dimension by dimension inside each list. Reordered with them.
        tie_order: int32 `[N]`.
        found: int32 `[k]`; the result.
        scores: float32 `[k]`; the result.
    Returns how many were found.
    """
    num_lists, num_dimensions = len(live), len(query)
    nearness = np.empty(num_lists, dtype=np.float32)
    _products_by_column(query, centroids, num_lists, num_lists, nearness)
    probed = np.zeros(num_lists, dtype=np.bool_)
    products = np.empty(np.max(live) if num_lists else 0, dtype=np.float32)
    count, scored = 0, 0
    for probe in range(num_lists):
        if probe >= num_probes and scored >= num_scored and count == len(found):
            break
        nearest = -1
        for number in range(num_lists):
            if not probed[number] and (nearest < 0 or nearness[number] > nearness[nearest]):
                nearest = number
        probed[nearest] = True
        begin, stride = offsets[nearest], offsets[nearest + 1] - offsets[nearest]
        live[nearest] = _settle(members, columns, begin, stride, live[nearest], unused)
        if live[nearest] > len(products):
            products = np.empty(live[nearest], dtype=np.float32)
        block = columns[begin * num_dimensions : (begin + stride) * num_dimensions]
        _products_by_column(query, block, stride, live[nearest], products)
        scored += live[nearest]
        for place in range(live[nearest]):
            other = members[begin + place]
            score = np.float32(products[place])
            if count == len(found) and score < scores[count - 1]:
                continue
            if unused[other] and other != document:
                count = keep_best(found, scores, count, other, score, tie_order)
    return count


@njit(cache=True)
def add_postings(
    terms: np.ndarray,
    counts: np.ndarray,
    term_offsets: np.ndarray,
    postings: np.ndarray,
    weights: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Add to `scores` (float64 `[N]`) what the terms of a query, each so many times, add to each document."""
    for number in range(len(terms)):
        for place in range(term_offsets[terms[number]], term_offsets[terms[number] + 1]):
            scores[postings[place]] += np.float64(weights[place]) * counts[number]


@njit(cache=True)
def nearest_of_scores(
    all_scores: np.ndarray,
    document: int,
    unused: np.ndarray,
    tie_order: np.ndarray,
    found: np.ndarray,
    scores: np.ndarray,
) -> int:
    """The documents with the highest score above 0 of which `unused` is true; returns how many were found."""
    count = 0
    for other in range(len(all_scores)):
        score = np.float32(all_scores[other])
        if score <= 0 or (count == len(found) and score < scores[count - 1]):
            continue
        if unused[other] and other != document:
            count = keep_best(found, scores, count, other, score, tie_order)
    return count


@njit(cache=True)
def next_unused(document: int, unused: np.ndarray, found: np.ndarray) -> int:
    """The documents after `document`, and after the last those before it, of which `unused` is true; how many."""
    count = 0
    for step in range(1, len(unused)):
        other = (document + step) % len(unused)
        if count == len(found):
            break
        if unused[other]:
            found[count] = other
            count += 1
    return count


@njit(cache=True)
def project(
    offsets: np.ndarray,
    buckets: np.ndarray,
    weights: np.ndarray,
    targets: np.ndarray,
    signs: np.ndarray,
    vectors: np.ndarray,
) -> None:
    """Add each document's weighted buckets to its vector, each to its targets with its signs."""
    for document in range(len(offsets) - 1):
        for place in range(offsets[document], offsets[document + 1]):
            bucket = buckets[place]
            for entry in range(targets.shape[1]):
                vectors[document, targets[bucket, entry]] += weights[place] * signs[bucket, entry]
