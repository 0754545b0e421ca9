"""Keeps the samples of a table whose scores are good enough.

Reads `scores` and the table that was scored, under the slot of its kind: `documents`, `tokens` or `chats`. Writes the
same kind, shard by shard, in the same order; samples are kept whole and unchanged. A new threshold is a new
configuration of this step alone: nothing is scored again.

One rule says how much is kept, of the best first (score descending, then id ascending, so that ties do not depend on
the order of the table): a fraction, a number of samples, all from a score on, or as many as fit a budget of tokens or
bytes. A budget is filled up to the first sample that would exceed it, so that there is one threshold and no sample
above it is left out. With `enable_source_quotas` every source is ranked on its own and what is kept is divided among
the sources by the largest remainder, in proportion to what they have: sources whose scores lie lower keep their share.

The scores must be those of the table: an id that the table lacks is an error, and so are ids without a score, unless
they are as many as the scoring step counted as dropped. Lost: samples that were not scored, and those below.

Memory: ids and sources of table and scores in Arrow's layout, a hash table of the ids and four numbers a sample, some
200 bytes in all; and one shard a worker.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_tokens
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.selection.choice import (
    Candidates,
    TableKind,
    check_same_samples,
    choose,
    match_scores,
    sizes_of,
    table_sizes,
)
from ropewalk.stages.data.selection.samples import check_distinct, check_samples
from ropewalk.stages.data.selection.scores import LENGTH_PART, common_sources, read_scores
from ropewalk.stages.schema import (
    Artifact,
    Record,
    read_artifact,
    read_table,
    shard_paths,
    tokens_schema,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "select"
VERSION = 1

_KINDS: tuple[TableKind, ...] = ("documents", "tokens", "chats")
_RULES = ("keep_fraction", "num_samples", "min_score", "budget_tokens", "budget_bytes")


class SelectConfig(Record):
    """How much is kept. Exactly one rule."""

    keep_fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the scored samples, rounded to the nearest number."""
    num_samples: int | None = Field(default=None, ge=1)
    """So many samples."""
    min_score: float | None = Field(default=None, allow_inf_nan=False)
    """All samples with this score or a higher one."""
    budget_tokens: int | None = Field(default=None, ge=1)
    """At most so many tokens: of Tokens the table's own, otherwise the part `num_tokens` of the scores."""
    budget_bytes: int | None = Field(default=None, ge=1)
    """At most so many bytes of UTF-8 text; not for Tokens."""
    enable_source_quotas: bool = False
    """Rank each source on its own and keep the sources' shares. Means nothing for `min_score`."""

    @model_validator(mode="after")
    def _one_rule(self) -> SelectConfig:
        if sum(getattr(self, name) is not None for name in _RULES) != 1:
            raise ValueError(f"select needs exactly one of {', '.join(_RULES)}")
        if self.enable_source_quotas and self.min_score is not None:
            raise ValueError("enable_source_quotas has no meaning with min_score, which is the same for all sources")
        return self


def amount(config: SelectConfig, available: int) -> int | None:
    """How much is kept of `available` samples, tokens or bytes; None where a score decides.

    Raises ValueError if more samples are asked for than there are.
    """
    if config.min_score is not None:
        return None
    if config.keep_fraction is not None:
        # Through the decimal spelling, as shares of a mixture are.
        return int(Fraction(repr(config.keep_fraction)) * available + Fraction(1, 2))
    if config.num_samples is not None and config.num_samples > available:
        raise ValueError(f"select wants num_samples {config.num_samples}, but {available} were scored")
    return min(config.num_samples or config.budget_tokens or config.budget_bytes or 0, available)


