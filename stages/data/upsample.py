"""Takes more of the long documents of a corpus, and of the sources that are wanted.

Reads   `tokens`: Tokens.
Writes  Tokens: a subset of the documents, in their order; `statistics.json`: tokens and documents of each source before
        the draw, after the draw by length, and in the output.
Loses   short documents (`num_dropped_short`), and documents beyond their source's share (`num_dropped_over_share`).

Upsampling is done by leaving out (Fu et al., 2024, arXiv 2402.10171; FranxYao/Long-Context-Data-Engineering,
data_engineering/slimpajama_packing.py): documents of at least 4,096 tokens stay, shorter ones with odds of 0.1. Long
documents are of few sources, so this alone changes the mixture (their mode `global`, here shares="drawn").
shares="original" is their mode `per_source`: each source keeps its share of the tokens before the draw.
shares="given" is their third mode, with the shares of the config.

Where the paper's code differs: it estimates lengths from characters, takes documents in a shuffled stream until a
source's budget is used up, and has the shares of SlimPajama written into it. Here lengths are tokens, shares are
counted, and a document's two numbers (one for the draw by length, one for its rank in its source) are hashes of its id
and the seed. So neither order nor shards matter, and documents that join the corpus change no other's numbers.

Sources are cut to the largest total that their shares allow, or to `num_tokens`: each keeps the documents of lowest
rank whose sum is nearest to its budget, and is off by half a document at most. Memory: one shard a worker; 24 bytes a
document in the driver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from ropewalk.stages.checks import check_tokens
from ropewalk.stages.context import Context, Output
from ropewalk.stages.schema import (
    Artifact,
    Record,
    list_lengths,
    read_artifact,
    shard_paths,
    stable_id,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np

NAME = "upsample"
VERSION = 1
check = check_tokens


class UpsampleConfig(Record):
    """Which documents stay."""

    min_long_tokens: int = Field(default=4096, ge=0)
    """Documents of at least so many tokens are long and not left out for their length."""
    short_keep_fraction: float = Field(default=0.1, ge=0, le=1)
    """Odds of a shorter document to stay. 1: no draw by length."""
    shares: Literal["original", "drawn", "given"] = "original"
    """Each source's share of the output's tokens: as in the input, as the draw by length leaves it, or `fractions`."""
    fractions: dict[str, float] = Field(default_factory=dict)
    """given: share of the tokens by source; the sum is 1. Every source of the input has one, which may be 0."""
    num_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the output, within one document a source. None: as many as the shares allow."""
    seed: int = 0

    @field_validator("fractions")
    @classmethod
    def _shares(cls, fractions: dict[str, float]) -> dict[str, float]:
        if fractions and not (abs(sum(fractions.values()) - 1) <= 1e-6 and min(fractions.values()) >= 0):
            raise ValueError(
                f"fractions must be shares that sum to 1, but {fractions} sum to {sum(fractions.values())}"
            )
        return fractions

    @model_validator(mode="after")
    def _fractions_belong_to_given(self) -> UpsampleConfig:
        if (self.shares == "given") != bool(self.fractions):
            raise ValueError('fractions and shares="given" go together')
        return self


@dataclass(frozen=True)
class Lengths:
    """The documents of one source that the draw by length leaves."""

    lengths: np.ndarray
    """Tokens of each."""
    ranks: np.ndarray
    """uint64: the lowest are kept."""


def is_drawn(config: UpsampleConfig, doc_id: str, num_tokens: int) -> bool:
    """Whether the draw by length leaves a document."""
    if num_tokens >= config.min_long_tokens or config.short_keep_fraction == 1:
        return True
    return int(stable_id(NAME, "length", config.seed, doc_id), 16) < config.short_keep_fraction * 2**64


def rank(config: UpsampleConfig, doc_id: str) -> int:
    """A document's rank in its source, in 0 to 2^64 - 1: the lowest stay."""
    return int(stable_id(NAME, "share", config.seed, doc_id), 16)


