"""Is an artifact what its `artifact.json` says? Run on a stage's output before it is committed.

Each function is the `check` of the stages that write its kind: it takes their config and the output folder, and raises
ValueError naming the file and the field at fault. Cost: the Parquet footers, and of Rows and small tables the columns
themselves, one batch at a time; of a checkpoint one read of its weights. Not checked: that ids are unique in Documents,
Tokens and Rows, which would hold every id in memory.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ropewalk.stages.checkpoint import tokenizer_digest
from ropewalk.stages.schema import (
    Artifact,
    AttentionPolicy,
    documents_schema,
    predictions_schema,
    read_artifact,
    rows_schema,
    shard_paths,
    tokens_schema,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_BATCH_TOKENS = 2**22
"""Tokens of Rows decoded at a time: bounds memory."""


def check_documents(config: Any, output: Path) -> None:
    """Schema, that there are documents, and the counts of documents and of bytes."""
    artifact = read_artifact(output, "documents")
    _check_columns(output, "documents", documents_schema())
    num_bytes = sum(_sum(batch.column("num_bytes")) for _, batch in _batches(output, "documents", ["num_bytes"]))
    _check_counts(output, artifact, {"num_kept": _num_records(output, "documents"), "num_kept_bytes": num_bytes})


def check_tokens(config: Any, output: Path) -> None:
    """Schema, that there are documents, the counts of documents and tokens, and that ids are in the vocabulary."""
    artifact = read_artifact(output, "tokens")
    is_masked = "loss_mask" in _column_names(output, "tokens")
    _check_columns(output, "tokens", tokens_schema(loss_mask=is_masked))
    vocab_size = _vocab_size(output, artifact)
    num_tokens = 0
    for path, batch in _batches(output, "tokens", ["input_ids", *(["loss_mask"] if is_masked else [])]):
        ids: Any = batch.column("input_ids")
        _check_ids(path, ids.flatten().to_numpy(), vocab_size)
        num_tokens += _sum(ids.value_lengths())
        if is_masked and not batch.column("loss_mask").value_lengths().equals(ids.value_lengths()):
            raise ValueError(f"{path}: loss_mask and input_ids differ in length")
    _check_counts(output, artifact, {"num_kept": _num_records(output, "tokens"), "num_tokens": num_tokens})
    if (output / "tokenizer").is_dir():
        _check_tokenizer(output / "tokenizer", artifact)


def check_rows(config: Any, output: Path) -> None:
    """Schema and counts; of each row: its length, ids, segments, attention policy, loss mask and positions."""
    artifact = read_artifact(output, "rows")
    if not artifact.row_tokens:
        raise ValueError(f"{output / 'artifact.json'}: Rows need row_tokens, the length of each row")
    names = _column_names(output, "rows")
    schema = rows_schema(loss_mask="loss_mask" in names, position_ids="position_ids" in names)
    _check_columns(output, "rows", schema)
    vocab_size = _vocab_size(output, artifact)
    found: Counter[str] = Counter(num_rows=_num_records(output, "rows"))
    found["num_tokens"] = found["num_rows"] * artifact.row_tokens
    if "loss_mask" in names:
        found["num_target_tokens"] = 0
    batch_rows = max(1, _BATCH_TOKENS // artifact.row_tokens)
    for path, batch in _batches(output, "rows", [name for name in names if name != "row_id"], batch_rows):
        _check_row_batch(path, batch, artifact.row_tokens, vocab_size)
        segments: Any = batch.column("segments")
        found["num_tokens_kept"] += _sum(segments.flatten().field("num_tokens"))
        if "loss_mask" in names:
            found["num_target_tokens"] += batch.column("loss_mask").flatten().true_count
    _check_counts(output, artifact, found)


def check_predictions(config: Any, output: Path) -> None:
    """Every model answered every sample once, with a score in 0 to 1; losses are finite numbers."""
    artifact = read_artifact(output, "predictions")
    samples = _sample_ids(output, "samples")
    num_predictions = 0
    for model in config.models:
        _check_columns(output / model, "predictions", predictions_schema())
        answered = _sample_ids(output / model, "predictions")
        if odd := sorted(set(samples) ^ set(answered)):
            raise ValueError(f"{output / model}: predictions and samples differ in sample_id {odd[0]!r}")
        num_predictions += len(answered)
        for path, batch in _batches(output / model, "predictions", ["score"]):
            _check_range(path, "score", _numbers(batch, "score"), 0, 1)
        for path, batch in _batches(output / model, "losses", ["sum_nll"]):
            _check_range(path, "sum_nll", _numbers(batch, "sum_nll"), -math.inf, math.inf)
    _check_counts(output, artifact, {"samples": len(samples), "predictions": num_predictions})
    _read_json(output / "summary.json")


def check_report(config: Any, output: Path) -> None:
    """The page, its summary and its pictures are there and not empty."""
    artifact = read_artifact(output, "report")
    _read_json(output / "summary.json")
    pictures = sorted(output.glob("*.png"))
    for path in (output / "report.html", *pictures):
        if not path.is_file() or not path.stat().st_size:
            raise ValueError(f"{path} is missing or empty")
    _check_counts(output, artifact, {"pictures": sum(not path.stem.endswith("-dark") for path in pictures)})


def check_checkpoint(config: Any, output: Path) -> None:
    """Finite weights, a config with rope parameters and a window, the rows' tokenizer, a history without gaps."""
    artifact = read_artifact(output, "checkpoint")
    model = _read_json(output / "config.json")
    window = model.get("max_position_embeddings")
    if window is not None and window < (artifact.row_tokens or 0):
        raise ValueError(
            f"{output / 'config.json'}: max_position_embeddings is {window}, trained were {artifact.row_tokens}"
        )
    if config.rope.method != "none" and not model.get("rope_parameters"):
        raise ValueError(f"{output / 'config.json'}: rope_parameters are missing")
    vocab_size = _vocab_size(output, artifact)
    if model.get("vocab_size", vocab_size) < vocab_size:
        raise ValueError(f"{output / 'config.json'}: vocab_size {model['vocab_size']} is below the tokenizer's")
    _check_tokenizer(output, artifact)
    num_weights = _check_weights(output)
    if num_weights < artifact.counts["num_parameters"]:
        raise ValueError(
            f"{output}: the safetensors hold {num_weights} weights, the model has {artifact.counts['num_parameters']}"
        )
    _check_history(output / "training.jsonl", artifact.counts["num_steps"])


