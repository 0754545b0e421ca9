"""Counts the records of an export again, and sees whether its files hold together. Errors name the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ropewalk.stages.data.exporters import mds, megatron


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def count_jsonl(folder: Path) -> int:
    """Lines of all files."""
    import pyarrow as pa

    num_lines = 0
    for path in _files(folder, "*.jsonl*"):
        with _opening(path), pa.input_stream(str(path), compression="detect") as file:
            while block := file.read(2**20):
                num_lines += block.count(b"\n")
    return num_lines


def count_parquet(folder: Path) -> int:
    """Rows of all footers."""
    import pyarrow.parquet as pq

    total = 0
    for path in _files(folder, "*.parquet"):
        with _opening(path):
            total += pq.read_metadata(path).num_rows
    return total


def count_arrow(folder: Path) -> int:
    """Rows of all record batches of IPC files."""
    import pyarrow as pa

    total = 0
    for path in _files(folder, "*.arrow"):
        with _opening(path), pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            total += sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))
    return total


def count_huggingface(folder: Path) -> int:
    """Rows of the streams that `state.json` names."""
    import pyarrow as pa

    total = 0
    state_path, info_path = folder / "state.json", folder / "dataset_info.json"
    with _opening(info_path):
        json.loads(info_path.read_text(encoding="utf-8"))["features"]
    with _opening(state_path):
        names = [file["filename"] for file in json.loads(state_path.read_text(encoding="utf-8"))["_data_files"]]
    for name in names:
        with _opening(folder / name), pa.memory_map(str(folder / name)) as file:
            total += sum(batch.num_rows for batch in pa.ipc.open_stream(file))
    return total


def count_mds(folder: Path) -> int:
    """Samples of the shards that the index names, whose heads and sizes must agree with it."""
    index_path = folder / mds.INDEX
    with _opening(index_path):
        shards = json.loads(index_path.read_text(encoding="utf-8"))["shards"]
    total = 0
    for shard in shards:
        path, size, samples = folder / shard["raw_data"]["basename"], shard["raw_data"]["bytes"], shard["samples"]
        with _opening(path), path.open("rb") as file:
            found = int.from_bytes(file.read(4), "little")
            file.seek(4 + 4 * samples)
            end = int.from_bytes(file.read(4), "little")
        if (found, end, path.stat().st_size) != (samples, size, size):
            raise ValueError(f"{path} is not what {mds.INDEX} says: {samples} samples in {size} bytes")
        total += samples
    return total


def count_megatron(folder: Path) -> int:
    """Sequences of the index, which must fill the ids' file."""
    import numpy as np

    (path,) = _files(folder, "*.idx")
    with _opening(path), path.open("rb") as file:
        head = file.read(34)
        num = int.from_bytes(head[18:26], "little")
        lengths = np.fromfile(file, dtype="<i4", count=num)
        begins = np.fromfile(file, dtype="<i8", count=num)
        documents = np.fromfile(file, dtype="<i8")
    item = {code: int(dtype[-1]) for dtype, code in megatron.TYPE_CODES.items()}.get(head[17])
    if head[:9] != megatron.MAGIC or item is None or len(begins) != num or len(documents) != num + 1:
        raise ValueError(f"{path} is no index of Megatron: its head or its length is wrong")
    ends = np.cumsum(lengths, dtype=np.int64) * item
    if not np.array_equal(begins + lengths.astype(np.int64) * item, ends) or documents[-1] != num:
        raise ValueError(f"{path}: sequences do not follow one another")
    ids = path.with_suffix(".bin")
    with _opening(ids):
        size = ids.stat().st_size
    if size != (ends[-1] if num else 0):
        raise ValueError(f"{ids} is not as long as {path.name} says")
    return num


COUNTERS: dict[str, Callable[[Path], int]] = {
    "jsonl": count_jsonl,
    "parquet": count_parquet,
    "arrow": count_arrow,
    "huggingface": count_huggingface,
    "mds": count_mds,
    "megatron": count_megatron,
}


def _files(folder: Path, glob: str) -> list[Path]:
    found: list[Any] = sorted(folder.glob(glob))
    if not found:
        raise ValueError(f"{folder} has no {glob}")
    return found
