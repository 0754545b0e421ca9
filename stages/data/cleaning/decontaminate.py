"""Removes documents that share n-grams of words with evaluation sets.

Reads   `documents` (Documents) or `tokens` (Tokens); any number of further slots, each an evaluation set (see
        `ropewalk.stages.data.cleaning.evaluation_ngrams`): benchmarks as Documents, the held-out Tokens of our own
        evaluation, or its Predictions; `tokenizer`, where any of them holds Tokens.
Writes  the same kind, and `contaminated-*.parquet`: `doc_id`, `slot`, `sample_id`, `num_ngrams` that document and
        sample share, one of these in plain words, and whether the document was `removed` or is within the limits.
Loses   documents that are an evaluation sample themselves (`num_dropped_evaluation_document`, by id) and contaminated
        ones (`num_dropped_contaminated`); with remove="passage" the contaminated passages.

Our own prompts are windows of held-out documents, so the train subset of `split` cleaned of its heldout subset shares
no 13 words with a prompt, before any model exists; n-grams across a planted fact are random words and not looked for.

An n-gram is 13 words in normal form, as in GPT-3 (Brown et al., 2020, arXiv 2005.14165, appendix C), whose rules
remove="passage" follows: 200 characters go on either side, and pieces below 200 characters go too. datatrove compares
12-grams and tells the same facts of each hit. Hashes of 64 bits are compared, not texts; the module `words` states the
odds of a false match.

Memory: one shard a worker, and a map of the evaluation sets' n-grams (12 bytes each).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.checks import check_documents, check_tokens
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.cleaning.contamination import (
    HitFinder,
    by_document,
    common_ngrams,
    covered_words,
    remaining_pieces,
)
from ropewalk.stages.data.cleaning.evaluation_ngrams import (
    Decoder,
    NgramIndex,
    open_decoder,
    shard_texts,
    write_index,
)
from ropewalk.stages.data.cleaning.shard_tables import Table, add_counts, check_sum, numbered_shards, read_shard
from ropewalk.stages.data.cleaning.words import normal_form, split_words
from ropewalk.stages.schema import (
    Artifact,
    Record,
    documents_schema,
    list_lengths,
    read_artifact,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import Shard, map_shards

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

NAME = "decontaminate"
VERSION = 1

_TAKEN = ("documents", "tokens", "tokenizer")


def check(config: Any, output: Path) -> None:
    """See `ropewalk.stages.checks`."""
    (check_tokens if read_artifact(output).kind == "tokens" else check_documents)(config, output)


class DecontaminateConfig(Record):
    """When a document is contaminated, and what is done about it.

    A document is contaminated if it shares more than `max_ngrams` n-grams with all evaluation sets together, and they
    cover more than `max_overlap_fraction` of its words. With the defaults, one is enough.
    """

    ngram_words: int = Field(default=13, ge=1, le=1024)
    """Words of an n-gram."""
    max_ngrams: int = Field(default=0, ge=0)
    """Distinct n-grams that are allowed."""
    max_overlap_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the document's words in such n-grams that is allowed."""
    common_documents: int | None = Field(default=None, ge=1)
    """N-grams of more documents than this, such as licences, are common phrases and ignored. None: there are none."""
    remove: Literal["document", "passage"] = "document"
    """passage: cut out the n-grams; each piece that is left is a document `<doc_id>#<number>`, with
    `piece_start_characters` in its metadata. Documents only."""
    margin_characters: int = Field(default=200, ge=0)
    """passage: removed on either side of a shared n-gram."""
    min_piece_characters: int = Field(default=200, ge=1)
    """passage: shorter pieces are dropped."""


def contaminated_schema() -> pa.Schema:
    """Arrow schema of the overlaps that were found."""
    import pyarrow as pa

    strings = [pa.field(name, pa.string(), nullable=False) for name in ("doc_id", "slot", "sample_id", "ngram")]
    return pa.schema(
        [
            *strings,
            pa.field("num_ngrams", pa.int64(), nullable=False),
            pa.field("removed", pa.bool_(), nullable=False),
        ]
    )


