"""The Vectors of samples, in an order of our choice, in a scratch file that is mapped.

Vectors lie in the order of another stage's shards. They are read once and written to their places in one file of
scratch (two bytes a number), so that memory is bounded by one shard of them and the ids of the samples, and every
worker on the same file system can read any run of rows.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.schema import read_artifact, shard_paths

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True)
class SampleVectors:
    """A file of float16 vectors, [n, d]. Small: workers are given it as it is."""

    path: Path
    num_samples: int
    num_dimensions: int

    def rows(self, begin: int, end: int) -> np.ndarray:
        """The unit vectors begin to end - 1, float32; those without a length stay zero."""
        from ropewalk.stages.data.selection.submodular import unit_vectors

        return unit_vectors(self._map("r")[begin:end])[0]

    def _map(self, mode: Any) -> np.ndarray:
        import numpy as np

        shape = (self.num_samples, self.num_dimensions)
        return np.memmap(self.path, dtype=np.float16, mode=mode, shape=shape)


def place_vectors(
    folder: Path, ids: pa.ChunkedArray, positions: np.ndarray, work: Path
) -> tuple[SampleVectors, np.ndarray]:
    """Write the vector of `ids[i]` to row `positions[i]` of a scratch file; `ids` are distinct.

    Vectors of other samples are passed over. Returns the file, and a mark (bool [n]) for every sample whose vector has
    no direction because it is zero. Raises ValueError if a sample has no vector or two, or one that is not finite.
    """
    import numpy as np
    import pyarrow.parquet as pq

    read_artifact(folder, "vectors")
    paths = shard_paths(folder, "vectors")
    num_dimensions = pq.read_schema(paths[0]).field("vector").type.list_size
    whole = work / "vectors.f16"
    partial = SampleVectors(work / f".vectors-{uuid.uuid4().hex}", len(ids), num_dimensions)
    mapped = partial._map("w+")
    seen, zero = np.zeros(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.bool_)
    wanted = ids.combine_chunks()
    for path in paths:
        table = pq.read_table(path, columns=["doc_id", "vector"])
        numbers, vectors = _wanted_vectors(table, wanted, path)
        _check_once(numbers, seen, wanted)
        mapped[positions[numbers]] = vectors
        zero[numbers] = ~vectors.any(axis=1)
    if not seen.all():
        missing = wanted[int(np.argmin(seen))].as_py()
        raise ValueError(
            f"slot vectors has no vector of sample {missing!r} ({int((~seen).sum())} of {len(ids)} lack one): embed "
            "the same samples"
        )
    del mapped
    partial.path.rename(whole)
    return SampleVectors(whole, len(ids), num_dimensions), zero


def _wanted_vectors(table: pa.Table, wanted: pa.Array, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a shard that belong to wanted samples: the samples' numbers and the vectors."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    found = pc.index_in(table.column("doc_id"), value_set=wanted)
    table = table.filter(pc.is_valid(found))
    numbers = found.drop_null().to_numpy().astype(np.int64)
    if not len(numbers):
        return numbers, np.zeros((0, table.schema.field("vector").type.list_size), np.float16)
    column: Any = pa.concat_arrays(table.column("vector").chunks)
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(numbers), -1)
    wrong = ~np.isfinite(vectors).all(axis=1)
    if wrong.any():
        sample = table.column("doc_id")[int(wrong.argmax())].as_py()
        raise ValueError(f"{path}: the vector of {sample!r} holds NaN or infinity: embed it again")
    return numbers, vectors


def _check_once(numbers: np.ndarray, seen: np.ndarray, wanted: pa.Array) -> None:
    import numpy as np

    unique, times = np.unique(numbers, return_counts=True)
    twice = unique[(times > 1) | seen[unique]]
    if len(twice):
        raise ValueError(f"slot vectors has sample {wanted[int(twice[0])].as_py()!r} twice: deduplicate by id")
    seen[unique] = True