def measure_shard(config: UpsampleConfig, path: Path, folder: Path) -> dict[str, Any]:
    """Write `drawn.npy`, lengths and ranks of the documents that are drawn, ordered by source.

    Returns by source how many documents and tokens it has, and how many of them are drawn.
    """
    import numpy as np
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        table = file.read(columns=["doc_id", "source", "input_ids"])
    lengths = list_lengths(table.column("input_ids"))
    rows = sorted(zip(table.column("source").to_pylist(), table.column("doc_id").to_pylist(), lengths, strict=True))
    sources: dict[str, dict[str, int]] = {}
    drawn: list[tuple[int, int]] = []
    for source, doc_id, length in rows:
        found = sources.setdefault(source, {"num_in": 0, "num_tokens_in": 0, "num_drawn": 0, "num_tokens_drawn": 0})
        found["num_in"] += 1
        found["num_tokens_in"] += length
        if is_drawn(config, doc_id, length):
            found["num_drawn"] += 1
            found["num_tokens_drawn"] += length
            drawn.append((length, rank(config, doc_id)))
    np.save(folder / "drawn.npy", np.array(drawn, np.uint64).reshape(-1, 2))
    return {"sources": sources}


def wanted_shares(config: UpsampleConfig, sources: Mapping[str, Mapping[str, int]]) -> dict[str, float] | None:
    """The share of each source in the output; None if the draw by length decides.

    Raises ValueError if `fractions` and the sources differ.
    """
    if config.shares == "drawn":
        return None
    if config.shares == "original":
        total = sum(found["num_tokens_in"] for found in sources.values())
        return {source: found["num_tokens_in"] / total for source, found in sources.items()}
    if set(config.fractions) != set(sources):
        raise ValueError(
            f"fractions names the sources {sorted(config.fractions)}, but the tokens have {sorted(sources)}"
        )
    return dict(config.fractions)


def budgets(shares: Mapping[str, float] | None, drawn: Mapping[str, int], num_tokens: int | None) -> dict[str, float]:
    """The tokens that each source may have, from those that the draw by length leaves it.

    Raises ValueError if there is none, or there are not `num_tokens`.
    """
    total = sum(drawn.values())
    if not total:
        raise ValueError("the draw by length leaves no token: raise short_keep_fraction or lower min_long_tokens")
    if shares is None:
        shares = {source: tokens / total for source, tokens in drawn.items()}
        most = total
    else:
        limits = {source: drawn[source] / share for source, share in shares.items() if share > 0}
        scarce = min(sorted(limits), key=lambda source: limits[source])
        most = limits[scarce]
        if not most:
            raise ValueError(f"source {scarce!r} has a share, but the draw by length leaves it no token")
    if num_tokens is not None and num_tokens > most:
        raise ValueError(
            f"num_tokens asks for {num_tokens}, but the draw by length and the shares allow {int(most)}: raise "
            "short_keep_fraction or lower num_tokens"
        )
    wanted = most if num_tokens is None else num_tokens
    return {source: share * wanted for source, share in shares.items()}


def cut_rank(documents: Lengths, budget: float) -> int:
    """The rank below which documents stay, so that their tokens are as near to the budget as can be."""
    import numpy as np

    order = np.argsort(documents.ranks)
    sums = np.concatenate([[0], np.cumsum(documents.lengths[order])])
    nearest = sums[np.argmin(np.abs(sums - budget))]
    # Empty documents that follow cost nothing.
    count = int(np.searchsorted(sums, nearest, side="right")) - 1
    return int(documents.ranks[order[count]]) if count < len(order) else 2**64


