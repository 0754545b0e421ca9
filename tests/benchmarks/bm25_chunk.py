"""BM25Chunk beside SPLiCe: documents a second, how alike neighbours in a row are, and which tokens are lost.

BM25Chunk (Zhao et al., 2024, arXiv 2402.13991; the code is yuzhaouoe/pretraining-data-packing, whose rules are
restated in shared/specs/data.md 1.5) packs a stream: of a buffer of 2,048 fragments, the one is placed next that BM25
finds nearest to the last one placed; where it finds none, the one with the lowest id. What a chunk's end cuts off goes
back to the end of the buffer if it has two tokens or more; a chunk that the buffer cannot fill is dropped, and the
worst of the left-overs with it, so its mean is over fewer pairs. A fragment is asked with and found by the terms of its
whole document, as in our SPLiCe. The code indexes a file at a time; here the corpus is one file.

This is our own baseline of that method in numpy and scipy on the weights of bm25s, not its authors' program, so its
speed says what the method costs in such hands. SPLiCe is the neighbours stage with retriever `bm25` (documents read,
lists of 32, the artifact written and read) and the walk over it. Both use the same terms, k1 and b; both end with a
plan of rows. Four bytes are taken for a token. The judge is neither's score: cosine of tf-idf vectors, over all
documents that follow each other in a row.

Corpora: the standard library's files, rows of 32,768 tokens (the buffer holds nearly all of them); synthetic short
documents, about 30 on each topic, in random order, rows of 8,192.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data_corpora
import numpy as np
import pyarrow as pa
from timings import progress, summary, timed_call

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data.packing.walk import adjacent_documents, splice_documents
from ropewalk.stages.data.retrieval import neighbours
from ropewalk.stages.data.retrieval.bags import K1, B, terms_of
from ropewalk.stages.data.retrieval.pool import open_pool
from ropewalk.stages.schema import Artifact, documents_schema, write_artifact, write_shard

if TYPE_CHECKING:
    from scipy.sparse import csr_array

BUFFER = 2048
MIN_FRAGMENT = 2
MIN_REMAINDER = 32
"""Tokens of a cut document that SPLiCe puts back, the stage's default."""
SHARD_DOCUMENTS = 4096
PER_TOPIC = 30
WORDS, TOPIC_WORDS, MEAN_WORDS = 20_000, 60, 120
TOPIC_FRACTION = 0.3

Pairs = tuple[np.ndarray, np.ndarray]
"""Documents that follow each other."""


