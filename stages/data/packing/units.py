"""Rows made by units of work: memory and repeated work are bounded by a unit, whatever the corpus holds.

A unit is some consecutive Tokens shards, or one coarse cluster. Which units there are follows from config and inputs
alone. `map_units` has each of them built, in parallel and with a ledger: the finished rows of a unit lie in an Arrow
file in scratch. What a unit cannot fill a row with, it leaves; all that was left is packed once more as a last unit, so
that a corpus of a thousand units has no thousand padded rows. `finish_rows` shuffles the rows of all units together,
by one seeded permutation, and writes the Rows artifact: each output shard picks its rows from the mapped files.

Two sums are checked:

    num_tokens_in = num_tokens_kept + num_tokens_trimmed + every num_tokens_dropped_*
    num_rows * row_tokens = num_tokens_kept + num_tokens_inserted + num_tokens_padding
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.packing.row_files import LEFT, pick_rows
from ropewalk.stages.data.packing.rows import Corpus, check_counts
from ropewalk.stages.schema import (
    Artifact,
    TokenizerInfo,
    read_artifact,
    seeded_rng,
    shard_paths,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import Shard, map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ropewalk.stages.context import Context, Output

SHARD_ROWS = 4096
SHARD_TOKENS = 2**24
REST = "rest"


@dataclass(frozen=True)
class TokenUnit:
    """Consecutive shards of a Tokens artifact."""

    number: int
    paths: tuple[Path, ...]
    is_only: bool
    """There is no other unit: what does not fill a row is padded, not left."""


def token_units(tokens: Path, group_tokens: int) -> dict[str, TokenUnit]:
    """Group consecutive shards of at most `group_tokens` tokens; a larger shard is a unit of its own."""
    import pyarrow.parquet as pq

    groups: list[list[Path]] = []
    filled = 0
    for path in shard_paths(tokens, "tokens"):
        size = _num_tokens(pq.read_metadata(path))
        if not groups or filled + size > group_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    return {
        f"unit-{number:05d}": TokenUnit(number, tuple(paths), len(groups) == 1) for number, paths in enumerate(groups)
    }


def _num_tokens(footer: Any) -> int:
    """About as many tokens as a shard holds: an empty document counts as one."""
    column = footer.schema.to_arrow_schema().names.index("input_ids")
    return sum(footer.row_group(group).column(column).num_values for group in range(footer.num_row_groups))


def load_tokenizer_info(tokens: Path) -> TokenizerInfo:
    """Of a Tokens artifact. Raises ValueError if it names no tokenizer."""
    info = read_artifact(tokens, "tokens").tokenizer
    if info is None:
        raise ValueError(f"{tokens / 'artifact.json'} names no tokenizer: make the tokens with the encode stage")
    return info


def load_tokens(paths: Sequence[Path], info: TokenizerInfo) -> Corpus:
    """The documents of some Tokens shards, in memory.

    Raises ValueError for an id outside the vocabulary, or a document id that occurs twice in them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in paths]
    names = tables[0].schema.names
    columns = ["doc_id", "input_ids", *(["loss_mask"] if "loss_mask" in names else [])]
    corpus = corpus_of(pa.concat_tables([table.select(columns) for table in tables]))
    if len(corpus.ids) and not 0 <= int(corpus.ids.min()) <= int(corpus.ids.max()) < info.vocab_size:
        raise ValueError(
            f"{paths[0].parent} holds token ids outside the vocabulary of {info.vocab_size}: encode it anew"
        )
    if len(set(corpus.doc_ids)) != len(corpus.doc_ids):
        raise ValueError(
            f"{paths[0].parent} holds a doc_id more than once: deduplicate the documents by id before encoding"
        )
    return corpus


def corpus_of(table: pa.Table) -> Corpus:
    """A corpus from columns `doc_id`, `input_ids` and, where they are, `start` and `loss_mask`."""
    import numpy as np

    ids: Any = table.column("input_ids").combine_chunks()
    offsets = np.zeros(table.num_rows + 1, np.int64)
    np.cumsum(ids.value_lengths().to_numpy(zero_copy_only=False), out=offsets[1:])
    names = table.schema.names
    starts = table.column("start").to_numpy() if "start" in names else np.zeros(table.num_rows, np.int64)
    targets = None
    if "loss_mask" in names:
        masks: Any = table.column("loss_mask").combine_chunks()
        targets = masks.flatten().to_numpy(zero_copy_only=False)
        if len(targets) != offsets[-1]:
            raise ValueError("column loss_mask has other lengths than input_ids: encode the chats anew")
    return Corpus(table.column("doc_id").to_pylist(), offsets, ids.flatten().to_numpy(), starts, targets)


