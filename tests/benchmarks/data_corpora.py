"""Corpora for the benchmarks of the data stages: the standard library's sources, and synthetic tokens of any size."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from ropewalk.stages.data.vocabulary import train_tokenizer
from ropewalk.stages.schema import (
    Artifact,
    TokenizerInfo,
    documents_schema,
    tokens_schema,
    write_artifact,
    write_shard,
)

VOCABULARY = 32_000
SHARD_BYTES = 2**22
INFO = TokenizerInfo(digest="0" * 64, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1)


@cache
def library_texts() -> tuple[str, ...]:
    """The sources of the standard library that are UTF-8, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError:
            continue
    return tuple(text for text in texts if text.strip())


def write_documents(folder: Path, copies: int = 1) -> int:
    """The library's sources as Documents, so many times over (each copy under other ids). Returns their bytes."""
    shard, filled, total, number = [], 0, 0, 0
    for doc_id, text in _copies(copies):
        size = len(text.encode())
        shard.append({"doc_id": doc_id, "text": text, "source": "library", "num_bytes": size, "metadata": "{}"})
        filled, total = filled + size, total + size
        if filled >= SHARD_BYTES:
            write_shard(folder, "documents", number, pa.Table.from_pylist(shard, schema=documents_schema()))
            shard, filled, number = [], 0, number + 1
    if shard:
        write_shard(folder, "documents", number, pa.Table.from_pylist(shard, schema=documents_schema()))
    counts = {"num_kept": copies * len(library_texts()), "num_kept_bytes": total}
    write_artifact(folder, Artifact(kind="documents", counts=counts))
    return total


def _copies(copies: int) -> Iterator[tuple[str, str]]:
    for copy in range(copies):
        for number, text in enumerate(library_texts()):
            yield f"library/{copy}/{number}", text


def write_tokens(folder: Path, num_documents: int, mean_tokens: int = 900, shard_documents: int = 2000) -> int:
    """Synthetic Tokens: log-normal lengths, random ids. Returns the number of tokens."""
    rng = np.random.default_rng(0)
    total = 0
    for shard, begin in enumerate(range(0, num_documents, shard_documents)):
        count = min(shard_documents, num_documents - begin)
        lengths = np.maximum(1, rng.lognormal(np.log(mean_tokens) - 0.5, 1.0, count)).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = rng.integers(2, VOCABULARY, offsets[-1], dtype=np.int32)
        columns = [
            pa.array([f"synthetic/{number:09d}" for number in range(begin, begin + count)], pa.string()),
            pa.array(["synthetic"] * count, pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        ]
        write_shard(folder, "tokens", shard, pa.Table.from_arrays(columns, schema=tokens_schema()))
        total += int(offsets[-1])
    write_artifact(folder, Artifact(kind="tokens", tokenizer=INFO, counts={"num_kept": num_documents}))
    return total


def write_clusters(folder: Path, num_documents: int, num_clusters: int) -> list[list[str]]:
    """A neighbours artifact over the documents of `write_tokens`, scattered over clusters; nobody is near anybody."""
    rng = np.random.default_rng(0)
    clusters = np.array_split(rng.permutation(num_documents), num_clusters)
    names = [[f"synthetic/{number:09d}" for number in cluster.tolist()] for cluster in clusters]
    folder.mkdir(parents=True)
    for number, doc_ids in enumerate(names):
        nothing = [pa.array([[]] * len(doc_ids), pa.list_(kind)) for kind in (pa.int32(), pa.float32())]
        table = pa.Table.from_arrays([pa.array(doc_ids), *nothing], names=["doc_id", "neighbours", "scores"])
        write_shard(folder, "neighbours", number, table)
    details = {"retriever": "tree", "num_neighbours": 1, "num_clusters": num_clusters}
    write_artifact(folder, Artifact(kind="neighbours", details=details))
    return names


def write_tokenizer(folder: Path, vocab_size: int = VOCABULARY) -> Path:
    """A tokenizer trained on the library's sources."""
    train_tokenizer(library_texts(), vocab_size, "<|bos|>", "<|eos|>").save_pretrained(str(folder))
    return folder
