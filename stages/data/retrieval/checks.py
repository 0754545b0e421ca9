"""Are Vectors and neighbours what their `artifact.json` says? Run on a stage's output before it is committed.

Each function takes the stage's config and the output folder, and raises ValueError naming the file and the field at
fault. Cost: one read of the output, one row group at a time for Vectors, one cluster at a time for neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ropewalk.stages.data.retrieval.graph import bags_schema, listed_vectors_schema, neighbours_schema
from ropewalk.stages.data.retrieval.pool import read_lists, vector_column
from ropewalk.stages.schema import iterate_table, read_artifact, shard_paths, vectors_schema


def check_vectors(config: Any, output: Path) -> None:
    """Schema, counts, and that vectors are finite and of length 1 or zero."""
    import numpy as np
    import pyarrow as pa

    artifact = read_artifact(output, "vectors")
    schema = vectors_schema(artifact.details["num_dimensions"])
    for path in shard_paths(output, "vectors"):
        _check_schema(path, schema)
    found = {"num_kept": 0, "num_zero_vectors": 0}
    for batch in iterate_table(output, "vectors", ["vector"]):
        vectors = vector_column(pa.chunked_array([batch.column("vector")])).astype(np.float32)
        norms = np.sqrt((vectors**2).sum(axis=1))
        if not (np.isfinite(norms) & ((norms == 0) | (abs(norms - 1) < 0.01))).all():
            raise ValueError(f"{output}: a vector of vectors-*.parquet is not of length 1 or zero")
        found["num_kept"] += len(norms)
        found["num_zero_vectors"] += int((norms == 0).sum())
    _check_counts(output, artifact.counts, found)


def check_neighbours(config: Any, output: Path) -> None:
    """Schema and counts; that the largest cluster comes first; of each list: range, order, and no self."""
    artifact = read_artifact(output, "neighbours")
    retriever = artifact.details["retriever"]
    schemas = {"neighbours": neighbours_schema()}
    if retriever == "bm25":
        schemas["bags"] = bags_schema()
    if retriever == "dense":
        schemas["vectors"] = listed_vectors_schema(artifact.details["num_dimensions"])
    sizes = {
        name: [_check_schema(path, schema) for path in shard_paths(output, name)] for name, schema in schemas.items()
    }
    documents = sizes["neighbours"]
    if len(documents) != artifact.details["num_clusters"] or documents != sorted(documents, reverse=True):
        raise ValueError(f"{output}: clusters are missing or not in the order of their sizes, {documents[:5]}, ...")
    for name, found in sizes.items():
        if found != documents:
            raise ValueError(f"{output}: {name}-*.parquet do not have the rows of neighbours-*.parquet")
    width = artifact.details["num_neighbours"]
    num_edges = sum(
        _check_cluster(output, cluster, width, by_score=retriever != "tree") for cluster in range(len(documents))
    )
    _check_counts(output, artifact.counts, {"num_kept": sum(documents), "num_edges": num_edges})


def _check_cluster(output: Path, cluster: int, width: int, *, by_score: bool) -> int:
    """Returns the number of edges."""
    import numpy as np

    doc_ids, neighbours, scores = read_lists(output, cluster, width)
    path = shard_paths(output, "neighbours")[cluster]
    given = neighbours >= 0
    if (neighbours >= len(doc_ids)).any():
        raise ValueError(f"{path}: neighbours holds a number outside its {len(doc_ids)} documents")
    if (neighbours == np.arange(len(doc_ids))[:, None]).any():
        raise ValueError(f"{path}: neighbours holds the document itself")
    rising = given[:, 1:] & (scores[:, 1:] > scores[:, :-1])
    if not np.isfinite(scores).all() or (by_score and rising.any()):
        raise ValueError(f"{path}: scores are not finite, best first")
    return int(given.sum())


def _check_schema(path: Path, schema: Any) -> int:
    """Returns the number of rows."""
    import pyarrow.parquet as pq

    footer = pq.read_metadata(path)
    found = footer.schema.to_arrow_schema()
    if found.names != schema.names or found.types != schema.types:
        raise ValueError(f"{path}: its columns are {dict(zip(found.names, found.types, strict=True))}, not {schema}")
    return footer.num_rows


def _check_counts(output: Path, counts: dict[str, int], found: dict[str, int]) -> None:
    for name, value in found.items():
        if counts.get(name) != value:
            raise ValueError(f"{output / 'artifact.json'}: counts.{name} is {counts.get(name)}, but there are {value}")
