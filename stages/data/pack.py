"""Pack documents into rows without retrieval: best fit, or concatenate and cut.

Reads   slot `tokens`: Tokens.
Writes  Rows, shuffled by `seed`.
Loses   nothing with `best_fit`; with `concatenate` and `partial_row="drop"` the last, partial row; beyond `num_rows`
        the rows that a seeded shuffle puts last. All are counted.

`best_fit` is best-fit decreasing, which cuts no document that fits a row (Ding et al., 2024, arXiv 2404.10830).
`concatenate` is the usual baseline: documents in a seeded order, laid end to end and cut at each row's end.
Finished rows are shuffled: best-fit order would put all long documents first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.bins import Plan, best_fit, concatenate, room_left
from ropewalk.stages.data.rows import Corpus, Row, RowBuilder, load_corpus, make_row_id, write_rows
from ropewalk.stages.schema import AttentionPolicy, Record, TokenizerInfo, seeded_rng

NAME = "pack"
VERSION = 1
check = check_rows


class PackConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=2)
    """Length of each row, in tokens, the begin token included."""
    seed: int = 0
    """Orders the documents (`concatenate`) and the finished rows."""
    method: Literal["best_fit", "concatenate"] = "best_fit"
    """Keep documents whole where they fit, or cut them at each row's end."""
    attention: AttentionPolicy = "document"
    """What each row may see: its own document, `anchor` (also the begin token), or `causal` (everything before)."""
    partial_row: Literal["pad", "drop"] = "pad"
    """`concatenate` only: what becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all."""

    @model_validator(mode="after")
    def _only_concatenate_drops(self) -> PackConfig:
        if self.method == "best_fit" and self.partial_row == "drop":
            raise ValueError('partial_row="drop" needs method="concatenate": best-fit rows are padded')
        return self


def plan_rows(config: PackConfig, lengths: list[int]) -> tuple[Plan, int]:
    """The pieces of each row before the shuffle, and the tokens of a dropped partial row.

    `lengths` is the number of tokens of each document.
    """
    capacity = config.row_tokens - 1
    if config.method == "best_fit":
        return best_fit(lengths, capacity).to_rows(), 0
    order = seeded_rng(config.seed, NAME, "documents").permutation(len(lengths)).tolist()
    plan = concatenate(lengths, capacity, order).to_rows()
    if config.partial_row == "drop" and plan and room_left(plan[-1], capacity):
        return plan, sum(piece.num_tokens for piece in plan.pop())
    return plan, 0


def build_rows(config: PackConfig, plan: Plan, corpus: Corpus, info: TokenizerInfo) -> Iterator[Row]:
    """Lay the planned rows, in the plan's order."""
    for index, pieces in enumerate(plan):
        builder = RowBuilder(corpus, info, config.row_tokens)
        for piece in pieces:
            builder.place(piece.document, piece.start, piece.num_tokens)
            if piece.is_end:
                builder.separate()
        yield builder.finish(make_row_id(NAME, config.seed, index, builder.segments), config.attention)


def run(config: PackConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Pack slot `tokens` into rows."""
    corpus, info = load_corpus(inputs["tokens"], context.work)
    lengths = corpus.lengths.tolist()
    plan, dropped = plan_rows(config, lengths)
    order = seeded_rng(config.seed, NAME, "rows").permutation(len(plan)).tolist()
    shuffled = [plan[index] for index in order]
    kept, over = shuffled[: config.num_rows], shuffled[config.num_rows :] if config.num_rows else []
    counts = {
        "num_documents_in": len(lengths),
        "num_documents_empty": lengths.count(0),
        "num_documents_cut": len({piece.document for row in kept for piece in row if piece.start or not piece.is_end}),
        "num_tokens_in": sum(lengths),
        "num_tokens_dropped_partial_row": dropped,
        "num_tokens_dropped_over_limit": sum(piece.num_tokens for row in over for piece in row),
    }
    capacity = config.row_tokens - 1
    unused = sum(room_left(row, capacity) for row in kept)
    details = {"method": config.method, "utilisation_fraction": round(1 - unused / max(1, len(kept) * capacity), 6)}
    context.log({"utilisation_fraction": details["utilisation_fraction"]})
    rows = build_rows(config, kept, corpus, info)
    write_rows(
        output,
        context,
        rows,
        info=info,
        row_tokens=config.row_tokens,
        num_rows=len(kept),
        counts=counts,
        details=details,
    )
