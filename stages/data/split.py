"""Takes the training or the held-out part of a Tokens artifact.

Reads `tokens`, writes Tokens. A document's side depends on its id, the seed and its length alone, so the two subsets of
one config are disjoint, together they are everything, and documents that join the corpus move no other. Only documents
of at least `min_heldout_tokens` can be held out, because evaluation at a length needs documents of that length; so the
held-out share is `heldout_fraction` of these, and the held-out lengths are not those of the corpus.

The tokenizer's description is carried over, its folder is not. Lost: the documents of the other subset.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

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

NAME = "split"
VERSION = 1
check = check_tokens


class SplitConfig(Record):
    """Which documents to take. The two subsets belong together only if all other fields are equal."""

    subset: Literal["train", "heldout"]
    heldout_fraction: float = Field(gt=0, lt=1)
    """Share of the long enough documents that is held out."""
    min_heldout_tokens: int = Field(default=1, ge=1)
    """Shorter documents all belong to train, in tokens."""
    seed: int = 0


def is_heldout(config: SplitConfig, doc_id: str, num_tokens: int) -> bool:
    """Whether a document belongs to the held-out subset."""
    if num_tokens < config.min_heldout_tokens:
        return False
    return int(stable_id("split", config.seed, doc_id), 16) < config.heldout_fraction * 2**64


def run(config: SplitConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the documents of one subset, shard by shard. Raises ValueError if it is empty."""
    import pyarrow.parquet as pq

    tokenizer = read_artifact(inputs["tokens"], "tokens").tokenizer
    paths = shard_paths(inputs["tokens"], "tokens")
    totals = {"num_in": 0, "num_kept": 0, "num_other_subset": 0, "num_tokens_in": 0, "num_tokens": 0}
    for number, path in enumerate(paths):
        table = pq.read_table(path)
        lengths = list_lengths(table.column("input_ids"))
        ids = table.column("doc_id").to_pylist()
        wanted = [
            is_heldout(config, doc_id, length) == (config.subset == "heldout")
            for doc_id, length in zip(ids, lengths, strict=True)
        ]
        write_shard(output.data, "tokens", number, table.filter(wanted))
        totals["num_in"] += len(ids)
        totals["num_kept"] += sum(wanted)
        totals["num_other_subset"] += len(ids) - sum(wanted)
        totals["num_tokens_in"] += sum(lengths)
        totals["num_tokens"] += sum(length for length, keep in zip(lengths, wanted, strict=True) if keep)
        context.progress(number + 1, len(paths), "shards")
    if not totals["num_kept"]:
        raise ValueError(
            f"the {config.subset} subset is empty: heldout_fraction {config.heldout_fraction} and min_heldout_tokens "
            f"{config.min_heldout_tokens} leave it none of {totals['num_in']} documents"
        )
    write_artifact(output.data, Artifact(kind="tokens", tokenizer=tokenizer, counts=totals))
    context.log(totals)
