"""Removes near-duplicates: documents whose sets of n-grams have a high Jaccard similarity.

Reads   `documents`: Documents.
Writes  Documents, and `duplicates-*.parquet`: `doc_id`, `source`, `kept_doc_id` and `similarity`, one row a document
        that was dropped.
Loses   near-duplicates (`num_dropped_near_duplicate`).

MinHash signatures (Broder, 1997) from datasketch, and locality-sensitive hashing by bands (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3) whose number and size datasketch chooses for the threshold. Signatures
lie in the work folder, not in a dictionary: bands are sorted range by range, the pairs found there are verified by the
signatures' estimate, and of each connected component one document is kept. So two documents of a component may be less
similar than the threshold; `similarity` says how much a document has in common with the one that was kept for it.

Estimates of P permutations have a standard error of sqrt(s (1 - s) / P): 0.035 at s = 0.8 and P = 128. The odds that a
pair is found at all are in `details`. A document of fewer words than an n-gram has all its words as its only n-gram
(`num_short`); one without words is kept and compared with nothing (`num_without_units`).

Retrieval and packing need this: SPLiCe would otherwise fill a row with copies of one document.

Memory: one shard a worker, about 200 MB for a range of a band; 8 bytes a document (32 with keep="longest") in the
driver. Work folder: 4 P + 12 b + 12 bytes a document, and its id: 800 bytes with the defaults, 80 GB for 1e8 documents.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checks import check_documents
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.cleaning.candidates import PairFinder, band_parts
from ropewalk.stages.data.cleaning.shard_tables import add_counts, check_sum, numbered_shards, read_shard
from ropewalk.stages.data.cleaning.signatures import ShardSigner, Shingles, SignatureStore
from ropewalk.stages.data.cleaning.words import Unit
from ropewalk.stages.schema import Artifact, Record, documents_schema, write_artifact, write_shard
from ropewalk.stages.shards import Shard, map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "deduplicate"
VERSION = 1
check = check_documents


class DeduplicateConfig(Record):
    """When two documents are duplicates, and which one stays."""

    unit: Unit = "word"
    """What n-grams are made of. character: for scripts without spaces."""
    ngram: int = Field(default=5, ge=1, le=64)
    """Units of an n-gram."""
    num_permutations: int = Field(default=128, ge=4, le=4096)
    """Length of a signature."""
    threshold: float = Field(default=0.8, gt=0, lt=1)
    """Jaccard similarity, estimated by the signatures, from which documents are duplicates."""
    enable_verification: bool = True
    """Compare the signatures of candidates. Otherwise all that agree in a band are duplicates, which is quicker and
    takes pairs well below the threshold too."""
    false_negative_weight: float = Field(default=0.95, ge=0.5, lt=1)
    """How much datasketch minds a pair that no band finds, against one that a band finds in vain, when it chooses the
    bands. High, because verification refuses the latter: at 0.8, 95 % of the pairs at the threshold are found, with
    equal weights of 0.5 only 40 %. Take 0.5 without verification."""
    keep: Literal["first", "longest"] = "first"
    """Which document of a component stays: the first in order, or the one of most bytes (of equal ones the first)."""
    seed: int = Field(default=1, ge=0, lt=2**32)
    """Of the permutations."""


def duplicates_schema() -> pa.Schema:
    """Arrow schema of the documents that were dropped."""
    import pyarrow as pa

    names = ("doc_id", "source", "kept_doc_id")
    strings = [pa.field(name, pa.string(), nullable=False) for name in names]
    return pa.schema([*strings, pa.field("similarity", pa.float64(), nullable=False)])


def choose_bands(config: DeduplicateConfig) -> tuple[int, int]:
    """Number of bands and permutations of each, as datasketch finds best for the threshold.

    Raises ValueError if the signature is too short for the threshold.
    """
    from datasketch import MinHashLSH

    try:
        weight = config.false_negative_weight
        index = MinHashLSH(config.threshold, config.num_permutations, weights=(1 - weight, weight))
    except ValueError as error:
        raise ValueError(
            f"num_permutations {config.num_permutations} cannot be cut into bands for threshold {config.threshold} "
            f"({error}): raise num_permutations or lower threshold"
        ) from None
    return index.b, index.r


def found_fraction(similarity: float, num_bands: int, band_size: int) -> float:
    """Odds that two documents of this similarity agree in a band."""
    return 1 - (1 - similarity**band_size) ** num_bands


def choose_kept(num_documents: int, pairs: Sequence[Path], sizes: np.ndarray | None) -> np.ndarray:
    """[num_documents] int64: the number of the document that stays for each one.

    Args:
        num_documents: How many were compared.
        pairs: Files of duplicate pairs.
        sizes: The documents' bytes, where the longest stays; None where the first does.
    """
    import numpy as np

    from ropewalk.stages.data.compiled.components import flatten, largest_members, unite

    roots = np.arange(num_documents)
    for path in pairs:
        unite(roots, np.load(path))
    flatten(roots)
    return roots if sizes is None else largest_members(roots, sizes)


@dataclass
class ShardFilter:
    """Writes what stays of a shard, and what is dropped."""

    store: SignatureStore
    kept: Path
    """`choose_kept`, as a file."""

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, Any]:
        """Returns `num_in`, `num_kept`, `num_kept_bytes`, drops, and `dropped_by_source`."""
        import numpy as np
        import pyarrow as pa

        number, path = shard
        table = read_shard(path)
        kept = np.load(self.kept, mmap_mode="r")[self.store.starts[number] : self.store.starts[number + 1]]
        numbers = np.arange(len(kept)) + self.store.starts[number]
        gone = kept != numbers
        stays = np.ones(table.num_rows, bool)
        rows = self.store.array(number, "rows")[gone]
        stays[rows] = False
        remaining = table.filter(pa.array(stays)).cast(documents_schema())
        dropped = table.select(["doc_id", "source"]).take(rows)
        pairs = np.stack([numbers[gone], kept[gone]], axis=1)
        columns = [*dropped.columns, pa.array(self.store.names(pairs[:, 1]), pa.string())]
        columns.append(pa.array(self.store.similarities(pairs), pa.float64()))
        write_shard(folder, "documents", number, remaining)
        write_shard(folder, "duplicates", number, pa.Table.from_arrays(columns, schema=duplicates_schema()))
        sources, times = np.unique(
            dropped.column("source").to_numpy(zero_copy_only=False).astype(str), return_counts=True
        )
        return {
            "num_in": table.num_rows,
            "num_kept": remaining.num_rows,
            "num_kept_bytes": int(remaining.column("num_bytes").to_numpy().sum()),
            "num_dropped_near_duplicate": len(rows),
            "dropped_by_source": dict(zip(sources.tolist(), times.tolist(), strict=True)),
        }


def _sign(
    config: DeduplicateConfig, bands: tuple[int, int], paths: Mapping[str, tuple[int, Path]], context: Context
) -> tuple[SignatureStore, dict[str, int]]:
    signer = partial(ShardSigner, Shingles(config.unit, config.ngram), config.num_permutations, config.seed, *bands)
    items = {name: path for name, (_, path) in paths.items()}
    shards = list(map_shards(context, signer, items, label="signatures"))
    store = SignatureStore([shard.folder for shard in shards], [shard.counts["num_compared"] for shard in shards])
    return store, add_counts(shard.counts for shard in shards)


def _find_pairs(config: DeduplicateConfig, num_bands: int, store: SignatureStore, context: Context) -> list[Shard]:
    finder = PairFinder(store, config.threshold if config.enable_verification else None)
    parts = band_parts(num_bands, int(store.starts[-1]))
    items = {f"band-{part.band}-{part.part}": part for part in parts}
    return list(map_shards(context, finder, items, label="pairs", unit="bands"))


def _write_kept(config: DeduplicateConfig, store: SignatureStore, pairs: list[Shard], work: Path) -> Path:
    import numpy as np

    sizes = None
    if config.keep == "longest":
        sizes = np.concatenate([store.array(shard, "sizes") for shard in range(len(store.folders))])
    kept = choose_kept(int(store.starts[-1]), [shard.folder / "pairs.npy" for shard in pairs], sizes)
    temporary = work / f"kept-{uuid.uuid4().hex}.npy"
    np.save(temporary, kept)
    return temporary.replace(work / "kept.npy")


def run(config: DeduplicateConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Drop the near-duplicates of slot `documents`. Raises ValueError on bad input."""
    started = time.perf_counter()
    paths = numbered_shards(inputs["documents"], "documents")
    bands = choose_bands(config)
    store, signed = _sign(config, bands, paths, context)
    signed_seconds = time.perf_counter() - started
    pairs = _find_pairs(config, bands[0], store, context)
    kept = _write_kept(config, store, pairs, context.work)
    paired_seconds = time.perf_counter() - started
    by_shard, by_source = [], []
    for shard in map_shards(context, partial(ShardFilter, store, kept), paths, label="kept"):
        shard.link_into(output.data)
        by_source.append(shard.counts.pop("dropped_by_source"))
        by_shard.append(shard.counts)
    found = add_counts(shard.counts for shard in pairs)
    counts = {**add_counts(by_shard), **{f"num_{what}": signed[f"num_{what}"] for what in ("short", "without_units")}}
    check_sum(NAME, counts)
    counts |= {"num_candidates_compared": found["num_candidates"], "num_not_compared": found["num_not_compared"]}
    write_artifact(
        output.data,
        Artifact(kind="documents", counts=counts, details=_details(config, bands, add_counts(by_source))),
    )
    seconds = time.perf_counter() - started
    measured = {
        "sign_seconds": signed_seconds,
        "pair_seconds": paired_seconds - signed_seconds,
        "seconds": seconds,
        "documents_per_second": counts["num_in"] / seconds,
    }
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(counts)


def _details(config: DeduplicateConfig, bands: tuple[int, int], by_source: Mapping[str, int]) -> dict[str, Any]:
    around = sorted({round(config.threshold + step, 6) for step in (-0.2, -0.1, 0.0, 0.1)})
    return {
        "num_bands": bands[0],
        "band_size": bands[1],
        "dropped_by_source": dict(sorted(by_source.items())),
        "found_fraction_by_similarity": {
            f"{similarity:g}": round(found_fraction(similarity, *bands), 6)
            for similarity in around
            if 0 < similarity <= 1
        },
    }
