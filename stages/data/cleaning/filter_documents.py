"""Drops documents by length and by how well they compress.

Reads   `documents`: Documents.
Writes  Documents.
Loses   documents outside the limits, each under the first reason that applies, in this order: `nul_bytes`, `too_short`,
        `too_long` (in bytes or in words), `too_repetitive` and `too_dense` (outside the limits of the ratio),
        `most_repetitive` and `least_repetitive` (the tails of their source).

The compression ratio is the gzip'ed size over the size, so a low one means repetition. OLMo 3's Longmino mix drops the
top and the bottom 20 % of its long documents by it: `drop_most_repetitive_fraction` and
`drop_least_repetitive_fraction`, here of each source, because prose, code and tables compress differently. The tails
are cut at exact order statistics of the documents that pass all other limits: of n documents the ratio ranked
floor(fraction * n) from its end is the limit, and a document with just this ratio stays. So no more than the fraction
goes, and where many ratios are equal, less.

gzip is the one inside pyarrow at level 6, so that the bits depend on no library of the machine; another version of
pyarrow may compress a few bytes differently. Memory: one shard a worker; 16 bytes a document in the driver.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_documents
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.cleaning.shard_tables import add_counts, check_sum, numbered_shards, read_shard
from ropewalk.stages.data.cleaning.words import split_words
from ropewalk.stages.schema import Artifact, Record, documents_schema, write_artifact, write_shard
from ropewalk.stages.shards import Shard, map_shards

if TYPE_CHECKING:
    import numpy as np

NAME = "filter_documents"
VERSION = 1
check = check_documents

_GZIP_LEVEL = 6
_MAX_DRAWN = 9  # Sources whose limits are drawn; of more the lines could not be told apart.
_TAILS = ("most_repetitive", "least_repetitive")
REASONS = ("nul_bytes", "too_short", "too_long", "too_repetitive", "too_dense", *_TAILS)
Limits = dict[str, tuple[float, float]]
"""Lowest and highest ratio that stay, by source."""


class FilterDocumentsConfig(Record):
    """What stays. None and 0 switch a limit off."""

    min_bytes: int = Field(default=0, ge=0)
    """Of UTF-8."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Of UTF-8."""
    min_words: int = Field(default=0, ge=0)
    """Runs of letters and digits."""
    max_words: int | None = Field(default=None, gt=0)
    """Runs of letters and digits."""
    min_compression_ratio: float | None = Field(default=None, gt=0)
    """gzip'ed bytes over bytes; below it a document is too repetitive."""
    max_compression_ratio: float | None = Field(default=None, gt=0)
    """gzip'ed bytes over bytes; above it a document is too dense: encoded data, tables of numbers. Tiny documents are
    above 1, because gzip adds a header."""
    drop_most_repetitive_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of each source that goes for its low ratio."""
    drop_least_repetitive_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of each source that goes for its high ratio."""
    nul_bytes: Literal["keep", "drop"] = "keep"
    """What becomes of documents with NUL bytes; they are counted either way."""

    @model_validator(mode="after")
    def _limits_leave_something(self) -> FilterDocumentsConfig:
        for low, high in (
            ("min_bytes", "max_bytes"),
            ("min_words", "max_words"),
            ("min_compression_ratio", "max_compression_ratio"),
        ):
            lowest, highest = getattr(self, low), getattr(self, high)
            if lowest is not None and highest is not None and lowest > highest:
                raise ValueError(f"{high} {highest} is below {low} {lowest}: no document fits")
        if self.drop_most_repetitive_fraction + self.drop_least_repetitive_fraction >= 1:
            raise ValueError(
                "drop_most_repetitive_fraction and drop_least_repetitive_fraction add up to 1 or more: nothing stays"
            )
        return self

    @property
    def needs_ratio(self) -> bool:
        """Whether documents must be compressed."""
        absolute = self.min_compression_ratio is not None or self.max_compression_ratio is not None
        return absolute or self.has_tails

    @property
    def has_tails(self) -> bool:
        """Whether documents are compared with others of their source."""
        return self.drop_most_repetitive_fraction > 0 or self.drop_least_repetitive_fraction > 0


