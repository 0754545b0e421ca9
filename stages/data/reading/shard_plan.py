"""Cuts documents that lie in batches of many files into shards, without those that are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.reading.unit_reader import SHARD_DOCUMENTS
from ropewalk.stages.schema import documents_schema, write_shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def plan_shards(
    units: Sequence[tuple[Path, Sequence[int]]], kept: np.ndarray, sizes: np.ndarray, shard_bytes: int
) -> dict[str, tuple[int, list[Piece]]]:
    """What each shard is made of, by its name; `units` as for `Batches`.

    Args:
        units: See `Batches`.
        kept: bool, by document.
        sizes: Bytes of text, by document.
        shard_bytes: See `shard_ends`.
    """
    import numpy as np

    places = np.flatnonzero(kept)
    batches, items, begin = Batches(units), {}, 0
    for number, end in enumerate(shard_ends(sizes[kept], shard_bytes)):
        stop = int(places[end - 1]) + 1
        items[f"{number:05d}"] = (number, batches.pieces(begin, stop, kept))
        begin = stop
    return items


def shard_ends(sizes: np.ndarray, shard_bytes: int) -> list[int]:
    """Where the shards that `cut_shards` would make of documents of these sizes end."""
    import numpy as np

    total = np.cumsum(sizes, dtype=np.int64)
    ends, begin = [], 0
    while begin < len(total):
        full = (total[begin - 1] if begin else 0) + shard_bytes
        end = min(int(np.searchsorted(total, full)) + 1, begin + SHARD_DOCUMENTS, len(total))
        ends.append(end)
        begin = end
    return ends


@dataclass(frozen=True)
class Piece:
    """Consecutive records of one batch of a unit."""

    path: Path
    batch: int
    begin: int
    num_records: int
    kept: bytes
    """A bit a record, least significant first."""


class Batches:
    """The batches of all units, end to end."""

    def __init__(self, units: Sequence[tuple[Path, Sequence[int]]]) -> None:
        """Of each unit, its file and how many records its batches have."""
        import numpy as np

        self._batches = [(path, number) for path, lengths in units for number in range(len(lengths))]
        lengths = [length for _, lengths in units for length in lengths]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def pieces(self, begin: int, end: int, kept: np.ndarray) -> list[Piece]:
        """Where the documents from `begin` to `end` lie, without batches of which nothing is kept."""
        import numpy as np

        found = []
        number = int(np.searchsorted(self._starts, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(self._starts[number + 1]))
            bits = np.packbits(kept[begin:stop], bitorder="little")
            if bits.any():
                path, batch = self._batches[number]
                found.append(Piece(path, batch, begin - int(self._starts[number]), stop - begin, bits.tobytes()))
            begin, number = stop, number + 1
        return found


def copy_shard(item: tuple[int, list[Piece]], folder: Path) -> dict[str, Any]:
    """Write a shard of Documents, given its number and what it is made of."""
    import pyarrow as pa

    number, pieces = item
    # One chunk: how a Parquet file is paged must not show how the work was cut.
    table = pa.Table.from_batches([_read_piece(piece) for piece in pieces], schema=documents_schema()).combine_chunks()
    write_shard(folder, "documents", number, table)
    return {}


def _read_piece(piece: Piece) -> pa.RecordBatch:
    import numpy as np
    import pyarrow as pa

    with pa.OSFile(str(piece.path)) as file:
        batch = pa.ipc.open_file(file).get_batch(piece.batch).slice(piece.begin, piece.num_records)
    bits = np.unpackbits(np.frombuffer(piece.kept, dtype=np.uint8), count=piece.num_records, bitorder="little")
    return batch if bits.all() else batch.filter(pa.array(bits.astype(bool)))
