"""The n-grams of evaluation sets, and where they occur in a text.

A slot of an evaluation set holds
* Documents: each is a sample under its `doc_id` (questions and answers of a benchmark, ingested like any source);
* Tokens: each document is a sample, decoded. With the held-out Tokens that `evaluate` will read, this covers all our
  own prompts before any model exists: a prompt is a window of held-out text with facts planted in it;
* Predictions of `evaluate`: its samples, of which the artifact keeps the asked fact and 24 tokens on either side.

Of n-grams that several samples have, the first sample is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.cleaning.shard_tables import list_values, read_shard
from ropewalk.stages.data.cleaning.words import WordHashes, ngram_hashes
from ropewalk.stages.data.vocabulary import load_tokenizer, tokenizer_digest
from ropewalk.stages.schema import read_artifact, shard_paths

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

KINDS = ("documents", "tokens", "predictions")


@dataclass(frozen=True)
class Decoder:
    """Turns token ids back into text."""

    tokenizer: Any
    """A transformers fast tokenizer."""

    def texts(self, rows: Sequence[np.ndarray]) -> list[str]:
        """The texts of documents."""
        backend = self.tokenizer.backend_tokenizer
        return backend.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)


def open_decoder(inputs: Mapping[str, Path], slots: Sequence[str]) -> Decoder | None:
    """The decoder that the slots with Tokens need; None if there is none.

    Raises ValueError if slot `tokenizer` is missing, or is not the one that encoded them.
    """
    encoded = [slot for slot in slots if read_artifact(inputs[slot]).kind == "tokens"]
    if not encoded:
        return None
    if "tokenizer" not in inputs:
        raise ValueError(f"slot {encoded[0]!r} holds tokens, which are compared as text: connect slot `tokenizer`")
    digest = tokenizer_digest(inputs["tokenizer"])
    for slot in encoded:
        info = read_artifact(inputs[slot]).tokenizer
        if info is None or info.digest != digest:
            raise ValueError(f"slot {slot!r} was not encoded by the tokenizer of slot `tokenizer`: connect its own")
    return Decoder(load_tokenizer(inputs["tokenizer"]))


def read_samples(folder: Path, decoder: Decoder | None) -> Iterator[tuple[str, str]]:
    """Id and text of each sample of an evaluation set. Raises ValueError for an artifact of another kind."""
    kind = read_artifact(folder).kind
    if kind not in KINDS:
        raise ValueError(f"{folder} holds {kind}: an evaluation set is one of {', '.join(KINDS)}")
    table = "samples" if kind == "predictions" else kind
    for path in shard_paths(folder, table):
        yield from shard_samples(path, kind, decoder)


def shard_samples(path: Path, kind: str, decoder: Decoder | None) -> Iterator[tuple[str, str]]:
    """The samples of one shard."""
    if kind == "documents":
        shard = read_shard(path, ["doc_id", "text"])
        yield from zip(shard.column("doc_id").to_pylist(), shard.column("text").to_pylist(), strict=True)
    elif kind == "tokens":
        assert decoder is not None
        shard = read_shard(path, ["doc_id", "input_ids"])
        yield from zip(shard.column("doc_id").to_pylist(), shard_texts(shard, decoder), strict=True)
    else:
        names = ("text_before", "fact", "text_after")
        for row in read_shard(path, ["sample_id", *names]).to_pylist():
            yield row["sample_id"], "".join(row[name] for name in names)


def shard_texts(shard: pa.Table, decoder: Decoder | None) -> list[str]:
    """The texts of a shard of Documents, or of Tokens with a decoder."""
    if decoder is None:
        return shard.column("text").to_pylist()
    return decoder.texts(list_values(shard.column("input_ids")))


class NgramIndex:
    """The n-grams of all samples, as sorted 64-bit hashes; kept in a folder and mapped from there."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        self.hashes, self.samples = load("hashes"), load("samples")
        """Ascending, and to each the number of the first sample that has it."""
        self._folder = folder

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these hashes are in the index (places, ascending), and their numbers there."""
        import numpy as np

        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        found = np.flatnonzero(self.hashes[places] == hashes)
        return found, places[found]

    def sample_names(self) -> pa.Table:
        """`slot` and `sample_id` by number."""
        import pyarrow as pa

        with pa.memory_map(str(self._folder / "names.arrow")) as file:
            return pa.ipc.open_file(file).read_all()


def write_index(
    folder: Path, slots: Mapping[str, Path], ngram: int, decoder: Decoder | None
) -> dict[str, dict[str, int]]:
    """Write the index of evaluation sets to an empty folder; returns counts by slot.

    Raises ValueError if no sample is as long as an n-gram.
    """
    import numpy as np

    hashes, numbers, names = [], [], []
    counts = {}
    for slot in sorted(slots):
        found = {"num_samples": 0, "num_samples_too_short": 0, "num_ngrams": 0}
        words = WordHashes()
        for sample_id, text in read_samples(slots[slot], decoder):
            mine = np.unique(ngram_hashes(words.of(text), ngram))
            found["num_samples"] += 1
            found["num_samples_too_short"] += not len(mine)
            found["num_ngrams"] += len(mine)
            hashes.append(mine)
            numbers.append(np.full(len(mine), len(names), np.int32))
            names.append((slot, sample_id))
        counts[slot] = found
    if not sum(found["num_ngrams"] for found in counts.values()):
        raise ValueError(f"no sample of {sorted(slots)} has {ngram} words: lower ngram_words or give longer samples")
    distinct, first = np.unique(np.concatenate(hashes), return_index=True)
    np.save(folder / "hashes.npy", distinct)
    np.save(folder / "samples.npy", np.concatenate(numbers)[first])
    _write_names(folder, names)
    return counts


def _write_names(folder: Path, names: Sequence[tuple[str, str]]) -> None:
    import pyarrow as pa

    columns = {name: pa.array([row[place] for row in names]) for place, name in enumerate(("slot", "sample_id"))}
    table = pa.table(columns)
    with pa.ipc.new_file(str(folder / "names.arrow"), table.schema) as file:
        file.write_table(table)
