"""Writes Megatron's indexed data set: token sequences in `<name>.bin`, and where they begin in `<name>.idx`.

    bin   the ids of all sequences, end to end, as uint16 if the vocabulary has fewer than 65,500 ids, else int32
    idx   9 bytes of magic; uint64 version 1; uint8 code of the ids' type; uint64 number of sequences n; uint64 n+1;
          int32 length of each sequence, in ids; int64 byte at which each begins; int64 number of the sequence at which
          each document begins, and n

All numbers are little endian. Followed: `megatron/core/datasets/indexed_dataset.py` of megatron-core 0.16. Each record
is a document of one sequence.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.exporters.source_shards import SourceShard, with_tokens

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

MAGIC = b"MMIDIDX\x00\x00"
TYPE_CODES = {"<u2": 8, "<i4": 4}
_CHUNK_SEQUENCES = 2**20


def id_type(vocab_size: int) -> str:
    """How Megatron stores ids of such a vocabulary."""
    return "<u2" if vocab_size < 65_500 else "<i4"


def write_sequences(shard: SourceShard, dtype: str, end_token: int | None, folder: Path) -> Counter[str]:
    """Write `ids` and `lengths` of a shard; records without tokens are left out.

    Returns `num_records`, `num_tokens`, `num_tokens_inserted` and what the format cannot hold.
    """
    import numpy as np

    counts: Counter[str] = Counter()
    with (folder / "ids").open("wb") as ids_file, (folder / "lengths").open("wb") as lengths_file:
        for batch in shard.batches():
            kept = with_tokens(batch)
            ids: Any = kept.column("input_ids")
            flat, lengths = ids.flatten().to_numpy(), ids.value_lengths().to_numpy(zero_copy_only=False)
            if end_token is not None:
                flat, lengths = np.insert(flat, np.cumsum(lengths), end_token), lengths + 1
                counts["num_tokens_inserted"] += len(lengths)
            ids_file.write(flat.astype(dtype).tobytes())
            lengths_file.write(lengths.astype("<i4").tobytes())
            counts.update(num_records=len(lengths), num_tokens=len(flat), **_lost(kept))
    return counts


def _lost(batch: pa.RecordBatch) -> dict[str, int]:
    """What other than ids a batch of Tokens or Rows says."""
    found: dict[str, int] = {}
    columns: dict[str, Any] = {name: batch.column(name) for name in batch.schema.names}
    if "segments" in columns:
        found["num_segments_lost"] = len(columns["segments"].flatten())
        found["num_attention_policies_lost"] = sum(policy != "causal" for policy in columns["attention"].to_pylist())
    if "loss_mask" in columns:
        found["num_masked_tokens_lost"] = columns["loss_mask"].flatten().false_count
    if "position_ids" in columns:
        found["num_position_ids_lost"] = len(columns["position_ids"].flatten())
    return found


def join_sequences(folders: Sequence[Path], dtype: str, folder: Path, name: str) -> None:
    """Make `<name>.bin` and `<name>.idx` of what `write_sequences` wrote. Memory: 4 bytes a sequence."""
    import numpy as np

    with (folder / f"{name}.bin").open("wb") as joined:
        for part in folders:
            with (part / "ids").open("rb") as ids:
                shutil.copyfileobj(ids, joined, 2**20)
    lengths = np.concatenate([np.fromfile(part / "lengths", dtype="<i4") for part in folders])
    write_index(folder / f"{name}.idx", lengths, dtype)


def write_index(path: Path, lengths: np.ndarray, dtype: str) -> None:
    """Write the index of sequences of these lengths."""
    import numpy as np

    with path.open("wb") as file:
        file.write(MAGIC + (1).to_bytes(8, "little") + bytes([TYPE_CODES[dtype]]))
        file.write(len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little"))
        file.write(lengths.astype("<i4").tobytes())
        begin = 0
        for chunk in _chunks(len(lengths)):
            ends = begin + np.cumsum(lengths[chunk], dtype=np.int64) * np.dtype(dtype).itemsize
            file.write(np.concatenate([[begin], ends[:-1]]).astype("<i8").tobytes())
            begin = int(ends[-1])
        for chunk in _chunks(len(lengths) + 1):
            file.write(np.arange(chunk.start, chunk.stop, dtype="<i8").tobytes())


def _chunks(total: int) -> list[slice]:
    return [slice(begin, min(begin + _CHUNK_SEQUENCES, total)) for begin in range(0, total, _CHUNK_SEQUENCES)]
