"""Peak memory of the data stages, each in a process of its own, for a corpus and for ten times as much.

Bounded by shard means: it does not grow with the corpus. What grows by design is some bytes a document (ids, places,
statistics), which is small beside a shard. Run as a command this is that process: STAGE FOLDER.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import data_corpora
from timings import progress

TARGET = 1.3
SMALL, TIMES = 30_000, 10
"""Documents of the smaller corpus of tokens, more than a shard of rows holds; how many times it the larger one is."""


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    """Peak GiB of each stage for both corpora, and their ratio; measured once, as peaks hardly vary."""
    found: dict[str, Any] = {}
    for size, count in (("1x", SMALL), ("10x", SMALL * TIMES)):
        tokens = data_corpora.write_tokens(folder / size / "tokens", count)
        progress(f"memory: {size} is {tokens} tokens")
        num_bytes = data_corpora.write_documents(folder / size / "documents", copies=1 if size == "1x" else TIMES)
        progress(f"memory: {size} is {num_bytes} bytes of text")
    data_corpora.write_tokenizer(folder / "tokenizer", 1024)
    for stage in STAGES:
        peaks = [_peak(stage, folder / size) for size in ("1x", "10x")]
        for size, peak in zip(("1x", "10x"), peaks, strict=True):
            found[f"{stage}, {size}, GiB"] = _single(peak)
        found[f"{stage}, 10x / 1x"] = _single(peaks[1] / peaks[0], TARGET)
        progress(f"memory: {stage} {peaks[0]:.2f} GiB, then {peaks[1]:.2f}")
    return found


def _peak(stage: str, folder: Path) -> float:
    command = [sys.executable, __file__, stage, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])["peak_gib"]


def _single(value: float, target: float | None = None) -> dict[str, Any]:
    rounded = round(value, 4)
    return {
        "median": rounded,
        "lowest": rounded,
        "highest": rounded,
        "cpu": 0.0,
        "repetitions": 1,
        "target": target,
    }


def _ingest(folder: Path) -> tuple[Any, Any, dict[str, Path]]:
    from ropewalk.stages.data import ingest

    source = ingest.SourceConfig(
        name="texts", format="parquet", include=("documents-*.parquet",), metadata_fields=("num_bytes",)
    )
    return ingest, ingest.IngestConfig(sources=(source,), shard_bytes=2**22), {"texts": folder / "documents"}


def _encode(folder: Path) -> tuple[Any, Any, dict[str, Path]]:
    from ropewalk.stages.data import encode

    inputs = {"documents": folder / "documents", "tokenizer": folder.parent / "tokenizer"}
    return encode, encode.EncodeConfig(), inputs


def _pack(folder: Path) -> tuple[Any, Any, dict[str, Path]]:
    from ropewalk.stages.data import pack

    return pack, pack.PackConfig(row_tokens=8192, group_tokens=2**22), {"tokens": folder / "tokens"}


def _utk(folder: Path) -> tuple[Any, Any, dict[str, Path]]:
    from ropewalk.stages.data import utk

    kinds = (utk.RowKind(rows_fraction=1.0, chunk_probabilities=(1.0,)),)
    config = utk.UtkConfig(row_tokens=8192, row_kinds=kinds, group_tokens=2**22)
    return utk, config, {"tokens": folder / "tokens"}


STAGES = {"ingest": _ingest, "encode": _encode, "pack": _pack, "utk": _utk}


def main() -> None:
    """Run one stage on one corpus and print its peak."""
    from data_speed import run_stage

    stage, config, inputs = STAGES[sys.argv[1]](Path(sys.argv[2]))
    run_stage(stage, config, inputs, Path(sys.argv[2]) / f"out-{sys.argv[1]}")
    print(json.dumps({"peak_gib": peak_gib()}))


def peak_gib() -> float:
    """Of this process since it began. Not `ru_maxrss`: that starts at what the parent had."""
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