def measure(config: SelectConfig, kind: TableKind, folder: Path, scores: pa.Table, ids: pa.ChunkedArray) -> np.ndarray:
    """The size of each sample in the unit of the budget, 1 where there is none.

    Raises ValueError if the table has no such size.
    """
    import numpy as np

    if config.budget_bytes is not None and kind == "tokens":
        raise ValueError("budget_bytes: Tokens hold no text: use budget_tokens")
    if config.budget_tokens is not None and kind != "tokens":
        if LENGTH_PART not in scores.schema.names:
            raise ValueError(f"budget_tokens: the scores have no part {LENGTH_PART}: use budget_bytes")
        return match_scores(ids, scores, LENGTH_PART).astype(np.int64)
    if config.budget_tokens is not None or config.budget_bytes is not None:
        return table_sizes(kind, folder)
    return np.ones(len(ids), dtype=np.int64)


def read_candidates(config: SelectConfig, kind: TableKind, folder: Path, scores_folder: Path) -> Candidates:
    """The table's samples with their scores. Raises ValueError if scores and table do not match."""
    id_column = "sample_id" if kind == "chats" else "doc_id"
    table = read_table(folder, kind, [id_column, "source"])
    ids = table.column(id_column)
    check_distinct(ids, kind)
    scores = read_scores(scores_folder)
    check_same_samples(ids, scores.column("sample_id"), read_artifact(scores_folder).counts, scores_folder)
    sizes = measure(config, kind, folder, scores, ids)
    return Candidates.of(ids, table.column("source"), match_scores(ids, scores, "score"), sizes)


def filter_shard(kind: TableKind, work: tuple[int, Path, np.ndarray], folder: Path) -> dict[str, int]:
    """Write the marked rows of a shard; returns how much that is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, path, keep = work
    table = pq.read_table(path)
    kept = table.filter(pa.array(keep))
    write_shard(folder, kind, number, kept)
    counts = {"num_in": table.num_rows, "num_kept": kept.num_rows}
    if kind == "chats":
        return counts
    column = {"documents": "num_bytes", "tokens": "input_ids"}[kind]
    before, after = (
        sum(int(sizes_of(kind, chunk).sum()) for chunk in rows.column(column).chunks) for rows in (table, kept)
    )
    names = ("num_in_bytes", "num_kept_bytes") if kind == "documents" else ("num_tokens_in", "num_tokens")
    return counts | dict(zip(names, (before, after), strict=True))


def check(config: SelectConfig, output: Path) -> None:
    """As for the stages that write this kind; Tokens may have a loss mask."""
    import pyarrow.parquet as pq

    artifact = read_artifact(output)
    if artifact.kind != "tokens":
        check_samples(config, output)
        return
    paths = shard_paths(output, "tokens")
    if "loss_mask" not in pq.read_schema(paths[0]).names:
        check_tokens(config, output)
        return
    for path in paths:
        if not pq.read_schema(path).equals(tokens_schema(loss_mask=True)):
            raise ValueError(f"{path}: its columns are not those of Tokens with a loss_mask")
    num_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    if not num_rows or artifact.counts.get("num_kept") != num_rows:
        raise ValueError(f"{output / 'artifact.json'}: counts.num_kept is not {num_rows}, or there are none")


def draw_selection(path: Path, candidates: Candidates, keep: np.ndarray, thresholds: Mapping[str, float]) -> None:
    """A histogram of the scores, kept and not, with a line for each threshold."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    scored = candidates.scored
    edges = np.histogram_bin_edges(candidates.scores[scored], bins=40)
    groups = [candidates.scores[scored & keep], candidates.scores[scored & ~keep]]
    axes.hist(groups, bins=edges.tolist(), stacked=True, label=["kept", "not kept"])
    for number, (name, threshold) in enumerate(thresholds.items()):
        axes.axvline(threshold, color=f"C{2 + number}", linestyle="--", label=f"threshold {name}".strip())
    axes.set(xlabel="score", ylabel="samples")
    axes.legend(fontsize="small")
    figure.savefig(path)


