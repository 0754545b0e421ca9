"""The records that cross a stage boundary, with units, and how they lie on disk.

Every table is a set of Parquet (zstd) shards named `<kind>-00000.parquet`, in order, beside one `artifact.json`.

Documents  `doc_id`, `text`, `source`, `num_bytes` (of the UTF-8 text), `metadata` (a JSON string).
Tokens     `doc_id`, `source`, `input_ids`; no begin or end marks. Where chats were encoded also `loss_mask`.
Vectors    `doc_id`, `vector`: one embedding a document.
Neighbours see `ropewalk.stages.data.retrieval.pool`: which documents are like which, one shard a coarse cluster.
Scores     `sample_id`, `source`, `score` (higher is better) and the parts of it, one row a sample.
Chats      `sample_id`, `source`, `messages` (role and content), `metadata` (a JSON string).
Preferences `sample_id`, `source`, `prompt` (messages, as long as the policy reads), `short_prompt` (messages, the piece
           that the reference model reads), `chosen`, `rejected` (texts), `metadata`.
Rows       `row_id`, `input_ids` (exactly `row_tokens`), `segments`, `attention`, and where needed `loss_mask`
           (`[t]`: token t is a target) and `position_ids`. Positions in no segment are inserted: separator, marker,
           planted or padding; for the attention policy they belong to the segment before them, leading ones to the
           first. An optional column is wholly absent or never null.
Checkpoint a Hugging Face folder.
Predictions see `predictions_schema`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
Kind = Literal[
    "documents",
    "tokens",
    "vectors",
    "neighbours",
    "scores",
    "chats",
    "preferences",
    "rows",
    "checkpoint",
    "predictions",
    "report",
    "export",
]
AttentionPolicy = Literal["causal", "document", "anchor"]


class Record(BaseModel):
    """Base of all configs and JSON records: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerInfo(Record):
    """What a stage that works on token ids needs to know of the tokenizer."""

    digest: str
    """sha256 hex of `tokenizer.json`."""
    vocab_size: int
    """Number of ids, added tokens included; ids are below it."""
    bos_token_id: int
    eos_token_id: int
    """Separates documents. May equal `bos_token_id`."""
    added_tokens: dict[str, int] = Field(default_factory=dict)
    """Marker tokens that methods insert, by their text."""

    def marker(self, token: str, needed_by: str) -> int:
        """The id of an added token. Raises ValueError naming the token and the field that adds it."""
        if token not in self.added_tokens:
            raise ValueError(f"{needed_by} inserts {token!r}, which the tokenizer lacks: add it to encode.added_tokens")
        return self.added_tokens[token]


class Segment(Record):
    """A piece of one document inside a row."""

    doc_id: str
    start: int
    """Offset in the document, in tokens of the Tokens table."""
    num_tokens: int
    row_start: int
    """Where the piece begins in the row, in tokens."""


class Artifact(Record):
    """`artifact.json`: what lies beside it."""

    kind: Kind
    schema_version: int = SCHEMA_VERSION
    tokenizer: TokenizerInfo | None = None
    row_tokens: int | None = None
    """Rows: the length of each row, the model's window. Checkpoints: the window that the model was trained at."""
    counts: dict[str, int] = Field(default_factory=dict)
    """What came in, was kept, trimmed and dropped, by named reason. Stages say which sums must agree."""
    details: dict[str, Any] = Field(default_factory=dict)
    """Per-kind facts that a reader shows but no stage relies on (statistics, sources, settings that were derived)."""


def write_artifact(folder: Path, artifact: Artifact) -> None:
    """Write `artifact.json`, with sorted keys so that equal content gives equal bytes."""
    text = json.dumps(artifact.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False)
    (folder / "artifact.json").write_text(text + "\n", encoding="utf-8")


def read_artifact(folder: Path, kind: Kind | None = None) -> Artifact:
    """Read `artifact.json`. Raises ValueError if it is missing, unreadable, of another kind or a newer schema."""
    path = folder / "artifact.json"
    try:
        artifact = Artifact.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not an artifact: it has no artifact.json") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if artifact.schema_version > SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {artifact.schema_version}; this Ropewalk reads {SCHEMA_VERSION}")
    if kind is not None and artifact.kind != kind:
        raise ValueError(f"{folder} holds {artifact.kind}, not {kind}")
    return artifact


def documents_schema() -> pa.Schema:
    """Arrow schema of Documents."""
    import pyarrow as pa

    strings = [pa.field(name, pa.string(), nullable=False) for name in ("doc_id", "text", "source")]
    return pa.schema(
        [*strings, pa.field("num_bytes", pa.int64(), nullable=False), pa.field("metadata", pa.string(), nullable=False)]
    )


def tokens_schema(*, loss_mask: bool = False) -> pa.Schema:
    """Arrow schema of Tokens; `loss_mask` (`[t]`: token t is a target) where only some tokens are learnt."""
    import pyarrow as pa

    fields = [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
    ]
    if loss_mask:
        fields.append(pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False))
    return pa.schema(fields)