@dataclass(frozen=True)
class Terms:
    """BM25 weights and term counts of documents."""

    weights: csr_array
    """`[documents, terms]`: what one occurrence in a query adds."""
    counts: csr_array
    """`[documents, terms]`."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Terms:
        """Indexed by bm25s."""
        import bm25s
        from scipy.sparse import csc_array, csr_array

        vocabulary: dict[str, int] = {}
        corpus = [[vocabulary.setdefault(term, len(vocabulary)) for term in terms_of(text)] for text in texts]
        engine = bm25s.BM25(k1=K1, b=B, method="lucene")
        engine.index((corpus, vocabulary), create_empty_token=False, show_progress=False)
        shape = len(texts), len(vocabulary)
        scores = engine.scores
        weights = csc_array((scores["data"], scores["indices"], scores["indptr"]), shape=shape).tocsr()
        ends = np.concatenate([[0], np.cumsum([len(terms) for terms in corpus])])
        terms = np.fromiter((term for document in corpus for term in document), np.int32, int(ends[-1]))
        counts = csr_array((np.ones(len(terms), np.float32), terms, ends), shape=shape)
        counts.sum_duplicates()
        return cls(weights, counts)

    def scores(self, document: int, among: np.ndarray) -> np.ndarray:
        """float64: BM25 of the documents `among` for a document as the query."""
        query = np.zeros(self.counts.shape[1], np.float32)
        mine = slice(self.counts.indptr[document], self.counts.indptr[document + 1])
        query[self.counts.indices[mine]] = self.counts.data[mine]
        return self.weights[among] @ query


@dataclass
class Chunks:
    """What BM25Chunk made."""

    rows: list[list[int]] = field(default_factory=list)
    """The documents of each, in order."""
    num_lost: int = 0
    """Tokens in no row."""


def pack_chunks(lengths: np.ndarray, terms: Terms, capacity: int, buffer: int = BUFFER) -> Chunks:
    """Pack documents of so many tokens, in order."""
    chunks, stream = Chunks(), deque(enumerate(lengths.tolist()))
    waiting: dict[int, int] = {}  # Tokens left of each fragment, by document; a dictionary keeps their order.
    while True:
        while stream and len(waiting) < buffer:
            document, left = stream.popleft()
            waiting[document] = left
        row = _fill(waiting, terms, capacity)
        if row is None:
            chunks.num_lost += int(lengths.sum()) - len(chunks.rows) * capacity - sum(left for _, left in stream)
            return chunks
        chunks.rows.append(row)


def _fill(waiting: dict[int, int], terms: Terms, capacity: int) -> list[int] | None:
    """The documents of one chunk, taken from the buffer; None if it does not fill one, and is used up."""
    row: list[int] = []
    room = capacity
    while waiting:
        document = _nearest(row[-1], waiting, terms) if row else min(waiting)
        left = waiting.pop(document)
        row.append(document)
        if left - room >= MIN_FRAGMENT:
            waiting[document] = left - room
        room -= left
        if room <= 0:
            return row
    return None


def _nearest(document: int, waiting: dict[int, int], terms: Terms) -> int:
    among = np.fromiter(waiting, np.int64, len(waiting))
    scores = terms.scores(document, among)
    best = scores.max()
    return int(among[scores == best].min()) if best > 0 else int(among.min())


def measure(folder: Path, repetitions: int, num_documents: int) -> dict[str, Any]:
    """Both methods on both corpora, in turns."""
    library = tuple(dict.fromkeys(data_corpora.library_texts()))
    corpora = {
        "library": (library, 32_768),
        f"{num_documents} on topics": (topic_texts(num_documents), 8192),
    }
    _compare(folder / "small", library[:300], 8192)  # Compiles.
    times: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for number, (name, (texts, row_tokens)) in enumerate(corpora.items()):
        rounds = [_compare(folder / f"{number}-{each}", texts, row_tokens) for each in range(repetitions)]
        for method in ("BM25Chunk", "SPLiCe"):
            samples = [each[method][0] for each in rounds]
            times[f"{name}: {method}"] = spent = summary(samples)
            rate = round(len(texts) / spent["median"])
            found[f"{name}: {method}"] = {"documents_per_second": rate, **rounds[0][method][1]}
            progress(f"  {name}, {method}: {spent['median']:.1f} s")
        found[f"{name}: random order"] = rounds[0]["random order"][1]
    return {"times": times, "found": found}


def _compare(folder: Path, texts: Sequence[str], row_tokens: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The time and the figures of each method on a corpus."""
    folder.mkdir()
    lengths = np.asarray([max(1, len(text.encode()) // 4) for text in texts], np.int64)
    write_texts(folder / "documents", texts)
    made: dict[str, Any] = {}

    def chunk() -> None:
        made["terms"] = Terms.of(texts)
        made["chunks"] = pack_chunks(lengths, made["terms"], row_tokens)

    def splice() -> None:
        made["walk"], made["numbers"] = _splice(folder, lengths, row_tokens)

    spent = {"BM25Chunk": timed_call(chunk), "SPLiCe": timed_call(splice)}
    rows, numbers = made["chunks"].rows, made["numbers"]
    one, other, _ = adjacent_documents(made["walk"].plan, 0)
    order = np.random.default_rng(0).permutation(len(texts))
    pairs = {
        "BM25Chunk": _pairs(rows),
        "SPLiCe": (numbers[one], numbers[other]),
        "random order": (order[:-1], order[1:]),
    }
    lost = {"BM25Chunk": made["chunks"].num_lost, "SPLiCe": made["walk"].counts["num_tokens_trimmed"]}
    placed = {
        "BM25Chunk": {document for row in rows for document in row},
        "SPLiCe": set(made["walk"].plan.documents.tolist()),
    }
    vectors = _unit_vectors(made["terms"].counts)
    judged: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, each in pairs.items():
        row = _described(vectors, each)
        if name in lost:
            row["num_documents_in_no_row"] = len(texts) - len(placed[name])
            row["lost_token_fraction"] = round(lost[name] / int(lengths.sum()), 6)
        judged[name] = spent.get(name), row
    return judged


def _splice(folder: Path, lengths: np.ndarray, row_tokens: int) -> tuple[Any, np.ndarray]:
    """The walk, and the number in the corpus of each document of its pool."""
    output = Output(folder / "graph/data", folder / "graph/observed")
    for path in (output.data, output.observed, folder / "graph/work"):
        path.mkdir(parents=True)
    config = neighbours.NeighboursConfig(retriever="bm25")
    neighbours.run(config, {"documents": folder / "documents"}, output, LocalContext(folder / "graph/work"))
    pool = open_pool(output.data, 0)
    numbers = np.asarray([int(doc_id) for doc_id in pool.doc_ids])
    walk = splice_documents(
        lengths[numbers], pool, row_tokens, min_remainder_tokens=MIN_REMAINDER, key=("benchmark", 0)
    )
    return walk, numbers


def _pairs(rows: Sequence[Sequence[int]]) -> Pairs:
    found = np.asarray([pair for row in rows for pair in pairwise(row)], np.int64).reshape(-1, 2)
    found = found[found[:, 0] != found[:, 1]]
    return found[:, 0], found[:, 1]


def _unit_vectors(counts: csr_array) -> csr_array:
    """Tf-idf, of length 1."""
    from scipy.sparse import diags_array

    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    weighed = (counts @ diags_array(np.log(counts.shape[0] / np.maximum(1, frequency)))).tocsr()
    norms = np.sqrt(weighed.multiply(weighed).sum(axis=1))
    return (diags_array(1 / np.maximum(norms, 1e-12)) @ weighed).tocsr()


def _described(vectors: csr_array, pairs: Pairs) -> dict[str, Any]:
    cosines = np.asarray(vectors[pairs[0]].multiply(vectors[pairs[1]]).sum(axis=1))
    return {
        "mean_cosine": round(float(cosines.mean()), 4),
        "tenth_percentile": round(float(np.quantile(cosines, 0.1)), 4),
        "num_pairs": len(cosines),
    }


def topic_texts(num_documents: int) -> tuple[str, ...]:
    """Short documents in random order: words of a topic among words of all, both with frequencies by Zipf's law."""
    rng = np.random.default_rng(0)
    num_topics = max(1, num_documents // PER_TOPIC)
    words = np.asarray([f"w{number}x" for number in range(WORDS)], object)
    shares, own_shares = (1 / np.arange(1, size + 1) for size in (WORDS, TOPIC_WORDS))
    own = rng.integers(100, WORDS, size=(num_topics, TOPIC_WORDS))
    texts = []
    for topic in rng.integers(num_topics, size=num_documents).tolist():
        length = max(5, int(rng.lognormal(np.log(MEAN_WORDS) - 0.18, 0.6)))
        general = rng.choice(WORDS, size=length, p=shares / shares.sum())
        special = own[topic][rng.choice(TOPIC_WORDS, size=length, p=own_shares / own_shares.sum())]
        texts.append(" ".join(words[np.where(rng.random(length) < TOPIC_FRACTION, special, general)]))
    return tuple(texts)


def write_texts(folder: Path, texts: Sequence[str]) -> None:
    """A Documents artifact whose ids are numbers."""
    for shard, begin in enumerate(range(0, len(texts), SHARD_DOCUMENTS)):
        rows = [
            {
                "doc_id": f"{begin + place:08d}",
                "text": text,
                "source": "texts",
                "num_bytes": len(text.encode()),
                "metadata": "{}",
            }
            for place, text in enumerate(texts[begin : begin + SHARD_DOCUMENTS])
        ]
        write_shard(folder, "documents", shard, pa.Table.from_pylist(rows, schema=documents_schema()))
    write_artifact(folder, Artifact(kind="documents", counts={"num_kept": len(texts)}))
