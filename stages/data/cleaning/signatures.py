"""MinHash signatures of one Documents shard after another, kept as arrays that later steps map into memory.

The signature is datasketch's (scheme `affine32`: a fixed pre-mix, then a*h + b modulo 2^32 with odd a), fed with
hashes of word or character n-grams. A document with fewer units than an n-gram has them all as its only n-gram; one
without any unit has no signature and is compared with nothing.

A shard's folder holds, m being the number of its documents with a signature, P permutations and b bands:
    signatures.npy   [m, P] uint32
    bands.npy        [b, m] uint64: hashes of the bands, each band sorted
    band_rows.npy    [b, m] uint32: which of the m documents each hash belongs to
    rows.npy         [m] uint32: their rows in the shard
    sizes.npy        [m] int64: their `num_bytes`
    names.arrow      their `doc_id`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.cleaning.shard_tables import read_shard
from ropewalk.stages.data.cleaning.words import (
    Unit,
    WordHashes,
    character_hashes,
    fold,
    ngram_hashes,
)

if TYPE_CHECKING:
    import numpy as np

_BATCH_NGRAMS = 256
"""N-grams that datasketch permutes at once: its matrix then stays in the cache, and a gigantic document in memory."""


@dataclass(frozen=True)
class Shingles:
    """What documents are compared by."""

    unit: Unit
    ngram: int
    """Units of an n-gram."""

    def units(self, text: str, words: WordHashes) -> np.ndarray:
        """Hashes of the units of a text, in order."""
        return words.of(text) if self.unit == "word" else character_hashes(text)

    def hashes(self, units: np.ndarray) -> np.ndarray:
        """Hashes of the n-grams, duplicates included."""
        return ngram_hashes(units, min(self.ngram, len(units)))


class Signer:
    """Makes signatures. Equal arguments give equal signatures on any machine."""

    def __init__(self, num_permutations: int, seed: int) -> None:
        from datasketch import MinHash

        # Our hashes are mixed already, so datasketch need not hash them again.
        self._empty: Any = MinHash(num_permutations, seed=seed, hashfunc=int, scheme="affine32")

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """[num_permutations] uint32, from at least one uint64 hash."""
        import numpy as np

        signature = self._empty.copy()
        for begin in range(0, len(hashes), _BATCH_NGRAMS):
            upper = hashes[begin : begin + _BATCH_NGRAMS] >> np.uint64(32)
            signature.update_batch(upper.tolist())
        return signature.hashvalues


@dataclass
class ShardSigner:
    """Writes the signatures of shards. Built once a worker."""

    shingles: Shingles
    num_permutations: int
    seed: int
    num_bands: int
    band_size: int
    """Permutations of a band."""
    _signer: Signer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._signer = Signer(self.num_permutations, self.seed)

    def __call__(self, path: Path, folder: Path) -> dict[str, int]:
        """Write the arrays of a shard; returns `num_in`, `num_compared`, `num_short` and `num_without_units`."""
        import numpy as np

        table = read_shard(path, ["doc_id", "text", "num_bytes"])
        rows, signatures, num_short = self._sign(table.column("text"))
        matrix = np.stack(signatures) if signatures else np.zeros((0, self.num_permutations), np.uint32)
        self._write_bands(matrix, folder)
        np.save(folder / "signatures.npy", matrix)
        np.save(folder / "rows.npy", np.array(rows, np.uint32))
        np.save(folder / "sizes.npy", table.column("num_bytes").to_numpy()[rows] if rows else np.zeros(0, np.int64))
        _write_names(table.column("doc_id").take(rows) if rows else table.column("doc_id").slice(0, 0), folder)
        num_in = table.num_rows
        return {
            "num_in": num_in,
            "num_compared": len(rows),
            "num_short": num_short,
            "num_without_units": num_in - len(rows),
        }

    def _sign(self, texts: Any) -> tuple[list[int], list[np.ndarray], int]:
        words = WordHashes()
        rows, signatures, num_short = [], [], 0
        for row, text in enumerate(texts):
            units = self.shingles.units(text.as_py(), words)
            if len(units):
                rows.append(row)
                signatures.append(self._signer(self.shingles.hashes(units)))
                num_short += len(units) < self.shingles.ngram
        return rows, signatures, num_short

    def _write_bands(self, matrix: np.ndarray, folder: Path) -> None:
        import numpy as np

        size = self.band_size
        bands = np.stack([fold(matrix[:, j * size : (j + 1) * size]) for j in range(self.num_bands)])
        order = np.argsort(bands, axis=1, kind="stable")
        np.save(folder / "bands.npy", np.take_along_axis(bands, order, axis=1))
        np.save(folder / "band_rows.npy", order.astype(np.uint32))


def _write_names(names: Any, folder: Path) -> None:
    import pyarrow as pa

    table = pa.table({"doc_id": names.cast(pa.large_string())}).combine_chunks()
    with pa.ipc.new_file(str(folder / "names.arrow"), table.schema) as file:
        file.write_table(table)


class SignatureStore:
    """The compared documents of all shards under one number each, in order; read from mapped files."""

    def __init__(self, folders: Sequence[Path], sizes: Sequence[int]) -> None:
        import numpy as np

        self.folders = list(folders)
        self.starts = np.concatenate([[0], np.cumsum(np.array(sizes, np.int64))]).astype(np.int64)
        """Number of the first compared document of each shard; last, how many there are."""
        self._mapped: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def array(self, shard: int, name: str) -> np.ndarray:
        """A mapped array of one shard."""
        import numpy as np

        path = self.folders[shard] / f"{name}.npy"
        # A file of no entries cannot be mapped.
        return np.load(path, mmap_mode="r" if self.starts[shard + 1] > self.starts[shard] else None)

    def signatures(self, numbers: np.ndarray) -> np.ndarray:
        """[n, P] uint32."""
        import numpy as np

        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        found = np.zeros((len(numbers), self.array(0, "signatures").shape[1]), np.uint32)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            if shard not in self._mapped:
                self._mapped[shard] = self.array(shard, "signatures")
            found[mine] = self._mapped[shard][numbers[mine] - self.starts[shard]]
        return found

    def similarities(self, pairs: np.ndarray) -> np.ndarray:
        """Estimated Jaccard similarities of pairs `[n, 2]`: the share of equal places in two signatures."""
        import numpy as np

        found = np.zeros(len(pairs))
        for begin in range(0, len(pairs), 2**13):
            some = pairs[begin : begin + 2**13]
            equal = self.signatures(some[:, 0]) == self.signatures(some[:, 1])
            found[begin : begin + len(some)] = equal.mean(axis=1)
        return found

    def names(self, numbers: np.ndarray) -> list[str]:
        """The ids of documents."""
        import numpy as np
        import pyarrow as pa

        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        found = np.empty(len(numbers), object)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            with pa.memory_map(str(self.folders[shard] / "names.arrow")) as file:
                names = pa.ipc.open_file(file).read_all().column("doc_id")
                found[mine] = names.take(pa.array(numbers[mine] - self.starts[shard])).to_pylist()
        return found.tolist()
