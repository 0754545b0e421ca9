"""Writes Documents, Tokens or Rows in a format that other programs read.

Reads one slot: `documents`, `tokens` or `rows`. Writes, beside `artifact.json` (kind "export"), a file a shard for
`jsonl`, `parquet` and `arrow`; what `datasets.load_from_disk` reads for `huggingface`; shards and `index.json` for
`mds` (MosaicML's streaming data sets); one `<slot>.bin` with its `.idx` for `megatron` (an indexed data set). The
formats, and the code that they follow, are described in `ropewalk.stages.data.exporters`. Records keep their order.

Lost: nothing in `jsonl`, `parquet`, `arrow`, `huggingface`: the columns are those of the table. MDS arrays and Megatron
sequences cannot be empty, so records without tokens are dropped there (`no_tokens`). Megatron holds nothing but ids: no
document ids, sources, segments, attention policies, loss masks or positions. Its trainer would learn what a row masks,
and attend across documents, or not, by its own settings. So Rows, and Tokens with a loss mask, are refused there unless
`enable_ids_only` says that this is meant; counts say how much was lost (`num_..._lost`).

Counts: num_in = num_records + num_dropped_no_tokens. Memory: a batch of one shard a worker; for `megatron` also four
bytes a sequence.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import Field, model_validator

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.exporters import mds, megatron, tables
from ropewalk.stages.data.exporters.source_shards import SourceKind, SourceShard, open_shard
from ropewalk.stages.data.exporters.verify import COUNTERS
from ropewalk.stages.schema import Artifact, Record, read_artifact, shard_paths, write_artifact
from ropewalk.stages.shards import Shard, map_shards

NAME = "export"
VERSION = 1

Format = Literal["jsonl", "parquet", "arrow", "huggingface", "mds", "megatron"]
_NUM_RECORDS = {"documents": "num_kept", "tokens": "num_kept", "rows": "num_rows"}


class ExportConfig(Record):
    """Which format."""

    format: Format
    """See the module."""
    compression: tables.Compression = "none"
    """Of `jsonl`. Parquet is always zstd; the others are not compressed, since their readers map or seek."""
    names: dict[str, str] = Field(default_factory=dict)
    """Other names for columns, as {"input_ids": "tokens"} for readers that expect that. Not for `megatron`."""
    enable_end_token: bool = False
    """Behind each document of Tokens, its end token: Megatron's trainer lays documents end to end. For `megatron`."""
    enable_ids_only: bool = False
    """Write Rows, or Tokens with a loss mask, to `megatron`, which loses all but their ids."""

    @model_validator(mode="after")
    def _fields_apply(self) -> ExportConfig:
        if self.compression != "none" and self.format != "jsonl":
            raise ValueError(f"compression does not apply to format {self.format}")
        if self.names and self.format == "megatron":
            raise ValueError("names does not apply to format megatron, which has no columns")
        for name in ("enable_end_token", "enable_ids_only"):
            if getattr(self, name) and self.format != "megatron":
                raise ValueError(f"{name} does not apply to format {self.format}")
        return self


@dataclass(frozen=True)
class Job:
    """What a worker must know of the whole export."""

    config: ExportConfig
    kind: SourceKind
    num_shards: int
    vocab_size: int | None
    end_token: int | None
    features: dict[str, Any] | None
    """Of a saved data set."""


def export_shard(job: Job, item: tuple[int, Path], folder: Path) -> dict[str, Any]:
    """Write a shard, given with its number. Returns `num_in`, `num_records`, and what the format needs to finish."""
    number, path = item
    with open_shard(path, job.kind, job.vocab_size) as shard:
        found = _write(job, number, shard, folder)
        return {"num_in": shard.file.metadata.num_rows, **found}


