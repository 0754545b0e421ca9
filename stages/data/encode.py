"""Turns Documents into Tokens, with a tokenizer that is given or trained here.

Reads `documents`, and optionally `tokenizer` (a model or tokenizer folder; its vocabulary is extended by
`added_tokens` only). Writes one Tokens shard a Documents shard, one row a document, without begin and end marks;
`tokenizer/`, which stock transformers loads; `statistics.json`; and, under observed, a plot of document lengths.

The spelling of a special token inside a document stays text: `<|eos|>` in a source file does not end a document.
Nothing is truncated, whatever `tokenizer.json` says. Lost: documents that the tokenizer turns into no token.

Each shard is kept once it is done, so that a new attempt goes on from there. Memory: one shard a worker; training
holds the word counts of its sample.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ropewalk.stages.checks import check_tokens
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.vocabulary import (
    add_markers,
    describe_tokenizer,
    load_tokenizer,
    text_encoder,
    tokenizer_digest,
    train_tokenizer,
)
from ropewalk.stages.schema import (
    Artifact,
    Record,
    TokenizerInfo,
    iterate_table,
    list_lengths,
    read_artifact,
    shard_paths,
    tokens_schema,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "encode"
VERSION = 1
check = check_tokens

_BATCH_BYTES = 2**20  # An Encoding takes some 100 bytes a token, so a whole shard at once would not be bounded.


class EncodeConfig(Record):
    """Which tokenizer."""

    vocab_size: int | None = Field(default=None, ge=258)
    """Ids of the tokenizer to train, begin and end token included, `added_tokens` not. None: slot `tokenizer`."""
    train_bytes: int = Field(default=32 * 2**20, gt=0)
    """About so much text trains the tokenizer: every n-th document, n as small as this allows."""
    bos_token: str = Field(default="<|bos|>", min_length=1)
    """Begin token of a trained tokenizer; its id is 0."""
    eos_token: str = Field(default="<|eos|>", min_length=1)
    """End token of a trained tokenizer. May equal `bos_token`."""
    added_tokens: tuple[str, ...] = ()
    """Marker tokens that later stages insert, appended behind the vocabulary in this order."""

    @field_validator("added_tokens")
    @classmethod
    def _distinct(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tokens)) < len(tokens) or "" in tokens:
            raise ValueError("added_tokens must be distinct and not empty")
        return tokens


class ShardEncoder:
    """Encodes one Documents shard after another."""

    def __init__(self, tokenizer_json: str) -> None:
        self._encoder = text_encoder(tokenizer_json)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, Any]:
        """Write the Tokens of a Documents shard, given with its number; returns `num_in` and the statistics."""
        import pyarrow.parquet as pq

        number, path = shard
        documents = pq.read_table(path, columns=["doc_id", "text", "source", "num_bytes"])
        encoded = self.encode(documents)
        kept = encoded.filter([length > 0 for length in list_lengths(encoded.column("input_ids"))])
        write_shard(folder, "tokens", number, kept.select(["doc_id", "source", "input_ids"]).cast(tokens_schema()))
        return {"num_in": documents.num_rows, **TokenStatistics.of(kept).to_json()}

    def encode(self, documents: pa.Table) -> pa.Table:
        """Documents (`doc_id`, `source`, `text`, `num_bytes`) to the same without `text`, with `input_ids`."""
        import numpy as np
        import pyarrow as pa

        ids = [
            np.asarray(encoding.ids, dtype=np.int32)
            for texts in _batches(documents.column("text").to_pylist(), documents.column("num_bytes").to_pylist())
            for encoding in self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        ]
        offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in ids])]).astype(np.int32)
        values = np.concatenate(ids) if ids else np.zeros(0, dtype=np.int32)
        input_ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
        return documents.select(["doc_id", "source", "num_bytes"]).append_column("input_ids", input_ids)


def _batches(texts: list[str], sizes: list[int]) -> Iterator[list[str]]:
    batch: list[str] = []
    filled = 0
    for text, size in zip(texts, sizes, strict=True):
        batch.append(text)
        filled += size
        if filled >= _BATCH_BYTES:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


@dataclass
class TokenStatistics:
    """Sums over documents; shards add up in any order."""

    num_documents: Counter[str] = field(default_factory=Counter)
    num_tokens: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents of 2^k up to 2^(k+1)-1 tokens, by k."""

    @classmethod
    def of(cls, shard: pa.Table) -> TokenStatistics:
        """Count the documents of a shard with `source`, `num_bytes` and `input_ids`."""
        found = cls()
        lengths = list_lengths(shard.column("input_ids"))
        sources, sizes = shard.column("source").to_pylist(), shard.column("num_bytes").to_pylist()
        for source, size, length in zip(sources, sizes, lengths, strict=True):
            found.num_documents[source] += 1
            found.num_tokens[source] += length
            found.num_bytes[source] += size
            found.lengths[length.bit_length() - 1] += 1
        return found

    def to_json(self) -> dict[str, Any]:
        """The sums as JSON, whose keys are texts."""
        return {item.name: dict(getattr(self, item.name)) for item in fields(self)}

    def add(self, other: Mapping[str, Any]) -> None:
        """Add what `to_json` gave for another shard."""
        for name in ("num_documents", "num_tokens", "num_bytes"):
            getattr(self, name).update(other[name])
        self.lengths.update({int(length): number for length, number in other["lengths"].items()})

    def report(self) -> dict[str, Any]:
        """For `statistics.json`."""
        total_tokens, total_bytes = self.num_tokens.total(), self.num_bytes.total()
        return {
            "bytes_per_token": total_bytes / total_tokens,
            "documents_by_length_tokens": [
                {"from": 2**k, "to": 2 ** (k + 1) - 1, "num_documents": self.lengths[k]} for k in sorted(self.lengths)
            ],
            "num_bytes": total_bytes,
            "num_documents": self.num_documents.total(),
            "num_tokens": total_tokens,
            "sources": {
                source: {
                    "bytes_per_token": self.num_bytes[source] / self.num_tokens[source],
                    "num_bytes": self.num_bytes[source],
                    "num_documents": self.num_documents[source],
                    "num_tokens": self.num_tokens[source],
                }
                for source in sorted(self.num_tokens)
            },
        }