def _check_row_batch(path: Path, batch: pa.RecordBatch, row_tokens: int, vocab_size: int) -> None:
    for name in ("input_ids", "loss_mask", "position_ids"):
        if name not in batch.schema.names:
            continue
        column: Any = batch.column(name)
        wrong = column.value_lengths().to_numpy(zero_copy_only=False) != row_tokens
        if wrong.any():
            number = int(wrong.argmax())
            raise ValueError(f"{path}: {name} has {len(column[number])} entries in a row, row_tokens is {row_tokens}")
    ids: Any = batch.column("input_ids")
    _check_ids(path, ids.flatten().to_numpy(), vocab_size)
    if unknown := set(batch.column("attention").to_pylist()) - set(get_args(AttentionPolicy)):
        raise ValueError(f"{path}: attention {min(unknown)!r} is none of {', '.join(get_args(AttentionPolicy))}")
    _check_segments(path, batch.column("segments"), row_tokens)


def _check_segments(path: Path, column: Any, row_tokens: int) -> None:
    import numpy as np

    rows = np.repeat(np.arange(len(column)), column.value_lengths().to_numpy(zero_copy_only=False))
    pieces = column.flatten()
    for name in ("doc_id", "start", "num_tokens", "row_start"):
        if pieces.field(name).null_count:
            raise ValueError(f"{path}: segments.{name} holds a null")
    lengths, starts = pieces.field("num_tokens").to_numpy(), pieces.field("row_start").to_numpy()
    ends = starts.astype(np.int64) + lengths
    if (lengths <= 0).any() or (pieces.field("start").to_numpy() < 0).any():
        raise ValueError(f"{path}: a segment's start is negative or its num_tokens is not positive")
    if (starts < 0).any() or (ends > row_tokens).any():
        raise ValueError(f"{path}: a segment leaves its row of {row_tokens} tokens (row_start, num_tokens)")
    if ((rows[1:] == rows[:-1]) & (starts[1:] < ends[:-1])).any():
        raise ValueError(f"{path}: segments of a row overlap or are out of order (row_start)")


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = int(ids.max() if ids.max() >= vocab_size else ids.min())
        raise ValueError(f"{path}: input_ids holds {wrong}, outside the tokenizer's vocab_size {vocab_size}")