def vectors_schema(num_dimensions: int) -> pa.Schema:
    """Arrow schema of Vectors: half precision, which halves the largest table of a dense corpus."""
    import pyarrow as pa

    vector = pa.list_(pa.float16(), num_dimensions)
    return pa.schema([pa.field("doc_id", pa.string(), nullable=False), pa.field("vector", vector, nullable=False)])


def scores_schema(parts: Sequence[str] = ()) -> pa.Schema:
    """Arrow schema of Scores; `parts` are the columns that `score` was made of, float64 like it."""
    import pyarrow as pa

    strings = [pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "source")]
    return pa.schema([*strings, *(pa.field(name, pa.float64(), nullable=False) for name in ("score", *parts))])


def chats_schema() -> pa.Schema:
    """Arrow schema of Chats."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("messages", _messages_type(), nullable=False),
            pa.field("metadata", pa.string(), nullable=False),
        ]
    )


def preferences_schema() -> pa.Schema:
    """Arrow schema of Preferences."""
    import pyarrow as pa

    names = ("chosen", "rejected", "metadata")
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("prompt", _messages_type(), nullable=False),
            pa.field("short_prompt", _messages_type(), nullable=False),
            *(pa.field(name, pa.string(), nullable=False) for name in names),
        ]
    )


def _messages_type() -> pa.DataType:
    import pyarrow as pa

    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def rows_schema(*, loss_mask: bool = False, position_ids: bool = False) -> pa.Schema:
    """Arrow schema of Rows, with the optional columns asked for."""
    import pyarrow as pa

    segment = pa.struct(
        [("doc_id", pa.string()), ("start", pa.int64()), ("num_tokens", pa.int32()), ("row_start", pa.int32())]
    )
    fields = [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("segments", pa.list_(segment), nullable=False),
        pa.field("attention", pa.string(), nullable=False),
    ]
    if loss_mask:
        fields.append(pa.field("loss_mask", pa.list_(pa.bool_()), nullable=False))
    if position_ids:
        fields.append(pa.field("position_ids", pa.list_(pa.int32()), nullable=False))
    return pa.schema(fields)


def predictions_schema() -> pa.Schema:
    """Arrow schema of Predictions: one row a sample, latency excluded (it lies in `observed/`)."""
    import pyarrow as pa

    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("task", pa.string()),
            ("length_tokens", pa.int32()),
            ("depth_fraction", pa.float64()),
            ("seed", pa.int64()),
            ("prompt_sha256", pa.string()),
            ("num_prompt_tokens", pa.int32()),
            ("prediction", pa.string()),
            ("references", pa.list_(pa.string())),
            ("score", pa.float64()),
            ("finish_reason", pa.string()),
        ]
    )


def write_shard(folder: Path, name: str, shard: int, table: pa.Table) -> Path:
    """Write one shard of a table. Raises ValueError if a column that may not be null holds a null."""
    import pyarrow.parquet as pq

    for field in table.schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ValueError(f"{folder.name}/{name}: column {field.name} holds a null, which its schema forbids")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{shard:05d}.parquet"
    pq.write_table(table, path, compression="zstd")
    return path


def write_table(
    folder: Path, name: str, schema: pa.Schema, records: Iterable[Mapping[str, Any]], *, shard_records: int = 65_536
) -> int:
    """Write records as `<name>-00000.parquet`, ... and return how many there were.

    At least one shard is written, so that an empty table still has its schema. Memory is bounded by one shard.
    """
    import pyarrow as pa

    total, shard, batch = 0, 0, []

    def flush() -> None:
        nonlocal shard, batch
        write_shard(folder, name, shard, pa.Table.from_pylist(batch, schema=schema))
        shard, batch = shard + 1, []

    for record in records:
        batch.append(dict(record))
        total += 1
        if len(batch) == shard_records:
            flush()
    if batch or shard == 0:
        flush()
    return total


def shard_paths(folder: Path, name: str) -> list[Path]:
    """The shards of a table in order. Raises ValueError if there is none."""
    # By length first: the hundred thousandth shard has a sixth digit.
    paths = sorted(folder.glob(f"{name}-*.parquet"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise ValueError(f"{folder} has no {name}-*.parquet")
    return paths


def iterate_table(folder: Path, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The record batches of a table, in order; memory is bounded by one row group."""
    import pyarrow.parquet as pq

    for path in shard_paths(folder, name):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=list(columns) if columns else None)


def read_table(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole table in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = list(columns) if columns else None
    return pa.concat_tables([pq.read_table(path, columns=wanted) for path in shard_paths(folder, name)])


def list_lengths(column: pa.ChunkedArray) -> list[int]:
    """The length of every list of a column such as `input_ids`, read from its offsets."""
    return [length for chunk in column.chunks for length in chunk.value_lengths().to_pylist()]


def stable_id(*parts: str | int) -> str:
    """A 16-hex-digit id that depends on its parts alone."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).hexdigest()[:16]


def seeded_rng(*parts: str | int) -> Any:
    """A numpy Generator (Philox) keyed by its parts: the same draws on any worker, in any order, in any process."""
    import numpy as np

    key = int.from_bytes(hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=key))
