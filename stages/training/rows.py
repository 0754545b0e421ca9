"""Rows for training: random access to a Rows artifact, and which rows each rank sees at each step.

Order is counter-based: phase p reads, in epoch e, the permutation of (seed, p, e), and the rows of a step are the
next `rows_per_step` of that sequence, whatever the world size. So the only state is the step number, a resumed run
reads on where it stopped, and later epochs are shuffled anew.

Parquet cannot be read row by row, so each shard is unpacked once into an Arrow file in the work folder (about the
size of its tokens) and memory-mapped from there: memory does not grow with the corpus.
"""

from __future__ import annotations

import bisect
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.context import Context
from ropewalk.stages.schema import read_table, seeded_rng, shard_paths

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

BATCH_TOKENS = 2**24
"""Tokens decoded at a time while unpacking: bounds memory."""


@dataclass(frozen=True)
class RowSpec:
    """What every row of an artifact must satisfy."""

    row_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Row:
    """One training sequence of T tokens."""

    input_ids: np.ndarray
    """[T] int32."""
    segments: list[dict[str, Any]]
    """As in `schema.Segment`."""
    attention: str
    loss_mask: np.ndarray | None
    """[T] bool, or None: every token is a target."""
    position_ids: np.ndarray | None
    """[T] int32, or None: 0 .. T-1."""

    def targets(self) -> np.ndarray:
        """[T] bool: token t is a target; the first never is, for nothing precedes it."""
        import numpy as np

        targets = np.ones(len(self.input_ids), dtype=bool) if self.loss_mask is None else self.loss_mask.copy()
        targets[0] = False
        return targets

    def inserted_targets(self) -> np.ndarray:
        """[T] bool: targets that no segment covers, such as planted answers. None without a loss mask."""
        import numpy as np

        if self.loss_mask is None:
            return np.zeros(len(self.input_ids), dtype=bool)
        inserted = self.targets()
        for segment in self.segments:
            inserted[segment["row_start"] : segment["row_start"] + segment["num_tokens"]] = False
        return inserted


def policies(folder: Path) -> set[str]:
    """The attention policies that the rows of an artifact ask for."""
    return set(read_table(folder, "rows", ["attention"])["attention"].unique().to_pylist())


def unpack(source: Path, target: Path, spec: RowSpec, context: Context) -> int:
    """Unpack a Rows artifact for random access and return its number of rows.

    Done shards are kept for the next attempt. Raises ValueError naming the shard if a row breaks `spec`, and if
    there are no rows.
    """
    target.mkdir(parents=True, exist_ok=True)
    paths = shard_paths(source, "rows")
    num_rows = 0
    for done, count in enumerate(context.map(partial(_unpack_shard, target, spec), paths), start=1):
        num_rows += count
        context.progress(done, len(paths), "shards")
    if num_rows == 0:
        raise ValueError(f"{source} has no rows to train on")
    return num_rows


def _unpack_shard(target: Path, spec: RowSpec, path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = target / f"{path.stem}.arrow"
    with pq.ParquetFile(path) as file:
        if done.exists():
            return file.metadata.num_rows
        # A name of its own: a worker of a killed attempt may still be writing the same shard.
        partial_file = done.with_suffix(f".{uuid.uuid4().hex}.partial")
        schema = file.schema_arrow.remove_metadata()
        with pa.OSFile(str(partial_file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in file.iter_batches(batch_size=max(1, BATCH_TOKENS // spec.row_tokens)):
                _check(batch, spec, path)
                writer.write_batch(batch.replace_schema_metadata(None))
        partial_file.replace(done)
        return file.metadata.num_rows


def _check(batch: pa.RecordBatch, spec: RowSpec, path: Path) -> None:
    import pyarrow.compute

    # Its functions are made at import time, where type checkers do not see them.
    pc: Any = pyarrow.compute
    for name in ("input_ids", "loss_mask", "position_ids"):
        if name not in batch.schema.names:
            continue
        column: Any = batch.column(name)
        if column.null_count or set(pc.list_value_length(column).unique().to_pylist()) - {spec.row_tokens}:
            raise ValueError(f"{path}: each {name} must have {spec.row_tokens} entries, the artifact's row_tokens")
    ids: Any = batch.column("input_ids")
    bounds = pc.min_max(ids.flatten()).as_py()
    if len(ids) and not 0 <= bounds["min"] <= bounds["max"] < spec.vocab_size:
        raise ValueError(f"{path}: token id {bounds['max']} is not below the tokenizer's vocab_size {spec.vocab_size}")


class RowTable:
    """Random access to unpacked rows, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._batches: list[pa.RecordBatch] = []
        for path in sorted(folder.glob("*.arrow")):
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self._batches += [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._ends = list(accumulate(len(batch) for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        place = bisect.bisect_right(self._ends, index)
        batch = self._batches[place]
        offset = index - (self._ends[place] - len(batch))

        def tokens(name: str) -> np.ndarray | None:
            if name not in batch.schema.names:
                return None
            column: Any = batch.column(name)
            return column[offset].values.to_numpy(zero_copy_only=False)

        input_ids = tokens("input_ids")
        assert input_ids is not None
        return Row(
            input_ids=input_ids,
            segments=batch.column("segments")[offset].as_py(),
            attention=batch.column("attention")[offset].as_py(),
            loss_mask=tokens("loss_mask"),
            position_ids=tokens("position_ids"),
        )


@dataclass
class RowOrder:
    """The endless shuffled sequence of rows of one phase."""

    seed: int
    phase: int
    num_rows: int
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def step(self, step: int, rows_per_step: int) -> list[int]:
        """Indices of the rows of 0-based `step` of the phase."""
        return [self._at(position) for position in range(step * rows_per_step, (step + 1) * rows_per_step)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if epoch not in self._epochs:
            # A step may straddle two epochs, hardly ever more.
            self._epochs = {key: order for key, order in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = seeded_rng(self.seed, "row order", self.phase, epoch).permutation(self.num_rows)
        return int(self._epochs[epoch][place])


def share(rows: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """The rows of a step that `rank` computes: a contiguous part of equal size."""
    size = len(rows) // world_size
    return rows[rank * size : (rank + 1) * size]


def micro_batches(rows: Sequence[int], row_tokens: int, micro_batch_tokens: int) -> Iterator[Sequence[int]]:
    """Cut a rank's rows into forward passes of at most `micro_batch_tokens` tokens, or of one row."""
    size = max(1, micro_batch_tokens // row_tokens)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