@dataclass
class ShardCleaner:
    """Writes what stays of a shard, and what it shares with the evaluation sets. Built once a worker."""

    config: DecontaminateConfig
    table: Table
    index_folder: Path
    decoder: Decoder | None
    """Where the shards hold Tokens."""
    common: np.ndarray
    """N-grams to ignore."""
    _index: NgramIndex = field(init=False, repr=False)
    _names: pa.Table = field(init=False, repr=False)
    _samples: set[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._index = NgramIndex(self.index_folder)
        self._names = self._index.sample_names()
        self._samples = set(self._names.column("sample_id").to_pylist())

    def __call__(self, shard: tuple[int, Path, Path], folder: Path) -> dict[str, int]:
        """`shard`: its number, its file, and the folder of its hits."""
        import numpy as np
        import pyarrow as pa

        number, path, found = shard
        table, hits = read_shard(path), np.load(found / "hits.npy")
        hits = hits[~np.isin(hits[:, 2], self.common)]
        own = np.array([name in self._samples for name in table.column("doc_id").to_pylist()], bool)
        contaminated = self._contaminated(hits, np.load(found / "words.npy")) & ~own
        report = list(self._report(table, hits, own | contaminated))
        write_shard(folder, "contaminated", number, pa.Table.from_pylist(report, schema=contaminated_schema()))
        kept, cut = self._remove(table, hits, own, contaminated)
        write_shard(folder, self.table, number, kept)
        return {
            "num_in": table.num_rows,
            **self._size(kept),
            "num_dropped_evaluation_document": int(own.sum()),
            "num_dropped_contaminated": int(contaminated.sum()) - cut["num_cut"],
            **cut,
            "num_with_overlap": len(np.unique(hits[:, 0])),
        }

    def _contaminated(self, hits: np.ndarray, num_words: np.ndarray) -> np.ndarray:
        import numpy as np

        flags = np.zeros(len(num_words), bool)
        for row, mine in by_document(hits):
            overlap = covered_words(mine[:, 1], self.config.ngram_words) / num_words[row]
            distinct = len(np.unique(mine[:, 2]))
            flags[row] = distinct > self.config.max_ngrams and overlap > self.config.max_overlap_fraction
        return flags

    def _report(self, table: pa.Table, hits: np.ndarray, removed: np.ndarray) -> Iterator[dict[str, Any]]:
        import numpy as np

        for row, mine in by_document(hits):
            words = split_words(shard_texts(table.slice(row, 1), self.decoder)[0])
            numbers, first = np.unique(mine[:, 2], return_index=True)
            samples, first_of, times = np.unique(self._index.samples[numbers], return_index=True, return_counts=True)
            begins = mine[first[first_of], 1].tolist()
            for sample, begin, num_ngrams in zip(samples.tolist(), begins, times.tolist(), strict=True):
                yield {
                    "doc_id": table.column("doc_id")[row].as_py(),
                    "slot": self._names.column("slot")[sample].as_py(),
                    "sample_id": self._names.column("sample_id")[sample].as_py(),
                    "ngram": " ".join(map(normal_form, words[begin : begin + self.config.ngram_words])),
                    "num_ngrams": num_ngrams,
                    "removed": bool(removed[row]),
                }

    def _remove(
        self, table: pa.Table, hits: np.ndarray, own: np.ndarray, contaminated: np.ndarray
    ) -> tuple[pa.Table, dict[str, int]]:
        """The documents that stay, in order, and what was cut."""
        import pyarrow as pa

        if self.config.remove == "document":
            return table.filter(pa.array(~(own | contaminated))), {"num_cut": 0, "num_pieces": 0}
        places = {row: mine[:, 1].tolist() for row, mine in by_document(hits) if contaminated[row]}
        records: list[dict[str, Any]] = []
        num_cut = num_pieces = 0
        for row, record in enumerate(table.to_pylist()):
            if row in places:
                pieces = self._pieces(record, places[row])
                num_cut, num_pieces = num_cut + bool(pieces), num_pieces + len(pieces)
                records += pieces
            elif not own[row]:
                records.append(record)
        return pa.Table.from_pylist(records, schema=documents_schema()), {"num_cut": num_cut, "num_pieces": num_pieces}

    def _pieces(self, record: dict[str, Any], places: list[int]) -> list[dict[str, Any]]:
        config = self.config
        pieces = remaining_pieces(
            record["text"],
            places,
            ngram=config.ngram_words,
            margin=config.margin_characters,
            min_piece=config.min_piece_characters,
        )
        return [
            {
                **record,
                "doc_id": f"{record['doc_id']}#{number}",
                "text": piece,
                "num_bytes": len(piece.encode()),
                "metadata": json.dumps({**json.loads(record["metadata"]), "piece_start_characters": begin}),
            }
            for number, (begin, piece) in enumerate(pieces)
        ]

    def _size(self, kept: pa.Table) -> dict[str, int]:
        if self.table == "tokens":
            return {"num_kept": kept.num_rows, "num_tokens": sum(list_lengths(kept.column("input_ids")))}
        return {"num_kept": kept.num_rows, "num_kept_bytes": int(kept.column("num_bytes").to_numpy().sum())}


def find_slots(config: DecontaminateConfig, inputs: Mapping[str, Path]) -> tuple[Table, dict[str, Path]]:
    """Which slot is cleaned, and the evaluation sets. Raises ValueError if they are not one and at least one."""
    table: Table = "tokens" if "tokens" in inputs else "documents"
    if ("tokens" in inputs) == ("documents" in inputs):
        raise ValueError("decontaminate cleans either slot `documents` or slot `tokens`: connect one of them")
    if table == "tokens" and config.remove == "passage":
        raise ValueError('remove="passage" cuts texts: connect slot `documents` instead of `tokens`')
    sets = {slot: folder for slot, folder in inputs.items() if slot not in _TAKEN}
    if not sets:
        raise ValueError("decontaminate needs at least one evaluation set, in a slot of any other name")
    return table, sets


def _build_index(
    config: DecontaminateConfig, sets: Mapping[str, Path], decoder: Decoder | None, work: Path
) -> tuple[Path, dict[str, dict[str, int]]]:
    folder = work / f"index-{uuid.uuid4().hex}"
    folder.mkdir()
    return folder, write_index(folder, sets, config.ngram_words, decoder)


def run(config: DecontaminateConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Clean slot `documents` or `tokens`. Raises ValueError on bad input, or if nothing is left."""
    started = time.perf_counter()
    table, sets = find_slots(config, inputs)
    paths = numbered_shards(inputs[table], table)
    decoder = open_decoder(inputs, [table, *sorted(sets)])
    index, sample_counts = _build_index(config, sets, decoder, context.work)
    own_decoder = decoder if table == "tokens" else None
    finder = partial(HitFinder, index, config.ngram_words, own_decoder)
    hits = list(map_shards(context, finder, {name: path for name, (_, path) in paths.items()}, label="hits"))
    common = common_ngrams(
        [shard.folder / "hits.npy" for shard in hits], len(NgramIndex(index).hashes), config.common_documents
    )
    cleaner = partial(ShardCleaner, config, table, index, own_decoder, common)
    items = {name: (*paths[name], shard.folder) for name, shard in zip(paths, hits, strict=True)}
    counts = _collect(map_shards(context, cleaner, items, label="kept"), output.data)
    counts["num_common_ngrams"] = len(common)
    if not counts["num_kept"]:
        raise ValueError(f"every document is contaminated: {counts}; raise max_ngrams or set common_documents")
    # Pieces are documents too, so that a cut document is one that came in and several that stay.
    check_sum(NAME, {**counts, "num_kept": counts["num_kept"] - counts["num_pieces"] + counts["num_cut"]})
    write_artifact(
        output.data,
        Artifact(
            kind=table,
            tokenizer=read_artifact(inputs[table]).tokenizer,
            counts=counts,
            details={"evaluation_sets": sample_counts},
        ),
    )
    seconds = time.perf_counter() - started
    num_words = sum(shard.counts["num_words"] for shard in hits)
    measured = {"seconds": seconds, "words_per_second": num_words / seconds}
    (output.observed / "throughput.json").write_text(json.dumps(measured) + "\n")
    context.log(counts)


def _collect(shards: Iterable[Shard], folder: Path) -> dict[str, int]:
    def linked(shard: Shard) -> dict[str, int]:
        shard.link_into(folder)
        return shard.counts

    return add_counts(linked(shard) for shard in shards)