def compression_ratio(text: bytes) -> float:
    """gzip'ed size over size; 1 for no bytes."""
    import pyarrow as pa

    if not text:
        return 1.0
    return len(pa.Codec("gzip", compression_level=_GZIP_LEVEL).compress(text, asbytes=True)) / len(text)


def drop_reason(config: FilterDocumentsConfig, text: str, num_bytes: int) -> tuple[str | None, float]:
    """Why a document goes on its own account, if it does, and its ratio (NaN if it is not needed)."""
    ratio = float("nan")
    if config.nul_bytes == "drop" and "\0" in text:
        return "nul_bytes", ratio
    counts_words = config.min_words > 0 or config.max_words is not None
    num_words = len(split_words(text)) if counts_words else 0
    if num_bytes < config.min_bytes or num_words < config.min_words:
        return "too_short", ratio
    if num_bytes > (config.max_bytes or num_bytes) or num_words > (config.max_words or num_words):
        return "too_long", ratio
    if config.needs_ratio:
        ratio = compression_ratio(text.encode())
    if config.min_compression_ratio is not None and ratio < config.min_compression_ratio:
        return "too_repetitive", ratio
    if config.max_compression_ratio is not None and ratio > config.max_compression_ratio:
        return "too_dense", ratio
    return None, ratio


def measure_shard(config: FilterDocumentsConfig, path: Path, folder: Path) -> dict[str, Any]:
    """Write `reasons.npy` (index into `REASONS`, -1: none) and `ratios.npy`; returns `num_in` and counts."""
    import numpy as np

    shard = read_shard(path, ["text", "source", "num_bytes"])
    reasons, ratios, num_nul = [], [], 0
    for text, num_bytes in zip(shard.column("text"), shard.column("num_bytes").to_pylist(), strict=True):
        value = text.as_py()
        reason, ratio = drop_reason(config, value, num_bytes)
        reasons.append(-1 if reason is None else REASONS.index(reason))
        ratios.append(ratio)
        num_nul += "\0" in value
    np.save(folder / "reasons.npy", np.array(reasons, np.int8))
    np.save(folder / "ratios.npy", np.array(ratios, np.float64))
    return {"num_in": shard.num_rows, "num_with_nul_bytes": num_nul}