def load_left(paths: Sequence[Path]) -> Corpus:
    """All that units have left. A document can occur more than once, with different starts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return corpus_of(pa.concat_tables([pq.read_table(path) for path in paths]))


def map_units(
    context: Context,
    build: Callable[[Any, Path], dict[str, Any]],
    units: Mapping[str, Any],
    *,
    build_rest: Callable[[tuple[Path, ...], Path], dict[str, Any]],
) -> list[Shard]:
    """Build all units, and what they left as one more.

    Args:
        context: See `map_shards`.
        build: `build(unit, folder)` makes the rows of a unit with a `UnitWriter` and returns the writer's counts and
            others: `num_tokens_in`, `num_documents_in`, `num_tokens_trimmed`, `num_tokens_dropped_<reason>`, ...
        units: By name.
        build_rest: The same for what was left (for `load_left`). It counts nothing as coming in.
    """
    shards = list(map_shards(context, build, units, label="units", unit="units of work"))
    left = tuple(shard.folder / LEFT for shard in shards if shard.counts["num_tokens_left"])
    if left:
        shards += map_shards(context, build_rest, {REST: left}, label=REST, unit="last units")
    return shards


def sum_counts(shards: Sequence[Shard]) -> dict[str, int]:
    """The counts over all units: whole numbers only."""
    total: Counter[str] = Counter()
    for shard in shards:
        for name, value in shard.counts.items():
            if isinstance(value, int):
                total[name] += value
    return dict(total)


def finish_rows(
    output: Output,
    context: Context,
    shards: Sequence[Shard],
    *,
    name: str,
    seed: int,
    info: TokenizerInfo,
    row_tokens: int,
    num_rows: int | None,
    details: Mapping[str, Any],
) -> list[np.ndarray]:
    """Shuffle the rows of all units, keep the first `num_rows` (None: all), and write the Rows artifact.

    Returns for each unit which of its rows were kept, bool `[rows of the unit]`. Raises ValueError if there is no row.
    """
    import numpy as np

    started = time.monotonic()
    counts = sum_counts(shards)
    ends = np.cumsum([0, *(shard.counts["num_rows"] for shard in shards)])
    if not ends[-1] and counts.get("num_tokens_dropped_partial_row"):
        raise ValueError('partial_row="drop" drops the only row: the tokens do not fill row_tokens once')
    if not ends[-1]:
        raise ValueError(f"{name} has no tokens to lay into rows: every document of slot tokens is empty")
    order = seeded_rng(seed, name, "rows").permutation(int(ends[-1]))[:num_rows]
    written = _write_shuffled(output, context, [shard.folder for shard in shards], order, ends, row_tokens)
    left_over = counts.pop("num_tokens_left")
    in_rest = sum(shard.counts["num_tokens_left"] for shard in shards if shard.name == REST)
    if in_rest:
        raise RuntimeError(f"the last unit left {in_rest} of {left_over} tokens, which nobody packs")
    kept, padding = written["num_tokens_kept"], written["num_tokens_padding"]
    counts["num_tokens_dropped_over_limit"] = counts["num_tokens_kept"] - kept
    counts |= {
        "num_rows": len(order),
        "num_tokens_kept": kept,
        "num_tokens_padding": padding,
        "num_tokens_inserted": len(order) * row_tokens - kept - padding,
    }
    check_counts(counts)
    artifact = Artifact(kind="rows", tokenizer=info, row_tokens=row_tokens, counts=counts, details=dict(details))
    write_artifact(output.data, artifact)
    context.log({name: float(value) for name, value in counts.items()})
    seconds = time.monotonic() - started
    observed = {"shuffle_seconds": seconds, "tokens_per_second": len(order) * row_tokens / max(seconds, 1e-9)}
    (output.observed / "throughput.json").write_text(json.dumps(observed, indent=1) + "\n", encoding="utf-8")
    taken = np.zeros(int(ends[-1]), np.bool_)
    taken[order] = True
    return [taken[begin:end] for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]


def _write_shuffled(
    output: Output,
    context: Context,
    folders: Sequence[Path],
    order: np.ndarray,
    ends: np.ndarray,
    row_tokens: int,
) -> dict[str, int]:
    shard_rows = min(SHARD_ROWS, max(1, SHARD_TOKENS // row_tokens))
    items = {
        f"rows-{number:05d}": (number, order[begin : begin + shard_rows])
        for number, begin in enumerate(range(0, len(order), shard_rows))
    }
    write = partial(_write_picked, tuple(folders), ends, row_tokens)
    totals: Counter[str] = Counter()
    for shard in map_shards(context, write, items, label="shuffled", unit="shards of rows"):
        shard.link_into(output.data)
        totals.update(shard.counts)
    return {name: totals[name] for name in ("num_tokens_kept", "num_tokens_padding")}


def _write_picked(
    folders: tuple[Path, ...], ends: np.ndarray, row_tokens: int, item: tuple[int, np.ndarray], folder: Path
) -> dict[str, int]:
    """Write one output shard: rows by their number over all units, in the order given."""
    number, wanted = item
    rows, num_padding = pick_rows(folders, ends, wanted, row_tokens)
    write_shard(folder, "rows", number, rows)
    segments: Any = rows.column("segments").combine_chunks()
    num_kept = int(segments.flatten().field("num_tokens").to_numpy().sum())
    return {"num_tokens_kept": num_kept, "num_tokens_padding": num_padding}
