"""Describes a corpus: how much text of which length each source has.

Reads   `documents` (Documents) or `tokens` (Tokens).
Writes  a report: `statistics.json` with tables by source and by length; under observed, `lengths.png`, the share of the
        corpus in documents of each length, stacked by source.
Loses   nothing; every document is counted once.

Lengths are bytes of UTF-8 or tokens, in buckets of 2^k up to 2^(k+1)-1; empty documents have a bucket from 0 to 0. Long
training data is in few documents, so shares are of bytes or tokens, not of documents. Quantiles are exact. Memory: one
shard a worker; the lengths of all documents in the driver, 8 bytes each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.cleaning.shard_tables import Table, numbered_shards, read_shard
from ropewalk.stages.schema import Artifact, Record, list_lengths, read_artifact, write_artifact
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np

NAME = "describe"
VERSION = 1

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MAX_DRAWN = 9
"""Sources with a colour of their own; the smaller ones are drawn together."""


class DescribeConfig(Record):
    """Nothing to choose: the tables are small, and a reader picks what is wanted."""


def check(config: Any, output: Path) -> None:
    """The tables add up to the counts, by source and by length. Raises ValueError."""
    artifact = read_artifact(output, "report")
    path = output / "statistics.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    unit = report["unit"]
    for name in ("num_documents", f"num_{unit}"):
        for table, rows in (("by_source", report["by_source"].values()), ("by_length", report["by_length"])):
            total = sum(row[name] for row in rows)
            if total != artifact.counts.get(name):
                raise ValueError(f"{path}: {table} has {total} {name}, artifact.json {artifact.counts.get(name)}")


def measure_shard(table: Table, path: Path, folder: Path) -> dict[str, Any]:
    """Write the documents' lengths, ordered by source, to `lengths.npy`; returns how many documents each source has."""
    import numpy as np

    content, length = ("text", ["num_bytes"]) if table == "documents" else ("input_ids", [])
    shard = read_shard(path, ["source", content, *length])
    column = shard.column("num_bytes").to_pylist() if length else list_lengths(shard.column("input_ids"))
    sources = shard.column("source").to_pylist()
    order = sorted(range(len(sources)), key=sources.__getitem__)
    np.save(folder / "lengths.npy", np.array([column[row] for row in order], np.int64))
    num_nul = sum("\0" in text.as_py() for text in shard.column("text")) if table == "documents" else 0
    return {"sources": dict(sorted(Counter(sources).items())), "num_documents_with_nul_bytes": num_nul}


def length_table(lengths: np.ndarray, unit: str) -> list[dict[str, Any]]:
    """Documents and bytes or tokens in each bucket from the shortest document's to the longest's."""
    import numpy as np

    total = max(1, int(lengths.sum()))
    # Exact, where the logarithm of a length just below a power of two would be rounded up.
    buckets = np.where(lengths > 0, np.frexp(lengths.astype(np.float64))[1] - 1, -1)
    rows = []
    for k in range(int(buckets.min()), int(buckets.max()) + 1):
        mine = lengths[buckets == k]
        rows.append(
            {
                "from": 2**k if k >= 0 else 0,
                "to": 2 ** (k + 1) - 1,
                "num_documents": len(mine),
                f"num_{unit}": int(mine.sum()),
                f"{unit}_fraction": int(mine.sum()) / total,
            }
        )
    return rows


def describe_source(lengths: np.ndarray, unit: str, total: int) -> dict[str, Any]:
    """The row of a source: how much it has, its share, its quantiles of length, and its own table by length."""
    import numpy as np

    ordered = np.sort(lengths)
    ranks = {q: min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1) for q in _QUANTILES}
    return {
        "num_documents": len(ordered),
        f"num_{unit}": int(ordered.sum()),
        f"{unit}_fraction": int(ordered.sum()) / max(1, total),
        f"longest_{unit}": int(ordered[-1]),
        f"quantiles_{unit}": {f"{q:g}": int(ordered[max(0, rank)]) for q, rank in ranks.items()},
        "by_length": length_table(ordered, unit),
    }


def describe(by_source: Mapping[str, np.ndarray], unit: str) -> dict[str, Any]:
    """The whole report, from the lengths of each source's documents."""
    import numpy as np

    everything = np.concatenate([by_source[source] for source in sorted(by_source)])
    total = int(everything.sum())
    return {
        "unit": unit,
        **{name: value for name, value in describe_source(everything, unit, total).items() if name != "by_length"},
        "by_source": {source: describe_source(by_source[source], unit, total) for source in sorted(by_source)},
        "by_length": length_table(everything, unit),
    }


def run(config: DescribeConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Describe slot `documents` or `tokens`. Raises ValueError on bad input or an empty corpus."""
    import numpy as np

    if ("tokens" in inputs) == ("documents" in inputs):
        raise ValueError("describe reads either slot `documents` or slot `tokens`: connect one of them")
    table: Table = "tokens" if "tokens" in inputs else "documents"
    unit = "tokens" if table == "tokens" else "bytes"
    paths = {name: path for name, (_, path) in numbered_shards(inputs[table], table).items()}
    found: dict[str, list[np.ndarray]] = {}
    num_nul = 0
    for shard in map_shards(context, partial(measure_shard, table), paths):
        num_nul += shard.counts["num_documents_with_nul_bytes"]
        lengths = np.load(shard.folder / "lengths.npy")
        for source, number in shard.counts["sources"].items():
            found.setdefault(source, []).append(lengths[:number])
            lengths = lengths[number:]
    if not found:
        raise ValueError(f"{inputs[table]} has no document to describe")
    report = describe({source: np.concatenate(parts) for source, parts in found.items()}, unit)
    counts = {"num_documents": report["num_documents"], f"num_{unit}": report[f"num_{unit}"]}
    if table == "documents":
        report["num_documents_with_nul_bytes"] = counts["num_documents_with_nul_bytes"] = num_nul
    text = json.dumps(report, indent=1, sort_keys=True)
    (output.data / "statistics.json").write_text(text + "\n", encoding="utf-8")
    shares = {source: row[f"{unit}_fraction"] for source, row in report["by_source"].items()}
    write_artifact(output.data, Artifact(kind="report", counts=counts, details={"unit": unit, "fractions": shares}))
    draw_lengths(report, output.observed / "lengths.png")
    context.log(counts)


def draw_lengths(report: Mapping[str, Any], path: Path) -> None:
    """Stack the sources' shares of each length; lengths double from bar to bar."""
    from matplotlib.figure import Figure

    unit = report["unit"]
    total = max(1, report[f"num_{unit}"])
    bounds = [row["from"] for row in report["by_length"]]
    bottoms = [0.0] * len(bounds)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in _drawn(report["by_source"], unit):
        amounts = dict.fromkeys(bounds, 0)
        for row in rows:
            amounts[row["from"]] += row[f"num_{unit}"]
        heights = [amounts[bound] / total for bound in bounds]
        axes.bar([f"{bound:,}" for bound in bounds], heights, bottom=bottoms, label=name)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.set(xlabel=f"document length in {unit}, from", ylabel=f"share of all {unit}")
    axes.tick_params(axis="x", rotation=60)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _drawn(sources: Mapping[str, Any], unit: str) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The largest sources first, and the others as one."""
    ordered = sorted(sources, key=lambda name: (-sources[name][f"num_{unit}"], name))
    drawn = [(name, sources[name]["by_length"]) for name in ordered[:_MAX_DRAWN]]
    if others := ordered[_MAX_DRAWN:]:
        rows = [row for name in others for row in sources[name]["by_length"]]
        drawn.append((f"{len(others)} others", rows))
    return drawn
