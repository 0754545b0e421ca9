"""Where the documents of a shard share n-grams with evaluation sets, and what follows for each of them.

A hit is a row of three numbers: a document's row in its shard, the word of it where a shared n-gram begins, and the
n-gram's number in the index. Hits are ordered by row, then by word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ropewalk.stages.data.cleaning.evaluation_ngrams import Decoder, NgramIndex, shard_texts
from ropewalk.stages.data.cleaning.shard_tables import read_shard
from ropewalk.stages.data.cleaning.words import WordHashes, ngram_hashes, word_spans

if TYPE_CHECKING:
    import numpy as np


@dataclass
class HitFinder:
    """Writes `hits.npy` `[k, 3]` int64 for one shard after another. Built once a worker."""

    index_folder: Path
    ngram_words: int
    decoder: Decoder | None
    """Where the shards hold Tokens."""
    _index: NgramIndex = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._index = NgramIndex(self.index_folder)

    def __call__(self, path: Path, folder: Path) -> dict[str, int]:
        """Also writes `words.npy`, the number of words of each document; returns `num_in` and `num_words`."""
        import numpy as np

        shard = read_shard(path, ["doc_id", "input_ids" if self.decoder else "text"])
        words, hits, lengths = WordHashes(), [np.zeros((0, 3), np.int64)], []
        for row, text in enumerate(shard_texts(shard, self.decoder)):
            units = words.of(text)
            places, numbers = self._index.find(ngram_hashes(units, self.ngram_words))
            hits.append(np.stack([np.full(len(places), row), places, numbers], axis=1))
            lengths.append(len(units))
        np.save(folder / "hits.npy", np.concatenate(hits))
        np.save(folder / "words.npy", np.array(lengths, np.int64))
        return {"num_in": shard.num_rows, "num_words": sum(lengths)}


def common_ngrams(hits: Sequence[Path], num_ngrams: int, max_documents: int | None) -> np.ndarray:
    """Numbers of the n-grams that occur in more than `max_documents` documents, ascending."""
    import numpy as np

    if max_documents is None:
        return np.zeros(0, np.int64)
    documents = np.zeros(num_ngrams, np.int64)
    for path in hits:
        pairs = np.unique(np.load(path)[:, [0, 2]], axis=0)
        documents += np.bincount(pairs[:, 1], minlength=num_ngrams)
    return np.flatnonzero(documents > max_documents)


def by_document(hits: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each row that has hits, with its hits."""
    import numpy as np

    rows, starts = np.unique(hits[:, 0], return_index=True)
    ends = [*starts.tolist(), len(hits)][1:]
    for row, begin, end in zip(rows.tolist(), starts.tolist(), ends, strict=True):
        yield row, hits[begin:end]


def covered_words(places: np.ndarray, ngram: int) -> int:
    """How many words lie in n-grams that begin at these places, of which there is at least one, ascending."""
    import numpy as np

    return int(np.minimum(np.diff(places), ngram).sum()) + ngram


def covered_spans(places: Sequence[int], ngram: int) -> list[tuple[int, int]]:
    """The same as spans of words, first and behind the last; touching ones are one."""
    spans: list[tuple[int, int]] = []
    for place in places:
        if spans and place <= spans[-1][1]:
            spans[-1] = (spans[-1][0], place + ngram)
        else:
            spans.append((place, place + ngram))
    return spans


def remaining_pieces(
    text: str, places: Sequence[int], *, ngram: int, margin: int, min_piece: int
) -> list[tuple[int, str]]:
    """What is left of a text when the n-grams at these words go: where each piece begins, and the piece.

    Args:
        text: The document.
        places: Words at which n-grams begin, ascending.
        ngram: Words of each.
        margin: Characters that go with them on either side.
        min_piece: Pieces of fewer characters are left out.
    """
    words = word_spans(text)
    pieces, begin = [], 0
    for first, end in covered_spans(places, ngram):
        pieces.append((begin, text[begin : max(begin, words[first][0] - margin)]))
        begin = min(len(text), words[end - 1][1] + margin)
    pieces.append((begin, text[begin:]))
    return [(start, piece) for start, piece in pieces if len(piece) >= min_piece and piece.strip()]
