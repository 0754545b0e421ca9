"""Words of a text, and 64-bit hashes of its n-grams.

A word is a run of letters, digits, underscores and combining accents; its normal form is lower case in NFKC, so that
"Café" is one word however its accent is spelt. Scripts without spaces make one word of each run between punctuation;
for them `character` n-grams are the better unit.

Hashes of n-grams are polynomials in the hashes of their units modulo 2^64, mixed at the end. Two different n-grams
have the same hash with odds of about 2^-64: comparing 1e6 n-grams with 1e11 words gives 0.005 false matches in all.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Unit = Literal["word", "character"]

_WORD = re.compile(r"[\w\u0300-\u036f]+")
_NO_WORD = re.compile(r"[^\w\u0300-\u036f]")
_SPACE = re.compile(r"\s+")
_PIECE_CHARACTERS = 2**22
_BASE = 0x9E3779B97F4A7C15  # Odd, so that no place of an n-gram loses bits.


def split_words(text: str) -> list[str]:
    """The words of a text as they are spelt there."""
    return _WORD.findall(text)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where each of `split_words` begins and ends, in characters."""
    return [match.span() for match in _WORD.finditer(text)]


def normal_form(word: str) -> str:
    """The spelling by which words are compared."""
    return (word if word.isascii() else unicodedata.normalize("NFKC", word)).lower()


class WordHashes(dict[str, int]):
    """64-bit hashes of words by their spelling, made when they are asked for. Keep one no longer than a shard."""

    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(normal_form(word).encode("utf-8"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value

    def of(self, text: str) -> np.ndarray:
        """uint64 hashes of the words of a text, in order."""
        import numpy as np

        found = [np.zeros(0, np.uint64)]
        for piece in _pieces(text):
            words = split_words(piece)
            found.append(np.fromiter(map(self.__getitem__, words), np.uint64, len(words)))
        return np.concatenate(found)


def _pieces(text: str) -> Iterator[str]:
    """A long text cut between words, so that its words need not all be in memory."""
    begin = 0
    while begin < len(text):
        between = _NO_WORD.search(text, begin + _PIECE_CHARACTERS)
        end = between.start() if between else len(text)
        yield text[begin:end]
        begin = end


def character_hashes(text: str) -> np.ndarray:
    """uint64 hashes of the characters of a text in normal form, each run of white space as one space."""
    import numpy as np

    normal = _SPACE.sub(" ", normal_form(text)).strip()
    return _mixed(np.frombuffer(normal.encode("utf-32-le"), np.uint32).astype(np.uint64) + np.uint64(_BASE))


def ngram_hashes(units: np.ndarray, ngram: int) -> np.ndarray:
    """Hashes of all n-grams of hashed units, in order: `[max(0, len(units) - ngram + 1)]` uint64."""
    import numpy as np

    count = max(0, len(units) - ngram + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(ngram):
        hashes *= np.uint64(_BASE)
        hashes += units[place : place + count]
    return _mixed(hashes)


def fold(columns: np.ndarray) -> np.ndarray:
    """One uint64 hash for each row of an integer matrix `[n, k]`."""
    import numpy as np

    hashes = np.zeros(len(columns), np.uint64)
    for place in range(columns.shape[1]):
        hashes = _mixed(hashes * np.uint64(_BASE) + columns[:, place].astype(np.uint64) + np.uint64(place + 1))
    return hashes


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection whose every bit depends on all bits."""
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
