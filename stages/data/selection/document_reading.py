"""Documents or Tokens as a judging model reads them, one shard after another, for the stages that score documents.

Such a stage takes `model` (a causal language model with its tokenizer) and either `documents`, which are encoded with
the model's tokenizer, or `tokens`, which must have been encoded with a tokenizer whose every token the model's has. It
reads the first `max_tokens` of each document. What is behind them is not seen, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ropewalk.stages.checkpoint import extends_vocabulary, tokenizer_digest
from ropewalk.stages.context import Context
from ropewalk.stages.data.selection.language_model import TextEncoder, truncate
from ropewalk.stages.data.selection.scores import records_table
from ropewalk.stages.schema import read_artifact, shard_paths, write_shard
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import pyarrow as pa

DocumentKind = Literal["documents", "tokens"]
_COUNTS = ("num_in", "num_dropped_too_short", "num_cut_documents", "num_cut_tokens")


@dataclass(frozen=True)
class ReadDocument:
    """A document that is long enough to be scored."""

    doc_id: str
    source: str
    ids: list[int]
    """What the model reads of it."""


class DocumentReader:
    """Reads shards of one kind."""

    def __init__(
        self, kind: DocumentKind, model: Path, *, min_tokens: int, max_tokens: int | None, enable_begin: bool = True
    ) -> None:
        """`enable_begin` puts the model's begin token in front.

        With it, shorter documents than `min_tokens` are dropped, and `max_tokens` are read of longer ones (None: all).
        """
        self._kind, self._encoder = kind, TextEncoder(model)
        self._prefix = self._encoder.prefix if enable_begin else []
        self._min_tokens, self._max_tokens = min_tokens, max_tokens

    def read(self, path: Path, counts: Counter[str]) -> Iterator[ReadDocument]:
        """The documents of a shard that are long enough; `counts` is told of the others, and of cuts."""
        import pyarrow.parquet as pq

        text = "text" if self._kind == "documents" else "input_ids"
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=["doc_id", "source", text]):
                for row in batch.to_pylist():
                    counts["num_in"] += 1
                    if (document := self._read(row, counts)) is not None:
                        yield document

    def _read(self, row: Mapping[str, Any], counts: Counter[str]) -> ReadDocument | None:
        text = self._encoder.encode(row["text"]).ids if self._kind == "documents" else row["input_ids"]
        whole = [*self._prefix, *text]
        if len(whole) < self._min_tokens:
            counts["num_dropped_too_short"] += 1
            return None
        ids, num_cut = truncate(whole, self._max_tokens or len(whole), keep="head")
        counts["num_cut_documents"] += num_cut > 0
        counts["num_cut_tokens"] += num_cut
        return ReadDocument(row["doc_id"], row["source"], ids)


def score_shard(
    reader: DocumentReader,
    measure: Callable[[ReadDocument], Mapping[str, float]],
    columns: Sequence[str],
    shard: tuple[int, Path],
    folder: Path,
) -> dict[str, int]:
    """Write the `columns` that `measure` gives of each document of a shard as `parts`; returns the counts."""
    number, path = shard
    counts: Counter[str] = Counter()
    records = [
        {"sample_id": document.doc_id, "source": document.source, **measure(document)}
        for document in reader.read(path, counts)
    ]
    write_shard(folder, "parts", number, records_table(records, columns))
    return dict(counts)


def document_slot(inputs: Mapping[str, Path]) -> DocumentKind:
    """Which of `documents` and `tokens` is given. Raises ValueError unless one is, and the model can read it."""
    found: list[DocumentKind] = [kind for kind in ("documents", "tokens") if kind in inputs]
    if len(found) != 1 or set(inputs) != {"model", *found}:
        raise ValueError(f"scoring documents takes the slots model and one of documents, tokens, not {sorted(inputs)}")
    kind, model = found[0], inputs["model"]
    artifact = read_artifact(inputs[kind], kind)
    if kind == "documents" or (artifact.tokenizer and artifact.tokenizer.digest == tokenizer_digest(model)):
        return kind
    folder = inputs[kind] / "tokenizer"
    if not (folder / "tokenizer.json").is_file() or not extends_vocabulary(model, folder):
        raise ValueError("slot tokens was encoded by another tokenizer than slot model's: encode with that one first")
    return kind


def map_documents(
    inputs: Mapping[str, Path], context: Context, build: Callable[..., Any]
) -> tuple[list[pa.Table], Counter[str]]:
    """Have `build` (a class, or a partial of one) write `parts` for every shard; the tables in order, and the counts.

    Its instance is called with a shard's number and path, and the folder to write to, as `score_shard` is. Raises
    ValueError if no document was long enough.
    """
    import pyarrow.parquet as pq

    kind = document_slot(inputs)
    paths = {path.name: (number, path) for number, path in enumerate(shard_paths(inputs[kind], kind))}
    tables: list[pa.Table] = []
    counts: Counter[str] = Counter()
    counts.update(dict.fromkeys(_COUNTS, 0))
    for shard in map_shards(context, build, paths):
        tables += [pq.read_table(path) for path in sorted(shard.folder.glob("parts-*.parquet"))]
        counts.update(shard.counts)
    if not sum(table.num_rows for table in tables):
        raise ValueError(f"no document of {inputs[kind]} can be scored: {dict(counts)}")
    return tables, counts