def filter_shard(
    config: UpsampleConfig, cuts: Mapping[str, int], shard: tuple[int, Path], folder: Path
) -> dict[str, Any]:
    """Write the documents of a shard that stay; returns counts by source."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, path = shard
    with pq.ParquetFile(path) as file:
        table = file.read()
    lengths = list_lengths(table.column("input_ids"))
    kept: list[bool] = []
    counts = {
        "num_in": len(lengths),
        "num_tokens_in": sum(lengths),
        "num_dropped_short": 0,
        "num_dropped_over_share": 0,
    }
    counts |= {f"num_tokens_{name}": 0 for name in ("dropped_short", "dropped_over_share")}
    sources: dict[str, list[int]] = {}
    columns = (table.column("source").to_pylist(), table.column("doc_id").to_pylist(), lengths)
    for source, doc_id, length in zip(*columns, strict=True):
        reason = None
        if not is_drawn(config, doc_id, length):
            reason = "dropped_short"
        elif rank(config, doc_id) >= cuts[source]:
            reason = "dropped_over_share"
        kept.append(reason is None)
        if reason:
            counts[f"num_{reason}"] += 1
            counts[f"num_tokens_{reason}"] += length
        else:
            found = sources.setdefault(source, [0, 0])
            found[0] += 1
            found[1] += length
    write_shard(folder, "tokens", number, table.filter(pa.array(kept, pa.bool_())))
    return {**counts, "sources": sources}


def run(config: UpsampleConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Upsample slot `tokens`. Raises ValueError on bad input, or if the shares cannot be had."""
    started = time.perf_counter()
    artifact = read_artifact(inputs["tokens"], "tokens")
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(inputs["tokens"], "tokens"))}
    sources, documents = _measure(config, paths, context)
    shares = wanted_shares(config, sources)
    wanted = budgets(
        shares, {source: found["num_tokens_drawn"] for source, found in sources.items()}, config.num_tokens
    )
    cuts = {source: cut_rank(documents[source], wanted[source]) for source in sources}
    totals: dict[str, int] = {}
    kept: dict[str, list[int]] = {source: [0, 0] for source in sources}
    for shard in map_shards(context, partial(filter_shard, config, cuts), paths, label="kept"):
        shard.link_into(output.data)
        for source, (num_documents, num_tokens) in shard.counts.pop("sources").items():
            kept[source][0] += num_documents
            kept[source][1] += num_tokens
        totals = {name: totals.get(name, 0) + value for name, value in shard.counts.items()}
    counts = _counts(totals, kept)
    report = _report(sources, kept, counts)
    (output.data / "statistics.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    write_artifact(output.data, Artifact(kind="tokens", tokenizer=artifact.tokenizer, counts=counts, details=report))
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "documents_per_second": counts["num_in"] / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(counts)


def _measure(
    config: UpsampleConfig, paths: Mapping[str, tuple[int, Path]], context: Context
) -> tuple[dict[str, dict[str, int]], dict[str, Lengths]]:
    """Sums by source, and the documents that the draw by length leaves each."""
    import numpy as np

    sources: dict[str, dict[str, int]] = {}
    parts: dict[str, list[np.ndarray]] = {}
    items = {name: path for name, (_, path) in paths.items()}
    for shard in map_shards(context, partial(measure_shard, config), items, label="measured"):
        drawn = np.load(shard.folder / "drawn.npy")
        for source, found in shard.counts["sources"].items():
            sums = sources.setdefault(source, dict.fromkeys(found, 0))
            for name, value in found.items():
                sums[name] += value
            parts.setdefault(source, []).append(drawn[: found["num_drawn"]])
            drawn = drawn[found["num_drawn"] :]
    if not sum(found["num_tokens_in"] for found in sources.values()):
        raise ValueError("slot `tokens` has no token to upsample")
    joined = {source: np.concatenate(parts[source]) for source in parts}
    return dict(sorted(sources.items())), {
        source: Lengths(rows[:, 0].astype(np.int64), rows[:, 1]) for source, rows in joined.items()
    }


def _counts(totals: Mapping[str, int], kept: Mapping[str, list[int]]) -> dict[str, int]:
    num_kept, num_tokens = (sum(found[place] for found in kept.values()) for place in (0, 1))
    counts = {**totals, "num_kept": num_kept, "num_tokens": num_tokens}
    dropped = counts["num_dropped_short"] + counts["num_dropped_over_share"]
    if counts["num_in"] != num_kept + dropped:
        raise RuntimeError(f"upsample lost count of documents: {counts}")
    if not num_tokens:
        raise ValueError(f"upsample kept no token: {counts}; raise num_tokens")
    return counts


def _report(
    sources: Mapping[str, Mapping[str, int]], kept: Mapping[str, list[int]], counts: Mapping[str, int]
) -> dict[str, Any]:
    return {
        "sources": {
            source: {
                **found,
                "num_kept": kept[source][0],
                "num_tokens": kept[source][1],
                "tokens_in_fraction": found["num_tokens_in"] / counts["num_tokens_in"],
                "tokens_fraction": kept[source][1] / counts["num_tokens"],
            }
            for source, found in sources.items()
        }
    }
