"""Quest: rows of documents that answer to one keyword (Gao et al., ICLR 2025, arXiv 2405.19846).

Reads   slots `tokens` (Tokens) and `documents` (Documents, for the texts; those without tokens are ignored).
Writes  Rows (policy `causal`), shuffled by `seed`.
Loses   the last row if `partial_row="drop"`, rows beyond `num_rows`; both counted.

Each document has keywords by RAKE; those of too few or too many documents of the corpus go; one of the others, drawn at
random, becomes the document's key. Documents of one key form a group, an entry of an inverted index. The groups follow
each other in random order, the documents of each in random order, laid end to end and cut every `row_tokens`: so every
document is used once, rows are full, and a row holds as many groups as it takes (`details.roots_per_row`).

What this is not: the paper takes keywords of *queries* that a doc2query model predicts for each document, which needs a
model; here they come from the texts themselves. The paper drops a list of empty phrases ("best way"); here a phrase is
empty if more than `max_document_fraction` of the documents have it. The paper draws rare keys more often, so that their
documents repeat; here none does. The code was not found; published are the threshold, 3.0, and the steps.

Keys are compared by 64-bit hashes: two keys with one hash would share a group. The inverted index is built in three
passes over pairs of document and keyword, cut by shard and by hash; memory is that of one cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.bins import concatenate
from ropewalk.stages.data.packing.clusters import Job, build_unit, log_details, map_job, walk_details
from ropewalk.stages.data.packing.gather import GatheredTokens, gather_tokens
from ropewalk.stages.data.packing.rake import keywords
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import finish_rows, load_tokenizer_info
from ropewalk.stages.data.packing.walk import Walk
from ropewalk.stages.schema import Artifact, Record, read_artifact, seeded_rng, shard_paths, write_artifact, write_shard
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np

NAME = "quest"
VERSION = 1
check = check_rows

DOCUMENTS_PER_UNIT = 100_000


class QuestConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=2)
    """Length of each row, in tokens, the begin token included."""
    seed: int = 0
    """Draws each document's key, orders groups and documents, shuffles the finished rows."""
    min_score: float = Field(default=3.0, ge=0)
    """Keywords with a lower RAKE score are dropped; a phrase of n words that occur nowhere else has n squared."""
    max_words: int = Field(default=3, ge=1)
    """Longer phrases are hardly ever shared."""
    num_keywords: int = Field(default=32, ge=1)
    """Keywords of each document, those with the highest score."""
    min_documents: int = Field(default=2, ge=1)
    """A key of fewer documents brings nothing together."""
    max_document_fraction: float = Field(default=0.05, gt=0, le=1)
    """A keyword of a larger share of the documents says nothing; `min_documents` of them are always allowed."""
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all."""


def hash_text(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")


def _write_keywords(config: QuestConfig, num_cuts: int, path: Path, folder: Path) -> dict[str, int]:
    """Pass 1, a Documents shard: its pairs of keyword and document."""
    import numpy as np
    import pyarrow.parquet as pq

    hashes: list[int] = []
    numbers: list[int] = []
    texts = pq.read_table(path, columns=["text"]).column("text").to_pylist()
    for number, text in enumerate(texts):
        found = keywords(text, max_words=config.max_words, min_score=config.min_score, num_keywords=config.num_keywords)
        hashes += [hash_text(phrase) for phrase in found]
        numbers += [number] * len(found)
    pairs = np.asarray(hashes, np.uint64), np.asarray(numbers, np.int32)
    _save(folder, pairs[0] % np.uint64(num_cuts), num_cuts, hashes=pairs[0], numbers=pairs[1])
    return {"num_documents": len(texts)}


def _select_keywords(
    config: QuestConfig, num_documents: int, shards: tuple[Path, ...], cut: int, folder: Path
) -> dict[str, int]:
    """Pass 2, a cut of the keywords: the pairs of those with enough documents and not too many, by shard."""
    import numpy as np

    parts = [_load(shard, cut, "hashes", "numbers") for shard in shards]
    hashes = np.concatenate([part[0] for part in parts])
    numbers = np.concatenate([part[1] for part in parts])
    shard_numbers = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    _, places, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    most = max(config.min_documents, int(config.max_document_fraction * num_documents))
    kept = ((counts >= config.min_documents) & (counts <= most))[places]
    _save(folder, shard_numbers[kept], len(parts), hashes=hashes[kept], numbers=numbers[kept])
    return {"num_keys": int(((counts >= config.min_documents) & (counts <= most)).sum())}


def _choose_keys(
    config: QuestConfig, num_cuts: int, cuts: tuple[Path, ...], item: tuple[int, Path], folder: Path
) -> dict[str, int]:
    """Pass 3, a Documents shard again: each document's key, by the unit that packs it."""
    import numpy as np
    import pyarrow.parquet as pq

    shard, path = item
    doc_ids = pq.read_table(path, columns=["doc_id"]).column("doc_id").to_pylist()
    parts = [_load(cut, shard, "hashes", "numbers") for cut in cuts]
    hashes = np.concatenate([part[0] for part in parts])
    numbers = np.concatenate([part[1] for part in parts])
    order = np.lexsort((hashes, numbers))
    bounds = np.searchsorted(numbers[order], np.arange(len(doc_ids) + 1))
    choices = np.asarray([hash_text(f"{config.seed}\x1f{doc_id}") for doc_id in doc_ids], np.uint64)
    counts = np.diff(bounds)
    keys = choices.copy()  # Without a keyword a document is a group of its own.
    with_key = np.flatnonzero(counts)
    picked = bounds[with_key] + (choices[with_key] % counts[with_key].astype(np.uint64)).astype(np.int64)
    keys[with_key] = hashes[order][picked]
    units = keys % np.uint64(num_cuts)
    by_unit = np.argsort(units, kind="stable")
    names = np.asarray(doc_ids, dtype=object)[by_unit]
    _save(folder, units[by_unit], num_cuts, keys=keys[by_unit], has_key=(counts > 0)[by_unit])
    write_shard(folder, "names", 0, _name_table(names.tolist()))
    return {"num_documents_without_key": len(doc_ids) - len(with_key)}


