"""Counts different names of a corpus of any size, in bounded memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

_PART_NAMES = 2**23
"""About so many hashes are in memory at once."""


class DistinctNames:
    """Keeps 64-bit hashes of names in files, and counts them range by range.

    Of n names about n^2 / 2^65 are taken for others: of 1e8 less than one in a thousand corpora.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is emptied: an attempt before may have left it half full."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder = folder
        self._sizes: list[int] = []

    def add(self, names: Iterable[str]) -> None:
        """Take note of names; any of them may have been there before."""
        import numpy as np

        hashes = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
        distinct = np.unique(np.frombuffer(b"".join(hashes), np.uint64))
        np.save(self._folder / f"{len(self._sizes)}.npy", distinct)
        self._sizes.append(len(distinct))

    def count(self) -> int:
        """How many different names there were."""
        import numpy as np

        num_parts = max(1, -(-sum(self._sizes) // _PART_NAMES))
        limits = [np.uint64(part * 2**64 // num_parts) for part in range(num_parts)]
        total = 0
        for part, low in enumerate(limits):
            found = [np.zeros(0, np.uint64)]
            for number, size in enumerate(self._sizes):
                hashes = np.load(self._folder / f"{number}.npy", mmap_mode="r" if size else None)
                end = int(np.searchsorted(hashes, limits[part + 1])) if part + 1 < num_parts else size
                found.append(np.asarray(hashes[int(np.searchsorted(hashes, low)) : end]))
            total += len(np.unique(np.concatenate(found)))
        return total

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self._folder)
