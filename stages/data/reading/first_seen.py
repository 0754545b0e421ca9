"""Which of many digests occur for the first time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_BUCKETS = 16
"""The digests are sorted a bucket at a time, which bounds the memory of sorting."""


def first_seen(digests: np.ndarray) -> np.ndarray:
    """True where a digest has no equal before it. `digests`: uint64 `[num, 2]`, 128 random bits each.

    Memory beside the digests: two bytes each, and about 32 bytes for each sixteenth of them.
    """
    import numpy as np

    first = np.zeros(len(digests), dtype=bool)
    buckets = np.ascontiguousarray(digests).view(np.uint8)[:, 0] % _BUCKETS
    for bucket in range(_BUCKETS):
        places = np.flatnonzero(buckets == bucket)
        high, low = digests[places].T
        order = np.lexsort((low, high))  # Stable: among equals, the earlier place comes first.
        new = np.ones(len(order), dtype=bool)
        new[1:] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
        first[places[order[new]]] = True
    return first
