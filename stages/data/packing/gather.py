"""The tokens of each coarse cluster, in the order in which the neighbours artifact numbers its documents.

The Tokens table is in corpus order, a cluster's documents lie anywhere in it, and reading 1e8 documents one by one is
impossible. So they are shuffled in two phases, like any large join: every Tokens shard is sorted by cluster into a file
of scratch (one read and one write of the corpus), then a cluster takes its part of each of these files, which are
mapped. Which cluster a document is in is found by a 64-bit hash of its id in a sorted table of 16 bytes a document; the
ids themselves are compared when a cluster is put together, so that no collision can mix documents up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import corpus_of
from ropewalk.stages.data.retrieval.pool import cluster_doc_ids, num_clusters
from ropewalk.stages.schema import TokenizerInfo, shard_paths
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from ropewalk.stages.context import Context


@dataclass(frozen=True)
class GatheredTokens:
    """The sorted files, one a Tokens shard."""

    folders: tuple[Path, ...]

    def corpus(self, cluster: int, doc_ids: Sequence[str]) -> Corpus:
        """The documents of a cluster by their numbers in it; one without tokens has length 0.

        Raises ValueError if a document is in the Tokens table twice, or two ids have one hash.
        """
        import numpy as np
        import pyarrow as pa

        table = pa.concat_tables([_part(folder, cluster) for folder in self.folders])
        numbers = table.column("number").to_numpy()
        order = np.argsort(numbers, kind="stable")
        found = corpus_of(table.take(pa.array(order)).drop_columns(["number"]))
        numbers = numbers[order]
        if (numbers[1:] == numbers[:-1]).any():
            twice = found.doc_ids[int(np.flatnonzero(numbers[1:] == numbers[:-1])[0])]
            raise ValueError(f"slot tokens holds document {twice!r} twice, or two ids have one hash: deduplicate by id")
        for number, doc_id in zip(numbers.tolist(), found.doc_ids, strict=True):
            if doc_ids[number] != doc_id:
                raise ValueError(f"documents {doc_id!r} and {doc_ids[number]!r} have one hash: rename one of them")
        lengths = np.zeros(len(doc_ids), np.int64)
        lengths[numbers] = found.lengths
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Corpus(doc_ids, offsets, found.ids, np.zeros(len(doc_ids), np.int64), found.targets)


def gather_tokens(
    context: Context, tokens: Path, neighbours: Path, info: TokenizerInfo, *, slot: str = "neighbours"
) -> GatheredTokens:
    """Sort a Tokens artifact by the clusters of a neighbours artifact, in scratch.

    Documents of the neighbours that have no tokens are allowed; a document with tokens that the neighbours lack is a
    ValueError that names `slot`, where they come from, because nothing would ever retrieve it.
    """
    table = context.work / "places"
    if not (table / "numbers.npy").exists():
        _write_places(table, neighbours)
    sort = partial(_sort_shard, table, info.vocab_size, slot)
    shards = {path.name: path for path in shard_paths(tokens, "tokens")}
    found = list(map_shards(context, sort, shards, label="gathered", unit="token shards"))
    return GatheredTokens(tuple(shard.folder for shard in found))


def hash_id(doc_id: str) -> int:
    """64 bits of a document id."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest(), "little")


def _hashes(doc_ids: Sequence[str]) -> np.ndarray:
    import numpy as np

    return np.fromiter((hash_id(doc_id) for doc_id in doc_ids), np.uint64, len(doc_ids))


def _write_places(folder: Path, neighbours: Path) -> None:
    """Three arrays in the order of the hashes: hash, cluster, number in the cluster."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    names = [cluster_doc_ids(neighbours, cluster) for cluster in range(num_clusters(neighbours))]
    hashes = np.concatenate([_hashes(ids) for ids in names])
    order = np.argsort(hashes, kind="stable")
    sizes = [len(ids) for ids in names]
    columns = {
        "hashes": hashes,
        "clusters": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        "numbers": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
    }
    for name, values in columns.items():  # `numbers` last: it says that all are there.
        temporary = folder / f".{name}.npy"
        np.save(temporary, values[order])
        temporary.rename(folder / f"{name}.npy")


def _sort_shard(places: Path, vocab_size: int, slot: str, path: Path, folder: Path) -> dict[str, int]:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    clusters, numbers = _look_up(places, table.column("doc_id").to_pylist(), slot)
    ids: Any = table.column("input_ids").combine_chunks().flatten().to_numpy()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"{path} holds token ids outside the vocabulary of {vocab_size}: encode it anew")
    order = np.argsort(clusters, kind="stable")
    columns = [name for name in ("doc_id", "input_ids", "loss_mask") if name in table.schema.names]
    sorted_rows = (
        table.select(columns).append_column("number", pa.array(numbers)).combine_chunks().take(pa.array(order))
    )
    bounds = np.searchsorted(clusters[order], np.arange(int(clusters.max(initial=-1)) + 2))
    with pa.ipc.new_file(str(folder / "sorted.arrow"), sorted_rows.schema) as writer:
        writer.write_table(sorted_rows.combine_chunks())
    np.save(folder / "bounds.npy", bounds)
    return {"num_documents": table.num_rows, "num_tokens": len(ids)}


def _look_up(places: Path, doc_ids: list[str], slot: str) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    hashes, clusters, numbers = (
        np.load(places / f"{name}.npy", mmap_mode="r") for name in ("hashes", "clusters", "numbers")
    )
    wanted = _hashes(doc_ids)
    found = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
    if len(missing := np.flatnonzero(hashes[found] != wanted)):
        raise ValueError(
            f"slot {slot} lacks {doc_ids[int(missing[0])]!r} and {len(missing) - 1} more documents of a shard of slot "
            "tokens: make both from the same documents"
        )
    return np.asarray(clusters[found]), np.asarray(numbers[found])


def _part(folder: Path, cluster: int) -> pa.Table:
    """The documents of a cluster in one sorted file."""
    import numpy as np
    import pyarrow as pa

    bounds = np.load(folder / "bounds.npy")
    begin, end = (int(bounds[min(place, len(bounds) - 1)]) for place in (cluster, cluster + 1))
    with pa.memory_map(str(folder / "sorted.arrow")) as source, pa.ipc.open_file(source) as reader:
        return reader.read_all().slice(begin, end - begin).combine_chunks()