def _check_counts(output: Path, artifact: Artifact, found: Mapping[str, int]) -> None:
    """Counts of `artifact.json` that can be counted again; the first of `found` may not be zero."""
    first = next(iter(found))
    if not found[first]:
        raise ValueError(f"{output} is empty: {first} is 0")
    for name, value in found.items():
        if artifact.counts.get(name, value) != value:
            raise ValueError(
                f"{output / 'artifact.json'}: counts.{name} is {artifact.counts[name]}, but there are {value}"
            )


def _check_columns(folder: Path, table: str, schema: pa.Schema) -> None:
    for path in shard_paths(folder, table):
        found = _footer(path).schema.to_arrow_schema()
        for name in dict.fromkeys([*schema.names, *found.names]):
            if name not in schema.names:
                raise ValueError(f"{path}: column {name} is not part of the schema")
            if name not in found.names:
                raise ValueError(f"{path}: column {name} is missing")
            if not found.field(name).type.equals(schema.field(name).type):
                raise ValueError(
                    f"{path}: column {name} is {found.field(name).type}, the schema says {schema.field(name).type}"
                )


def _check_tokenizer(folder: Path, artifact: Artifact) -> None:
    if artifact.tokenizer is not None and tokenizer_digest(folder) != artifact.tokenizer.digest:
        raise ValueError(f"{folder / 'tokenizer.json'}: its digest is not tokenizer.digest of artifact.json")


def _check_weights(folder: Path) -> int:
    """Read every tensor; returns how many numbers they hold."""
    import torch
    from safetensors import SafetensorError, safe_open

    total = 0
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} has no *.safetensors")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    weights = file.get_tensor(name)
                    if weights.is_floating_point() and not torch.isfinite(weights).all():
                        raise ValueError(f"{path}: {name} holds NaN or infinity")
                    total += weights.numel()
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    return total


def _check_history(path: Path, num_steps: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if len(lines) != num_steps:
        raise ValueError(f"{path} has {len(lines)} steps, num_steps is {num_steps}")
    for number, line in enumerate(lines, start=1):
        entry = json.loads(line)
        if entry.get("step") != number:
            raise ValueError(f"{path}: line {number} is step {entry.get('step')}")
        for name, value in entry.items():
            if not math.isfinite(value):
                raise ValueError(f"{path}: {name} of step {number} is {value}")


def _check_range(path: Path, name: str, values: np.ndarray, low: float, high: float) -> None:
    import numpy as np

    inside = np.isfinite(values) & (values >= low) & (values <= high)
    if not inside.all():
        raise ValueError(f"{path}: {name} is {values[~inside][0]}, not a number in {low} to {high}")


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column as floats; a null becomes NaN."""
    column: Any = batch.column(name)
    return column.cast("float64").to_numpy(zero_copy_only=False)


def _sample_ids(folder: Path, table: str) -> list[str]:
    ids = [name for _, batch in _batches(folder, table, ["sample_id"]) for name in batch.column(0).to_pylist()]
    if len(set(ids)) < len(ids):
        twice = next(name for name, times in Counter(ids).items() if times > 1)
        raise ValueError(f"{folder}: sample_id {twice!r} occurs twice in {table}")
    return ids


def _vocab_size(output: Path, artifact: Artifact) -> int:
    if artifact.tokenizer is None:
        raise ValueError(f"{output / 'artifact.json'}: tokenizer is missing")
    return artifact.tokenizer.vocab_size


def _batches(
    folder: Path, table: str, columns: list[str], batch_rows: int = 65_536
) -> Iterator[tuple[Path, pa.RecordBatch]]:
    """Batches with their file. Raises ValueError for a column with nulls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in shard_paths(folder, table):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=batch_rows, columns=columns):
                for name in batch.schema.names:
                    column: Any = batch.column(name)
                    entries = column.flatten() if pa.types.is_list(column.type) else column
                    if column.null_count or entries.null_count:
                        raise ValueError(f"{path}: column {name} holds a null")
                yield path, batch


def _num_records(folder: Path, table: str) -> int:
    return sum(_footer(path).num_rows for path in shard_paths(folder, table))


def _column_names(folder: Path, table: str) -> list[str]:
    return _footer(shard_paths(folder, table)[0]).schema.to_arrow_schema().names


def _footer(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _sum(column: Any) -> int:
    return int(column.to_numpy(zero_copy_only=False).sum())