def _name_table(names: Sequence[str]) -> Any:
    import pyarrow as pa

    return pa.table({"doc_id": pa.array(names, pa.string())})


def _save(folder: Path, cuts: np.ndarray, num_cuts: int, **columns: np.ndarray) -> None:
    """Sort arrays by cut and write them, and where each cut begins."""
    import numpy as np

    order = np.argsort(cuts, kind="stable")
    np.save(folder / "bounds.npy", np.searchsorted(cuts[order], np.arange(num_cuts + 1).astype(cuts.dtype)))
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values[order])


def _load(folder: Path, cut: int, *names: str) -> list[np.ndarray]:
    """What lies in a cut."""
    import numpy as np

    begin, end = np.load(folder / "bounds.npy")[cut : cut + 2].tolist()
    return [np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[begin:end]) for name in names]


def order_groups(keys: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All documents, group after group, groups and the documents of each in random order. `keys`: uint64 `[n]`."""
    import numpy as np

    _, groups = np.unique(keys, return_inverse=True)
    places = rng.permutation(int(groups.max(initial=-1)) + 1)
    return np.lexsort((rng.permutation(len(keys)), places[groups]))


def _write_groups(config: QuestConfig, shards: tuple[Path, ...], unit: int, folder: Path) -> dict[str, int]:
    """The documents of a unit in the order in which they are packed, in the layout of a neighbours artifact."""
    import numpy as np
    import pyarrow.parquet as pq

    names: list[str] = []
    keys: list[np.ndarray] = []
    has_key: list[np.ndarray] = []
    for shard in shards:
        begin, end = np.load(shard / "bounds.npy")[unit : unit + 2].tolist()
        table = pq.read_table(shard / "names-00000.parquet")
        names += table.column("doc_id").slice(begin, end - begin).to_pylist()
        for found, column in zip(_load(shard, unit, "keys", "has_key"), (keys, has_key), strict=True):
            column.append(found)
    all_keys, shared = np.concatenate(keys), np.concatenate(has_key)
    order = order_groups(all_keys, seeded_rng(config.seed, NAME, unit))
    write_shard(folder, "neighbours", unit, _name_table([names[place] for place in order.tolist()]))
    np.save(folder / f"keys-{unit:05d}.npy", all_keys[order])
    return {"num_groups": len(np.unique(all_keys[shared]))}


def group_documents(config: QuestConfig, documents: Path, context: Context) -> tuple[Path, dict[str, int]]:
    """Give each document its key, and write the documents of each unit in order to a folder of scratch.

    Returns the folder and counts: `num_keys` that could be drawn, `num_groups`, `num_documents_without_key`.
    """
    import pyarrow.parquet as pq

    read_artifact(documents, "documents")
    paths = {path.name: path for path in shard_paths(documents, "documents")}
    num_documents = sum(pq.read_metadata(path).num_rows for path in paths.values())
    num_units = -(-max(1, num_documents) // DOCUMENTS_PER_UNIT)
    units = {f"{unit:05d}": unit for unit in range(num_units)}
    first = map_shards(context, partial(_write_keywords, config, num_units), paths, label="keywords")
    by_shard = tuple(shard.folder for shard in first)
    select = partial(_select_keywords, config, num_documents, by_shard)
    second = list(map_shards(context, select, units, label="keys", unit="cuts of the keywords"))
    cuts = tuple(shard.folder for shard in second)
    numbered = {name: (number, path) for number, (name, path) in enumerate(paths.items())}
    third = list(map_shards(context, partial(_choose_keys, config, num_units, cuts), numbered, label="chosen"))
    write = partial(_write_groups, config, tuple(shard.folder for shard in third))
    folder = context.work / "grouped"
    folder.mkdir(exist_ok=True)
    num_groups = 0
    for shard in map_shards(context, write, units, label="groups", unit="groups of keys"):
        num_groups += shard.counts["num_groups"]
        for path in shard.folder.iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).hardlink_to(path)
    write_artifact(folder, Artifact(kind="neighbours"))
    return folder, {
        "num_keys": sum(shard.counts["num_keys"] for shard in second),
        "num_groups": num_groups,
        "num_documents_without_key": sum(shard.counts["num_documents_without_key"] for shard in third),
    }


def make_walk(config: QuestConfig, keys: np.ndarray, corpus: Corpus, pool: None, unit: int) -> Walk:
    """Plan the rows of a unit, whose documents are in order. `keys`: uint64 `[n]`."""
    import numpy as np

    plan = concatenate(corpus.lengths, config.row_tokens - 1, np.arange(len(corpus.lengths)))
    placed = keys[corpus.lengths > 0]
    return Walk(plan, counts={"num_roots": int(len(placed) > 0) + int((placed[1:] != placed[:-1]).sum())})


def _build_unit(job: Job, groups: Path, gathered: GatheredTokens, unit: int, folder: Path) -> dict[str, Any]:
    import numpy as np

    from ropewalk.stages.data.retrieval.pool import cluster_doc_ids

    keys = np.load(groups / f"keys-{unit:05d}.npy")
    corpus = gathered.corpus(unit, cluster_doc_ids(groups, unit))
    made = Job(job.name, job.config, job.info, lambda config, *rest: make_walk(config, keys, *rest), job.is_only)
    return build_unit(made, corpus, None, unit, folder)


def run(config: QuestConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Group the documents of slot `tokens` by keywords of their texts in slot `documents`, and lay them into rows."""
    info = load_tokenizer_info(inputs["tokens"])
    groups, counts = group_documents(config, inputs["documents"], context)
    num_units = len(shard_paths(groups, "neighbours"))
    gathered = gather_tokens(context, inputs["tokens"], groups, info, slot="documents")
    job = Job(NAME, config, info, make_walk, num_units == 1)
    shards = map_job(context, job, partial(_build_unit, job, groups, gathered), range(num_units))
    details = {**counts, **walk_details(shards)}
    log_details(context, details)
    finish_rows(
        output,
        context,
        shards,
        name=NAME,
        seed=config.seed,
        info=info,
        row_tokens=config.row_tokens,
        num_rows=config.num_rows,
        details=details,
    )
