"""Token ids of documents, with random access, and the account of every token of the rows made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.stages.schema import TokenizerInfo, iterate_table, read_artifact

if TYPE_CHECKING:
    import numpy as np


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
    """Read a Tokens artifact whole; its ids go to a scratch file in `work`, which is mapped.

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


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise RuntimeError unless every token that came in is accounted for."""
    dropped = sum(value for name, value in counts.items() if name.startswith("num_tokens_dropped_"))
    accounted = counts["num_tokens_kept"] + counts.get("num_tokens_trimmed", 0) + dropped
    if accounted != counts["num_tokens_in"]:
        raise RuntimeError(f"{counts['num_tokens_in']} tokens came in, {accounted} are accounted for: {dict(counts)}")
    if min(counts.values()) < 0:
        raise RuntimeError(f"a count is negative: {dict(counts)}")
