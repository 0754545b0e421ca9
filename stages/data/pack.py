"""Pack documents into rows without retrieval: best fit, first fit, or concatenate and cut.

Reads   slot `tokens`: Tokens.
Writes  Rows, shuffled by `seed`.
Loses   nothing with `best_fit` and `first_fit`; with `concatenate` and `partial_row="drop"` the last, partial row;
        beyond `num_rows` the rows that a seeded shuffle puts last. All are counted.

`best_fit` is best-fit decreasing, which cuts no document that fits a row (Ding et al., 2024, arXiv 2404.10830).
`first_fit` takes the documents in a seeded order and puts each into the first row with room: rows of mixed lengths.
`concatenate` is the usual baseline: documents in a seeded order, laid end to end and cut at each row's end.
Finished rows are shuffled: best-fit order would put all long documents first.

Documents are packed by unit: some consecutive shards of tokens. If there are several, each leaves its rows that are
less than half full (`concatenate`: its last, if it is not full), and what all have left is packed as one more unit.
Of a corpus of chats (tokens with a `loss_mask`) only the tokens that it names are targets, and separators.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.bins import RowPlan, best_fit, concatenate, first_fit
from ropewalk.stages.data.packing.row_batches import batches_of_rows, lay_rows
from ropewalk.stages.data.packing.row_files import UnitWriter
from ropewalk.stages.data.packing.units import (
    TokenUnit,
    finish_rows,
    load_left,
    load_tokenizer_info,
    load_tokens,
    map_units,
    sum_counts,
    token_units,
)
from ropewalk.stages.schema import AttentionPolicy, Record, TokenizerInfo, seeded_rng

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.data.packing.rows import Corpus

NAME = "pack"
VERSION = 1
check = check_rows


class PackConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=2)
    """Length of each row, in tokens, the begin token included."""
    seed: int = 0
    """Orders the documents (`first_fit`, `concatenate`) and the finished rows."""
    method: Literal["best_fit", "first_fit", "concatenate"] = "best_fit"
    """Keep documents whole where they fit, by decreasing length or in a seeded order; or cut them at each row's end."""
    attention: AttentionPolicy = "document"
    """What each row may see: its own document, `anchor` (also the begin token), or `causal` (everything before)."""
    partial_row: Literal["pad", "drop"] = "pad"
    """`concatenate` only: what becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all. Other counts are of the rows before that."""
    group_tokens: int = Field(default=2**26, ge=1)
    """Consecutive shards are packed together up to so many tokens, which bounds memory. A larger shard is alone."""

    @model_validator(mode="after")
    def _only_concatenate_drops(self) -> PackConfig:
        if self.method != "concatenate" and self.partial_row == "drop":
            raise ValueError(f'partial_row="drop" needs method="concatenate": {self.method} rows are padded')
        return self


def plan_rows(config: PackConfig, lengths: np.ndarray, unit: int) -> RowPlan:
    """The pieces of each row, from the number of tokens of each document of a unit."""
    capacity = config.row_tokens - 1
    if config.method == "best_fit":
        return best_fit(lengths, capacity)
    key = (config.seed, NAME, "documents", *([unit] if unit else []))
    order = seeded_rng(*key).permutation(len(lengths))
    return (first_fit if config.method == "first_fit" else concatenate)(lengths, capacity, order)


def partial_rows(config: PackConfig, plan: RowPlan) -> np.ndarray:
    """Which rows another unit could fill better, bool `[num_rows]`."""
    import numpy as np

    capacity = config.row_tokens - 1
    room = plan.room(capacity)
    if config.method != "concatenate":
        return room > capacity // 2
    return (np.arange(plan.num_rows) == plan.num_rows - 1) & (room > 0)


def num_cut(plan: RowPlan, corpus: Corpus) -> int:
    """Documents that lie in several pieces; those of which a part is in another unit were counted there."""
    import numpy as np

    cut = np.zeros(len(corpus.starts), np.bool_)
    cut[plan.documents[(plan.starts > 0) | ~plan.is_end]] = True
    return int((cut & (corpus.starts == 0)).sum())


def row_indices(config: PackConfig, num_rows: int, *, is_only: bool) -> np.ndarray:
    """The numbers in the ids of a unit's rows: their places in the unit; if it is the only one, in the shuffle."""
    import numpy as np

    if is_only:
        return np.argsort(seeded_rng(config.seed, NAME, "rows").permutation(num_rows))
    return np.arange(num_rows)


def run(config: PackConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Pack slot `tokens` into rows."""
    info = load_tokenizer_info(inputs["tokens"])
    units = token_units(inputs["tokens"], config.group_tokens)
    rest = partial(build_rest, config, info, len(units))
    shards = map_units(context, partial(build_unit, config, info), units, build_rest=rest)
    counts = sum_counts(shards)
    positions = max(1, counts["num_rows"] * (config.row_tokens - 1))
    utilisation = round(1 - counts["num_tokens_padding"] / positions, 6)
    context.log({"utilisation_fraction": utilisation})
    finish_rows(
        output,
        context,
        shards,
        name=NAME,
        seed=config.seed,
        info=info,
        row_tokens=config.row_tokens,
        num_rows=config.num_rows,
        details={"method": config.method, "num_units": len(units), "utilisation_fraction": utilisation},
    )


def build_unit(config: PackConfig, info: TokenizerInfo, unit: TokenUnit, folder: Path) -> dict[str, Any]:
    """Make the rows of some shards."""
    corpus = load_tokens(unit.paths, info)
    counts = {
        "num_documents_in": len(corpus.lengths),
        "num_documents_empty": int((corpus.lengths == 0).sum()),
        "num_tokens_in": int(corpus.lengths.sum()),
    }
    return counts | _write(config, info, corpus, unit.number, folder, leaves=not unit.is_only, is_only=unit.is_only)


def build_rest(
    config: PackConfig, info: TokenizerInfo, number: int, paths: tuple[Path, ...], folder: Path
) -> dict[str, Any]:
    """Make the rows of what units have left."""
    return _write(config, info, load_left(paths), number, folder, leaves=False, is_only=False)


def _write(
    config: PackConfig, info: TokenizerInfo, corpus: Corpus, unit: int, folder: Path, *, leaves: bool, is_only: bool
) -> dict[str, Any]:
    """Write the rows of a unit, which `leaves` those that it cannot fill, or is the last to pack them."""
    import numpy as np

    plan = plan_rows(config, corpus.lengths, unit)
    counts = {"num_documents_cut": num_cut(plan, corpus), "num_tokens_dropped_partial_row": 0}
    left = partial_rows(config, plan)
    with UnitWriter(folder, config.row_tokens, config.attention) as writer:
        if leaves and left.any():
            writer.leave(plan.rows(np.flatnonzero(left)), corpus)
            plan = plan.rows(np.flatnonzero(~left))
        elif config.partial_row == "drop":
            counts["num_tokens_dropped_partial_row"] = int(plan.tokens()[left].sum())
            plan = plan.rows(np.flatnonzero(~left))
        indices = row_indices(config, plan.num_rows, is_only=is_only)
        for rows in batches_of_rows(plan.num_rows, config.row_tokens):
            batch = lay_rows(plan.rows(rows), corpus, info, config.row_tokens)
            writer.write(batch, corpus, batch.row_ids(NAME, config.seed, indices[rows].tolist(), corpus))
        return counts | writer.counts