def sample_texts(documents: Path, train_bytes: int) -> Iterator[str]:
    """Every n-th text of a Documents artifact, n the smallest for which the mean sample fits `train_bytes`."""
    sizes = iterate_table(documents, "documents", ["num_bytes"])
    total = sum(sum(batch.column("num_bytes").to_pylist()) for batch in sizes)
    step = max(1, -(-total // train_bytes))
    number = 0
    for batch in iterate_table(documents, "documents", ["text"]):
        texts = batch.column("text")
        for index in range(-number % step, len(texts), step):
            yield texts[index].as_py()
        number += len(texts)


def make_tokenizer(config: EncodeConfig, inputs: Mapping[str, Path], folder: Path) -> TokenizerInfo:
    """Train or load the tokenizer, extend it, and save it to `folder`.

    Raises ValueError unless exactly one of `vocab_size` and the slot `tokenizer` is given.
    """
    given = inputs.get("tokenizer")
    if (given is None) == (config.vocab_size is None):
        raise ValueError("encode needs either vocab_size, to train a tokenizer, or an input slot `tokenizer`: give one")
    if given is not None:
        tokenizer = load_tokenizer(given)
    else:
        assert config.vocab_size is not None
        texts = sample_texts(inputs["documents"], config.train_bytes)
        tokenizer = train_tokenizer(texts, config.vocab_size, config.bos_token, config.eos_token)
    markers = add_markers(tokenizer, config.added_tokens)
    tokenizer.save_pretrained(str(folder))
    return describe_tokenizer(tokenizer, tokenizer_digest(folder), markers)


def _draw_lengths(lengths: Counter[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    bins = range(min(lengths), max(lengths) + 1)
    axes.bar([f"{2**k:,}" for k in bins], [lengths[k] for k in bins])
    axes.set(xlabel="document length in tokens, from", ylabel="documents")
    axes.tick_params(axis="x", rotation=45)
    figure.savefig(path)


def _write_tokens(
    documents: Path, tokenizer_json: str, folder: Path, context: Context
) -> tuple[TokenStatistics, dict[str, int]]:
    statistics, num_in = TokenStatistics(), 0
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(documents, "documents"))}
    for shard in map_shards(context, partial(ShardEncoder, tokenizer_json), paths):
        num_in += shard.counts["num_in"]
        statistics.add(shard.counts)
        shard.link_into(folder)
    num_kept = statistics.num_documents.total()
    counts = {"num_in": num_in, "num_kept": num_kept, "num_dropped_no_tokens": num_in - num_kept}
    return statistics, {**counts, "num_tokens": statistics.num_tokens.total()}


def run(config: EncodeConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Encode every document. Raises ValueError on bad input, or if no document yields a token."""
    documents = inputs["documents"]
    expected = read_artifact(documents, "documents").counts.get("num_kept")
    started = time.perf_counter()
    info = make_tokenizer(config, inputs, output.data / "tokenizer")
    trained = time.perf_counter()
    tokenizer_json = (output.data / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    statistics, counts = _write_tokens(documents, tokenizer_json, output.data, context)
    if expected is not None and counts["num_in"] != expected:
        raise ValueError(f"{documents} should hold {expected} documents, but has {counts['num_in']}")
    if not counts["num_kept"]:
        raise ValueError(f"no document of {documents} yields a token")
    report = statistics.report()
    (output.data / "statistics.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    write_artifact(output.data, Artifact(kind="tokens", tokenizer=info, counts=counts, details=report))
    _draw_lengths(statistics.lengths, output.observed / "token_lengths.png")
    seconds = time.perf_counter() - trained
    measured = {
        "tokenizer_seconds": trained - started,
        "encode_seconds": seconds,
        "tokens_per_second": counts["num_tokens"] / seconds,
    }
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log({**counts, "vocab_size": info.vocab_size, "bytes_per_token": report["bytes_per_token"]})
