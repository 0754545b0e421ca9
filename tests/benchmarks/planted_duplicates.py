"""A corpus with duplicates whose number is known, as JSON Lines; and what a tool found of them.

Originals are the sources of the standard library, each text once. A further generation of originals has the lines of
each file in another order, which leaves words and lengths but next to no 5-gram. Then, of the files of 40 lines and
more, one in ten gets an exact copy, one in ten a copy with a Jaccard similarity of about 0.95, one in ten of 0.9 and
one in ten of 0.6, so that no document has more than one copy. Similar copies have one stretch of lines replaced by
lines of another file: the similarity is then much the same whatever a tool takes for a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from data_corpora import library_texts

MIN_LINES = 40
NGRAM = 5
NUM_FILES = 8
KINDS: Mapping[str, float | None] = {"exact": None, "0.95": 0.95, "0.9": 0.9, "0.6": 0.6}
BANDS = {"exact": (1.0, 1.0), "near": (0.85, 0.9999), "apart": (0.0, 0.7)}
"""Least and highest similarity by all of `SPLITTERS`. At a threshold of 0.8 the first two are to be found, the last
is to stay; what lies between is not judged."""
SPLITTERS: Sequence[Callable[[str], list[str]]] = (str.split, re.compile(r"\w+").findall)


@dataclass(frozen=True)
class Copy:
    """A planted duplicate."""

    kind: str
    original: str
    copy: str
    jaccard: tuple[float, ...]
    """Of 5-grams, lower-cased, by each of `SPLITTERS`."""


@dataclass
class Planted:
    """The documents by id, in the order of the files, and what is a copy of what."""

    texts: dict[str, str] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)

    def write(self, folder: Path, kinds: Sequence[str] = tuple(KINDS)) -> int:
        """Write the documents as JSON Lines, without copies of other kinds. Returns the bytes of their texts."""
        left_out = {each.copy for each in self.copies if each.kind not in kinds}
        names = [name for name in self.texts if name not in left_out]
        folder.mkdir()
        for number in range(NUM_FILES):
            mine = names[number * len(names) // NUM_FILES : (number + 1) * len(names) // NUM_FILES]
            lines = (json.dumps({"id": name, "text": self.texts[name]}) + "\n" for name in mine)
            (folder / f"{number:03d}.jsonl").write_text("".join(lines), encoding="utf-8")
        return sum(len(self.texts[name].encode()) for name in names)

    def described(self) -> dict[str, dict[str, float]]:
        """Number and similarity of the copies of each kind."""
        found = {}
        for kind in KINDS:
            values = np.asarray([each.jaccard for each in self.copies if each.kind == kind])
            found[kind] = {"num_copies": len(values), "mean_jaccard": round(float(values.mean()), 4)}
            found[kind] |= {"lowest": round(float(values.min()), 4), "highest": round(float(values.max()), 4)}
        return found

    def judged(self, kept: set[str]) -> dict[str, int]:
        """How many documents were kept, of how many copies one of the two was dropped, and what else was dropped."""
        found: dict[str, int] = {"num_in": len(self.texts), "num_kept": len(kept)}
        for name, (least, most) in BANDS.items():
            mine = [each for each in self.copies if least <= min(each.jaccard) and max(each.jaccard) <= most]
            found[f"{name}_found"] = sum(not {each.original, each.copy} <= kept for each in mine)
            found[f"{name}_planted"] = len(mine)
        paired = {name for each in self.copies for name in (each.original, each.copy)}
        found["dropped_others"] = sum(name not in kept and name not in paired for name in self.texts)
        return found


def plant(generations: int = 2, every: int = 1) -> Planted:
    """The corpus, from every n-th file of the library."""
    texts = list(dict.fromkeys(library_texts()))[::every]
    long = [number for number, text in enumerate(texts) if text.count("\n") >= MIN_LINES]
    planted, rng = Planted(), np.random.default_rng(0)
    for generation in range(generations):
        originals = {number: texts[number] for number in (long if generation else range(len(texts)))}
        if generation:
            originals = {number: _shuffled(text, rng) for number, text in originals.items()}
        for number, text in originals.items():
            planted.texts[_name(generation, number, "original")] = text
        for place, number in enumerate(long):
            kind = dict(enumerate(KINDS)).get(place % 10)
            if kind is not None:
                donor = originals[long[(place + 5) % len(long)]]
                _add_copy(planted, generation, number, kind, originals[number], donor, rng)
    order = rng.permutation(np.asarray(list(planted.texts), object))
    planted.texts = {name: planted.texts[name] for name in order}
    return planted


def _name(generation: int, number: int, kind: str) -> str:
    return f"{generation}-{number:05d}-{kind}"


def _shuffled(text: str, rng: np.random.Generator) -> str:
    lines = text.splitlines(keepends=True)
    return "".join(lines[place] for place in rng.permutation(len(lines)))


def _add_copy(
    planted: Planted, generation: int, number: int, kind: str, text: str, donor: str, rng: np.random.Generator
) -> None:
    jaccard = KINDS[kind]
    copy = text if jaccard is None else _altered(text, donor, (1 - jaccard) / (1 + jaccard), rng)
    name = _name(generation, number, kind)
    planted.texts[name] = copy
    similarities = tuple(_jaccard(text, copy, split) for split in SPLITTERS)
    planted.copies.append(Copy(kind, _name(generation, number, "original"), name, similarities))


def _altered(text: str, donor: str, fraction: float, rng: np.random.Generator) -> str:
    """A stretch of lines with so much of the words replaced by lines of the donor, used again if too few."""
    lines, others = (each.splitlines(keepends=True) for each in (text, donor))
    sizes = [len(line.split()) for line in lines]
    wanted = fraction * sum(sizes)
    ends = list(accumulate(sizes))
    begin = int(rng.integers(0, max(1, np.searchsorted(ends, ends[-1] - wanted))))
    end = int(np.searchsorted(ends, (ends[begin - 1] if begin else 0) + wanted)) + 1
    replaced: list[str] = []
    missing = sum(sizes[begin:end])
    while missing > 0:
        line = others[len(replaced) % len(others)]
        replaced.append(line)
        missing -= len(line.split())
    return "".join([*lines[:begin], *replaced, *lines[end:]])


def _jaccard(one: str, other: str, split: Callable[[str], list[str]]) -> float:
    sets = []
    for text in (one, other):
        words = split(text.lower())
        sets.append(set(zip(*(words[place:] for place in range(NGRAM)), strict=False)))
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))