def tail_limits(config: FilterDocumentsConfig, ratios: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest ratio of a source that stay."""
    import numpy as np

    ordered = np.sort(ratios)
    low = _share(config.drop_most_repetitive_fraction, len(ordered))
    high = len(ordered) - 1 - _share(config.drop_least_repetitive_fraction, len(ordered))
    return float(ordered[low]), float(ordered[high])


def _share(fraction: float, total: int) -> int:
    # Through the decimal spelling: 0.29 of 100 is 29, although the nearest double is a little less.
    return int(Fraction(repr(fraction)) * total)


def source_limits(config: FilterDocumentsConfig, paths: Sequence[Path], measured: Sequence[Shard]) -> Limits:
    """The tails of every source, by the ratios of the documents that pass the other limits."""
    import numpy as np

    if not config.has_tails:
        return {}
    by_source: dict[str, list[np.ndarray]] = {}
    for path, shard in zip(paths, measured, strict=True):
        sources = np.array(read_shard(path, ["source"]).column("source").to_pylist(), object)
        passes = np.load(shard.folder / "reasons.npy") < 0
        ratios = np.load(shard.folder / "ratios.npy")
        for source in sorted(set(sources[passes].tolist())):
            by_source.setdefault(source, []).append(ratios[passes & (sources == source)])
    return {source: tail_limits(config, np.concatenate(by_source[source])) for source in sorted(by_source)}


@dataclass
class ShardFilter:
    """Writes what stays of a shard."""

    limits: Limits

    def __call__(self, shard: tuple[int, Path, Path], folder: Path) -> dict[str, Any]:
        """`shard`: its number, its file, and the folder of its measurements. Counts are by reason and by source."""
        import numpy as np
        import pyarrow as pa

        number, path, found = shard
        table = read_shard(path)
        reasons = np.load(found / "reasons.npy")
        self._tails(table.column("source").to_pylist(), np.load(found / "ratios.npy"), reasons)
        kept = table.filter(pa.array(reasons < 0)).cast(documents_schema())
        write_shard(folder, "documents", number, kept)
        counts = {f"num_dropped_{reason}": int((reasons == code).sum()) for code, reason in enumerate(REASONS)}
        return {
            "num_in": table.num_rows,
            "num_kept": kept.num_rows,
            "num_kept_bytes": int(kept.column("num_bytes").to_numpy().sum()),
            **counts,
        }

    def _tails(self, sources: list[str], ratios: np.ndarray, reasons: np.ndarray) -> None:
        import numpy as np

        if not self.limits:
            return
        passes = reasons < 0
        # A source all of whose documents were dropped before has no limits.
        limits = np.array([self.limits.get(source, (-np.inf, np.inf)) for source in sources]).reshape(-1, 2)
        reasons[passes & (ratios < limits[:, 0])] = REASONS.index("most_repetitive")
        reasons[passes & (ratios > limits[:, 1])] = REASONS.index("least_repetitive")


def run(config: FilterDocumentsConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Filter slot `documents`. Raises ValueError on bad input, or if nothing is left."""
    started = time.perf_counter()
    paths = numbered_shards(inputs["documents"], "documents")
    items = {name: path for name, (_, path) in paths.items()}
    measured = list(map_shards(context, partial(measure_shard, config), items, label="measured"))
    limits = source_limits(config, list(items.values()), measured)
    work = {name: (*paths[name], shard.folder) for name, shard in zip(paths, measured, strict=True)}
    kept = []
    for shard in map_shards(context, ShardFilter(limits), work, label="kept"):
        shard.link_into(output.data)
        kept.append(shard.counts)
    counts = add_counts(kept)
    counts["num_with_nul_bytes"] = sum(shard.counts["num_with_nul_bytes"] for shard in measured)
    check_sum(NAME, counts)
    if not counts["num_kept"]:
        raise ValueError(f"filter_documents kept no document: {counts}; widen its limits")
    details = {"ratio_limits_by_source": {source: list(pair) for source, pair in limits.items()}}
    write_artifact(output.data, Artifact(kind="documents", counts=counts, details=details))
    if config.needs_ratio:
        _draw_ratios(measured, limits, output.observed / "compression_ratios.png")
    seconds = time.perf_counter() - started
    speed = {"seconds": seconds, "documents_per_second": counts["num_in"] / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(speed) + "\n")
    context.log(counts)


def _draw_ratios(measured: Sequence[Shard], limits: Limits, path: Path) -> None:
    import numpy as np
    from matplotlib.figure import Figure

    bins = np.linspace(0, 1.2, 61)
    heights = np.zeros(60, np.int64)
    for shard in measured:
        ratios = np.load(shard.folder / "ratios.npy")
        heights += np.histogram(np.clip(ratios[~np.isnan(ratios)], 0, 1.2), bins)[0]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.stairs(heights, bins, fill=True)
    if 0 < len(limits) <= _MAX_DRAWN:
        for number, (source, pair) in enumerate(limits.items(), start=1):
            for limit, label in zip(pair, (source, None), strict=True):
                axes.axvline(min(limit, 1.2), color=f"C{number}", linewidth=1, label=label)
        axes.legend(fontsize="small", title="limits of")
    axes.set(xlabel="gzip'ed bytes over bytes (above 1.2: as 1.2)", ylabel="documents")
    figure.savefig(path)