def _write(job: Job, number: int, shard: SourceShard, folder: Path) -> dict[str, Any]:
    config = job.config
    name = f"{job.kind}-{number:05d}"
    if config.format == "jsonl":
        path = folder / f"{name}.jsonl{tables.SUFFIXES[config.compression]}"
        return {"num_records": tables.write_jsonl(shard, config.names, config.compression, path)}
    if config.format == "parquet":
        return {"num_records": tables.write_parquet(shard, config.names, folder / f"{name}.parquet")}
    if config.format == "arrow":
        return {"num_records": tables.write_arrow(shard, config.names, folder / f"{name}.arrow")}
    if config.format == "huggingface":
        path = folder / tables.dataset_file_name(number, job.num_shards)
        num_records = tables.write_dataset_file(shard, config.names, job.features or {}, path)
        with path.open("rb") as file:
            return {"num_records": num_records, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    if config.format == "mds":
        shards = mds.write_mds(shard, config.names, folder)
        return {"num_records": sum(entry["samples"] for entry in shards), "shards": shards}
    return dict(megatron.write_sequences(shard, megatron.id_type(job.vocab_size or 0), job.end_token, folder))


def _finish(job: Job, done: Sequence[Shard], first: Path, output: Path) -> None:
    """Bring the files of all shards together."""
    if job.config.format == "megatron":
        dtype = megatron.id_type(job.vocab_size or 0)
        megatron.join_sequences([shard.folder for shard in done], dtype, output, job.kind)
    elif job.config.format == "mds":
        _finish_mds(job, done, first, output)
    else:
        for shard in done:
            shard.link_into(output)
    if job.config.format == "huggingface":
        tables.finish_dataset(output, job.features or {}, [shard.counts["sha256"] for shard in done])


def _finish_mds(job: Job, done: Sequence[Shard], first: Path, output: Path) -> None:
    places = [(shard.folder, number) for shard in done for number in range(len(shard.counts["shards"]))]
    for number, (folder, theirs) in enumerate(places):
        os.link(folder / mds.shard_name(theirs), output / mds.shard_name(number))
    with open_shard(first, job.kind, job.vocab_size) as shard:
        encodings = mds.mds_encodings(shard.schema, job.config.names)
    mds.write_index(output, encodings, [entry for shard in done for entry in shard.counts["shards"]])


def _make_job(config: ExportConfig, kind: SourceKind, artifact: Artifact, paths: Sequence[Path]) -> Job:
    info = artifact.tokenizer
    if kind != "documents" and info is None:
        raise ValueError(f"{paths[0].parent / 'artifact.json'} names no tokenizer: make the {kind} with our stages")
    if kind != "tokens" and config.enable_end_token:
        raise ValueError(f"export.enable_end_token is for tokens: {kind} have the end tokens that they need, or none")
    if kind == "documents" and config.format == "megatron":
        raise ValueError("export.format megatron holds token ids: encode the documents first")
    vocab_size = info.vocab_size if info is not None and kind != "documents" else None
    with open_shard(paths[0], kind, vocab_size) as shard:
        _check_columns(config, kind, shard.schema.names)
        features = tables.dataset_features(shard, config.names) if config.format == "huggingface" else None
    end_token = info.eos_token_id if info is not None and config.enable_end_token else None
    return Job(config, kind, len(paths), vocab_size, end_token, features)


def _check_columns(config: ExportConfig, kind: SourceKind, columns: Sequence[str]) -> None:
    if unknown := sorted(set(config.names) - set(columns)):
        raise ValueError(f"export.names: {kind} have no column {unknown[0]!r}, only {', '.join(columns)}")
    named = Counter(config.names.get(column, column) for column in columns)
    if twice := [name for name, times in named.items() if times > 1]:
        raise ValueError(f"export.names: two columns would be called {twice[0]!r}")
    loses = kind == "rows" or "loss_mask" in columns
    if config.format == "megatron" and loses and not config.enable_ids_only:
        what = "segments, attention policies and loss masks" if kind == "rows" else "loss masks"
        raise ValueError(f"megatron files cannot hold {what}: set export.enable_ids_only to write the ids alone")


def _one_slot(inputs: Mapping[str, Path]) -> SourceKind:
    kinds = get_args(SourceKind)
    if len(inputs) != 1 or next(iter(inputs)) not in kinds:
        raise ValueError(f"export reads one slot of {', '.join(kinds)}, and was given: {', '.join(inputs) or 'none'}")
    return cast(SourceKind, next(iter(inputs)))


def check(config: ExportConfig, output: Path) -> None:
    """The files hold together, and as many records as `artifact.json` says."""
    counts = read_artifact(output, "export").counts
    found = COUNTERS[config.format](output)
    if found != counts["num_records"]:
        raise ValueError(
            f"{output / 'artifact.json'}: counts.num_records is {counts['num_records']}, but there are {found}"
        )


def run(config: ExportConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the records of the one input. Raises ValueError on bad input, or if nothing is left."""
    kind = _one_slot(inputs)
    folder = inputs[kind]
    artifact = read_artifact(folder, kind)
    started = time.perf_counter()
    paths = shard_paths(folder, kind)
    job = _make_job(config, kind, artifact, paths)
    items = {path.name: (number, path) for number, path in enumerate(paths)}
    done = list(map_shards(context, partial(export_shard, job), items))
    counts: Counter[str] = Counter()
    for shard in done:
        counts.update({name: value for name, value in shard.counts.items() if isinstance(value, int)})
    counts["num_dropped_no_tokens"] = counts["num_in"] - counts["num_records"]
    expected = artifact.counts.get(_NUM_RECORDS[kind], counts["num_in"])
    if counts["num_in"] != expected:
        raise ValueError(f"{folder} should hold {expected} {kind}, but has {counts['num_in']}")
    if not counts["num_records"]:
        raise ValueError(f"{folder} holds no {kind} to export")
    _finish(job, done, paths[0], output.data)
    details = {"format": config.format, "kind": kind, "num_files": len(list(output.data.iterdir()))}
    exported = Artifact(
        kind="export", tokenizer=artifact.tokenizer, row_tokens=artifact.row_tokens, counts=counts, details=details
    )
    write_artifact(output.data, exported)
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "records_per_second": counts["num_records"] / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(counts)
