"""Rows being built: the layout that the packing stages share, and the account of every token.

A row is the begin token, then pieces of documents, each document's end followed by the end token if there is room,
then padding (end tokens that are no targets). So a row holds up to `row_tokens - 1` other tokens.
Two sums are checked whenever rows are written:

    num_tokens_in = num_tokens_kept + num_tokens_trimmed + every num_tokens_dropped_*
    num_rows * row_tokens = num_tokens_kept + num_tokens_inserted + num_tokens_padding

Random access to the tokens goes through a flat scratch file that is memory-mapped: memory is bounded by the document
ids and the plan of the rows (some hundred bytes a document), not by the tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.schema import (
    Artifact,
    AttentionPolicy,
    TokenizerInfo,
    iterate_table,
    read_artifact,
    rows_schema,
    stable_id,
    write_artifact,
    write_table,
)

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.context import Context, Output

PROGRESS_ROWS = 256
ROWS_PER_SHARD = 4096


@dataclass(frozen=True)
class Corpus:
    """The token ids of some documents, or of what is left of them, end to end."""

    doc_ids: Sequence[str]
    offsets: np.ndarray
    """int64 `[num_documents + 1]`: where each document begins in `ids`."""
    ids: np.ndarray
    """int32 `[num_tokens]`."""
    starts: np.ndarray
    """int64 `[num_documents]`: how many tokens of each document come before those here."""
    targets: np.ndarray | None = None
    """bool `[num_tokens]`: which tokens are to be learnt. None: all."""

    @classmethod
    def from_documents(cls, documents: Sequence[tuple[str, Sequence[int]]]) -> Corpus:
        """A corpus in memory, from pairs of document id and token ids."""
        import numpy as np

        lengths = [len(ids) for _, ids in documents]
        flat = [token for _, ids in documents for token in ids]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        starts = np.zeros(len(documents), np.int64)
        return cls([name for name, _ in documents], offsets, np.asarray(flat, dtype=np.int32), starts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[num_documents]`: tokens of each document."""
        return self.offsets[1:] - self.offsets[:-1]

    def piece(self, document: int, start: int, num_tokens: int) -> np.ndarray:
        """Tokens `start` to `start + num_tokens` of a document."""
        begin = int(self.offsets[document]) + start
        return self.ids[begin : begin + num_tokens]


def load_corpus(folder: Path, work: Path) -> tuple[Corpus, TokenizerInfo]:
    """Read a Tokens artifact; its ids go to a scratch file in `work`, which is mapped.

    Raises ValueError if it has no tokenizer or no tokens, a document id occurs twice, or an id is out of range.
    """
    import numpy as np

    info = read_artifact(folder, "tokens").tokenizer
    if info is None:
        raise ValueError(f"{folder / 'artifact.json'} names no tokenizer: make the tokens with the encode stage")
    doc_ids: list[str] = []
    lengths: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    work.mkdir(parents=True, exist_ok=True)
    path = work / "tokens.int32"
    path.unlink(missing_ok=True)  # An attempt that was given up may still write to the file of this name.
    with path.open("wb") as file:
        for batch in iterate_table(folder, "tokens", ["doc_id", "input_ids"]):
            ids = batch.column("input_ids")
            flat = ids.flatten().to_numpy()
            if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < info.vocab_size:
                raise ValueError(
                    f"{folder} holds token ids outside the vocabulary of {info.vocab_size}: encode it anew"
                )
            file.write(flat.astype("<i4").tobytes())
            lengths.append(ids.value_lengths().to_numpy().astype(np.int64))
            doc_ids.extend(batch.column("doc_id").to_pylist())
    if not sum(int(part.sum()) for part in lengths):
        raise ValueError(f"{folder} holds no tokens: there is nothing to lay into rows")
    if len(set(doc_ids)) != len(doc_ids):
        raise ValueError(f"{folder} holds a doc_id more than once: deduplicate the documents by id before encoding")
    offsets = np.cumsum(np.concatenate(lengths))
    starts = np.zeros(len(doc_ids), np.int64)
    return Corpus(doc_ids, offsets, np.memmap(path, dtype="<i4", mode="r"), starts), info


@dataclass(frozen=True)
class Row:
    """A finished row: its record in the Rows table, and how much of it is padding."""

    record: dict[str, Any]
    num_tokens_padding: int

    @property
    def num_tokens_kept(self) -> int:
        """Tokens of documents."""
        return sum(segment["num_tokens"] for segment in self.record["segments"])


