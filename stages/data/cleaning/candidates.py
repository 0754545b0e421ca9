"""Pairs of documents that agree in a band of their signatures.

Work is cut by band and by range of hashes: a unit reads only its range from each shard, because the shards' bands are
sorted. Its memory is bounded by `PART_DOCUMENTS`, whatever the corpus.

Without verification the documents that agree in a band are one chain. With verification the estimated similarity of a
pair decides. In a group of up to `ALL_PAIRS` documents all pairs are compared. In a larger one, which web boilerplate
makes, comparing all would be quadratic: its first document is compared with the others, then the first that was similar
to none, and so on for `ALL_PAIRS` rounds; who is left then is counted as `num_not_compared`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ropewalk.stages.data.cleaning.signatures import SignatureStore

if TYPE_CHECKING:
    import numpy as np

PART_DOCUMENTS = 2**22
"""About so many documents are sorted at once."""
ALL_PAIRS = 64
"""Documents of a group that are all compared with each other, and rounds of a larger group."""
_BATCH_PAIRS = 2**20


class BandPart(NamedTuple):
    """A piece of work: the hashes of one band from `part` to `part + 1` of `num_parts`."""

    band: int
    part: int
    num_parts: int

    @property
    def limits(self) -> tuple[int, int]:
        """First hash, and the first behind the last."""
        return self.part * 2**64 // self.num_parts, (self.part + 1) * 2**64 // self.num_parts


def band_parts(num_bands: int, num_documents: int) -> list[BandPart]:
    """All pieces of work. They follow from the corpus, never from the number of workers."""
    num_parts = max(1, -(-num_documents // PART_DOCUMENTS))
    return [BandPart(band, part, num_parts) for band in range(num_bands) for part in range(num_parts)]


@dataclass
class PairFinder:
    """Writes `pairs.npy` `[k, 2]` int64, numbers of the store, for one piece of work after another."""

    store: SignatureStore
    threshold: float | None
    """Estimated similarity below which a pair is no pair. None: all that agree in a band are pairs."""

    def __call__(self, work: BandPart, folder: Path) -> dict[str, int]:
        """Returns `num_candidates` that were compared, `num_pairs` that were found and `num_not_compared`."""
        import numpy as np

        members, bounds = self.groups(work)
        counts = {"num_candidates": 0, "num_pairs": 0, "num_not_compared": 0}
        found = []
        for candidates in self._candidates(members, bounds):
            counts["num_candidates"] += len(candidates)
            if self.threshold is not None:
                candidates = candidates[self.store.similarities(candidates) >= self.threshold]
            found.append(candidates)
        for group in self._large(bounds):
            links, compared, left = self._by_rounds(members[bounds[group] : bounds[group + 1]])
            counts["num_candidates"] += compared
            counts["num_not_compared"] += left
            found.append(links)
        pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
        counts["num_pairs"] = len(pairs)
        np.save(folder / "pairs.npy", pairs)
        return counts

    def groups(self, work: BandPart) -> tuple[np.ndarray, np.ndarray]:
        """Documents that agree with another one, group by group, ascending in each, and the groups' bounds."""
        import numpy as np

        hashes, numbers = self._read(work)
        order = np.argsort(hashes, kind="stable")
        hashes, numbers = hashes[order], numbers[order]
        starts = (
            np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])) if len(hashes) else np.zeros(0, int)
        )
        sizes = np.diff(np.concatenate([starts, [len(hashes)]]))
        members = numbers[np.repeat(sizes > 1, sizes)]
        return members, np.concatenate([[0], np.cumsum(sizes[sizes > 1])]).astype(np.int64)

    def _read(self, work: BandPart) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        low, high = work.limits
        hashes, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for shard in range(len(self.store.folders)):
            band = self.store.array(shard, "bands")[work.band]
            begin = int(np.searchsorted(band, np.uint64(low)))
            end = len(band) if high == 2**64 else int(np.searchsorted(band, np.uint64(high)))
            hashes.append(np.asarray(band[begin:end]))
            rows = self.store.array(shard, "band_rows")[work.band, begin:end]
            numbers.append(rows.astype(np.int64) + self.store.starts[shard])
        return np.concatenate(hashes), np.concatenate(numbers)

    def _large(self, bounds: np.ndarray) -> list[int]:
        import numpy as np

        return [] if self.threshold is None else np.flatnonzero(np.diff(bounds) > ALL_PAIRS).tolist()

    def _candidates(self, members: np.ndarray, bounds: np.ndarray) -> Iterator[np.ndarray]:
        """Pairs `[k, 2]` of the groups that need no rounds, a bounded number at a time."""
        import numpy as np

        if self.threshold is None:
            first = np.repeat(members[bounds[:-1]], np.diff(bounds)) if len(members) else members
            yield np.stack([first, members], axis=1)[first != members]
            return
        sizes = np.diff(bounds)
        for size in np.unique(sizes[sizes <= ALL_PAIRS]).tolist():
            left, right = np.triu_indices(size, 1)
            starts = bounds[:-1][sizes == size]
            step = max(1, _BATCH_PAIRS // len(left))
            for begin in range(0, len(starts), step):
                places = starts[begin : begin + step, None]
                yield np.stack([members[places + left].ravel(), members[places + right].ravel()], axis=1)

    def _by_rounds(self, group: np.ndarray) -> tuple[np.ndarray, int, int]:
        """The pairs of a large group, how many were compared, and how many documents were left."""
        import numpy as np

        assert self.threshold is not None
        links, compared = [np.zeros((0, 2), np.int64)], 0
        for _ in range(ALL_PAIRS):
            if len(group) < 2:
                return np.concatenate(links), compared, 0
            pairs = np.stack([np.full(len(group) - 1, group[0]), group[1:]], axis=1)
            similar = self.store.similarities(pairs) >= self.threshold
            links.append(pairs[similar])
            compared += len(pairs)
            group = group[1:][~similar]
        return np.concatenate(links), compared, len(group)