def describe(config: SelectConfig, candidates: Candidates, keep: np.ndarray) -> dict[str, Any]:
    """What was kept of each source, and from which score on."""
    import numpy as np

    def of(among: np.ndarray) -> dict[str, Any]:
        kept = candidates.scores[among & keep]
        lowest = {"lowest_kept_score": float(kept.min())} if len(kept) else {}
        return {"num_in": int(among.sum()), "num_kept": len(kept), **lowest}

    sources = {name: of(candidates.sources == code) for code, name in enumerate(candidates.names)}
    rule = config.model_dump(exclude_none=True)
    return {"rule": rule, "all": of(np.ones(len(keep), dtype=bool)), "sources": sources}


def _thresholds(config: SelectConfig, candidates: Candidates, found: Mapping[str, Any]) -> dict[str, float]:
    """The lines of the plot: one, or with quotas that of each frequent source."""
    if config.min_score is not None:
        return {"": config.min_score}
    if not config.enable_source_quotas:
        return {"": found["all"]["lowest_kept_score"]}
    names = [name for name, _ in common_sources(candidates.names, candidates.sources)]
    lows = {name: found["sources"].get(name, {}).get("lowest_kept_score") for name in names}
    return {name: low for name, low in lows.items() if low is not None}


def _table_slot(inputs: Mapping[str, Path]) -> TableKind:
    """The slot of the table. Raises ValueError unless there are scores and exactly one table of its slot's kind."""
    found: list[TableKind] = [kind for kind in _KINDS if kind in inputs]
    if len(found) != 1 or set(inputs) != {"scores", *found}:
        raise ValueError(f"select takes the slots scores and one of {', '.join(_KINDS)}, not {sorted(inputs)}")
    read_artifact(inputs[found[0]], found[0])
    return found[0]


def run(config: SelectConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the selection. Raises ValueError on bad input, or if nothing is kept."""
    kind = _table_slot(inputs)
    folder = inputs[kind]
    candidates = read_candidates(config, kind, folder, inputs["scores"])
    wanted = amount(config, int(candidates.sizes[candidates.scored].sum()))
    keep = choose(candidates, wanted, min_score=config.min_score, by_source=config.enable_source_quotas)
    if not keep.any():
        raise ValueError(f"select keeps nothing of {len(keep)} samples: {config.model_dump(exclude_none=True)}")
    counts = _write(kind, folder, keep, output.data, context)
    num_unscored = int((~candidates.scored).sum())
    counts["num_dropped_unscored"] = num_unscored
    counts["num_dropped_below"] = counts["num_in"] - counts["num_kept"] - num_unscored
    if counts["num_kept"] != int(keep.sum()):
        raise RuntimeError(f"select lost count of samples: {counts}, chosen were {int(keep.sum())}")
    details = describe(config, candidates, keep)
    tokenizer = read_artifact(folder).tokenizer
    write_artifact(output.data, Artifact(kind=kind, tokenizer=tokenizer, counts=counts, details=details))
    if (folder / "tokenizer").is_dir():
        shutil.copytree(folder / "tokenizer", output.data / "tokenizer")
    thresholds = _thresholds(config, candidates, details)
    draw_selection(output.observed / "selection.png", candidates, keep, thresholds)
    context.log({**counts, "lowest_kept_score": details["all"]["lowest_kept_score"]})


def _write(kind: TableKind, folder: Path, keep: np.ndarray, target: Path, context: Context) -> dict[str, int]:
    import pyarrow.parquet as pq

    items, first = {}, 0
    for number, path in enumerate(shard_paths(folder, kind)):
        end = first + pq.read_metadata(path).num_rows
        items[path.name] = (number, path, keep[first:end])
        first = end
    write: Callable[..., dict[str, int]] = partial(filter_shard, kind)
    counts: dict[str, int] = {}
    for shard in map_shards(context, write, items):
        shard.link_into(target)
        for name, value in shard.counts.items():
            counts[name] = counts.get(name, 0) + value
    return counts