@dataclass
class RowBuilder:
    """Lays one row from left to right. Nothing is placed beyond its end; callers learn how much was."""

    corpus: Corpus
    info: TokenizerInfo
    row_tokens: int
    num_placed: int = 1
    segments: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        import numpy as np

        self.input_ids = np.full(self.row_tokens, self.info.eos_token_id, dtype=np.int32)
        self.loss_mask = np.zeros(self.row_tokens, dtype=bool)
        self.input_ids[0] = self.info.bos_token_id

    @property
    def room(self) -> int:
        """Positions left."""
        return self.row_tokens - self.num_placed

    def place(self, document: int, start: int, num_tokens: int) -> int:
        """Place a piece of a document, all targets. Returns how many tokens of it fitted."""
        fitting = min(num_tokens, self.room)
        if fitting > 0:
            begin = self.num_placed
            self._write(self.corpus.piece(document, start, fitting), target=True)
            doc_id = self.corpus.doc_ids[document]
            self.segments.append({"doc_id": doc_id, "start": start, "num_tokens": fitting, "row_start": begin})
        return fitting

    def insert(self, ids: Sequence[int], *, target: bool) -> None:
        """Place tokens that are of no document, as far as there is room."""
        self._write(ids[: self.room], target=target)

    def separate(self) -> None:
        """End a document: the end token, which the model learns to predict, if there is room."""
        self.insert([self.info.eos_token_id], target=True)

    def forget_target(self, position: int) -> None:
        """Make one position no target; beyond the row it does nothing."""
        if position < self.row_tokens:
            self.loss_mask[position] = False

    def finish(self, row_id: str, attention: AttentionPolicy) -> Row:
        """The record; what room is left is padding."""
        record = {
            "row_id": row_id,
            "input_ids": self.input_ids,
            "segments": self.segments,
            "attention": attention,
            "loss_mask": self.loss_mask,
        }
        return Row(record, self.room)

    def _write(self, ids: Any, *, target: bool) -> None:
        end = self.num_placed + len(ids)
        self.input_ids[self.num_placed : end] = ids
        self.loss_mask[self.num_placed : end] = target
        self.num_placed = end


def make_row_id(method: str, seed: int, index: int, segments: Sequence[Mapping[str, Any]]) -> str:
    """An id that differs between methods, seeds, rows and corpora."""
    parts = [value for segment in segments for value in (segment["doc_id"], segment["start"], segment["num_tokens"])]
    return stable_id(method, seed, index, *parts)


def write_rows(
    output: Output,
    context: Context,
    rows: Iterable[Row],
    *,
    info: TokenizerInfo,
    row_tokens: int,
    num_rows: int,
    counts: dict[str, int],
    details: Mapping[str, Any],
) -> None:
    """Write the Rows artifact, check its counts, report them, and leave the throughput in `observed/`.

    `num_rows` is for progress. `counts` holds what came in and what was trimmed and dropped; it and `details` are
    read after the last row, so that a generator of rows can still fill them in.
    """
    started = time.monotonic()
    written = {"num_rows": 0, "num_tokens_kept": 0, "num_tokens_padding": 0}

    def records() -> Iterator[dict[str, Any]]:
        for row in rows:
            written["num_rows"] += 1
            written["num_tokens_kept"] += row.num_tokens_kept
            written["num_tokens_padding"] += row.num_tokens_padding
            if written["num_rows"] % PROGRESS_ROWS == 0:
                context.progress(written["num_rows"], num_rows, "rows")
            yield row.record

    write_table(output.data, "rows", rows_schema(loss_mask=True), records(), shard_records=ROWS_PER_SHARD)
    context.progress(written["num_rows"], num_rows, "rows")
    kept, padding = written["num_tokens_kept"], written["num_tokens_padding"]
    counts |= written | {"num_tokens_inserted": written["num_rows"] * row_tokens - kept - padding}
    check_counts(counts)
    write_artifact(
        output.data,
        Artifact(kind="rows", tokenizer=info, row_tokens=row_tokens, counts=dict(counts), details=dict(details)),
    )
    context.log({name: float(value) for name, value in counts.items()})
    seconds = time.monotonic() - started
    observed = {"seconds": seconds, "tokens_per_second": written["num_rows"] * row_tokens / max(seconds, 1e-9)}
    (output.observed / "throughput.json").write_text(json.dumps(observed, indent=1) + "\n", encoding="utf-8")


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise RuntimeError unless every token that came in is accounted for."""
    dropped = sum(value for name, value in counts.items() if name.startswith("num_tokens_dropped_"))
    accounted = counts["num_tokens_kept"] + counts.get("num_tokens_trimmed", 0) + dropped
    if accounted != counts["num_tokens_in"]:
        raise RuntimeError(f"{counts['num_tokens_in']} tokens came in, {accounted} are accounted for: {dict(counts)}")
    if min(counts.values()) < 0:
        raise RuntimeError(f"a count is negative: {dict(counts)}")
