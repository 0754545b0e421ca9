"""Small neighbours artifacts, and pools made by hand."""

import numpy as np

from ropewalk.stages.data.retrieval.dense import unit_vectors
from ropewalk.stages.data.retrieval.graph import listed_vectors_schema, write_lists
from ropewalk.stages.data.retrieval.pool import Pool
from ropewalk.stages.schema import Artifact, write_artifact, write_shard


def topical_vectors(num_documents, num_topics=4, seed=0, spread=0.3):
    """Vectors of 8 dimensions; document n is of topic n % num_topics."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(num_topics, 8))
    return centres[np.arange(num_documents) % num_topics] + spread * rng.normal(size=(num_documents, 8))


def write_neighbours(folder, clusters, num_neighbours=4):
    """A neighbours artifact (retriever `dense`) of clusters `[{doc_id: vector}, ...]`."""
    import pyarrow as pa

    for cluster, vectors in enumerate(clusters):
        doc_ids = list(vectors)
        unit = unit_vectors(np.asarray(list(vectors.values()), np.float16))
        pool = Pool.from_vectors(doc_ids, unit, num_neighbours)
        write_lists(folder, cluster, doc_ids, pool.neighbours, pool.scores)
        schema = listed_vectors_schema(unit.shape[1])
        values = pa.array(unit.astype(np.float16).reshape(-1))
        columns = [pa.array([0] * len(unit), pa.int32()), pa.FixedSizeListArray.from_arrays(values, unit.shape[1])]
        write_shard(folder, "vectors", cluster, pa.table(columns, schema=schema))
    details = {"retriever": "dense", "num_clusters": len(clusters), "num_neighbours": num_neighbours}
    write_artifact(folder, Artifact(kind="neighbours", details=details))
    return folder


class Similarities:
    """A masked query over a dictionary `{document: [nearest, next, ...]}`; all others are unrelated."""

    def __init__(self, order):
        self.order = order

    def __call__(self, document, k, unused):
        hits = [other for other in self.order.get(document, []) if unused[other]][:k]
        return np.asarray(hits, np.int64), np.asarray([1 / (2 + rank) for rank in range(len(hits))], np.float32)

    def similarity(self, one, other):
        return 1.0 if other in self.order.get(one, []) else 0.0


def pool_by_hand(doc_ids, order, num_neighbours):
    """A pool whose lists are the first of `order`, `{document: [nearest, next, ...]}`."""
    neighbours = np.full((len(doc_ids), num_neighbours), -1, np.int32)
    for document, others in order.items():
        neighbours[document, : len(others[:num_neighbours])] = others[:num_neighbours]
    scores = np.where(neighbours >= 0, np.float32(0.5), np.float32(0))
    return Pool(list(doc_ids), neighbours, scores, Similarities(order))
