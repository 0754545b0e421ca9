"""Knots for `utk`: which chunks the documents of a row are cut into, where they go, and the row that comes of it.

A row's documents are pieces of a `RowPlan`; the separator belongs to its document. For each row a stream of random
numbers of its own gives, in this order: the row's kind; for each document the number of chunks (unless hops) and its
cuts; the order of all chunks, if any document is cut; with backtracing the ids, one for each slot.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropewalk.stages.data.packing.knot_rules import BACKTRACING_TOKENS, HOP_TOKENS, KnotRules, RowKind, added_tokens
from ropewalk.stages.data.packing.row_batches import RowBatch
from ropewalk.stages.schema import TokenizerInfo

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.data.packing.bins import RowPlan
    from ropewalk.stages.data.packing.rows import Corpus

ID_ALPHABET = string.ascii_letters + string.digits
ID_CHARACTERS = 6
NUMBERED, HOPS, UNMARKED = 0, 1, -1
"""Which markers a row has."""


@dataclass(frozen=True)
class Ragged:
    """Lists of token ids, end to end."""

    offsets: np.ndarray
    """int64 `[num_lists + 1]`."""
    ids: np.ndarray
    """int32."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Ragged:
        """From plain lists."""
        import numpy as np

        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return cls(offsets, np.array([token for ids in lists for token in ids], dtype=np.int32))


@dataclass(frozen=True)
class Markers:
    """The ids of all that is inserted, but the ids of chunks."""

    heads: Ragged
    """What stands before chunk 0, 1, ... of rows with markers `NUMBERED`, then the same for `HOPS`."""
    tails: Ragged
    """What stands behind them."""
    signs: np.ndarray
    """int32 `[5]`: of `BACKTRACING_TOKENS`; zeros without backtracing."""


def make_markers(rules: KnotRules, row_tokens: int, info: TokenizerInfo, tokenizer: Any) -> Markers:
    """Look up all markers for rows of this length.

    `tokenizer` is a `tokenizers.Tokenizer`, or None if no text is written. Raises ValueError naming a token that the
    tokenizer lacks.
    """
    import numpy as np

    ids = {token: info.marker(token, "utk") for token in added_tokens(rules)}
    hops = [kind.hop_tokens for kind in rules.knotted if kind.hop_tokens]
    most = max([rules.max_chunks, *(row_tokens // hop + 2 for hop in hops)], default=0)
    digits = [found.ids for found in encode_texts(tokenizer, [str(n) for n in range(most)])] if hops else []

    def table(kind: int, name: str, left: str, right: str) -> list[list[int]]:
        if kind == NUMBERED:
            return [[ids[token]] if (token := f"<|{name}{n}|>") in ids else [] for n in range(most)]
        return [[ids[left], *digits[n], ids[right]] if hops else [] for n in range(most)]

    heads = [table(kind, "head", *HOP_TOKENS[:2]) for kind in (NUMBERED, HOPS)]
    tails = [table(kind, "tail", *HOP_TOKENS[2:]) for kind in (NUMBERED, HOPS)]
    signs = np.array([ids.get(token, 0) for token in BACKTRACING_TOKENS], dtype=np.int32)
    return Markers(Ragged.of(heads[0] + heads[1]), Ragged.of(tails[0] + tails[1]), signs)


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Any]:
    """Encodings (with `ids`) of short ordinary texts."""
    return tokenizer.encode_batch_fast(texts, add_special_tokens=False)


@dataclass(frozen=True)
class Knots:
    """How the documents of some rows are cut and tied. P pieces of the plan, C chunks, R rows.

    Chunks are numbered by row, document and place in the document; so are slots by row and place in the row.
    """

    first_chunks: np.ndarray
    """int64 `[P + 1]`: each document's first chunk."""
    ends: np.ndarray
    """int64 `[C]`: where each chunk ends in its document, in tokens, its separator included."""
    slots: np.ndarray
    """int64 `[C]`: the chunk in each slot, counted from its row's first chunk."""
    characters: np.ndarray
    """uint8 `[C, 6]`: the id of each slot, in places of `ID_ALPHABET`; without backtracing `[C, 0]`."""
    kinds: np.ndarray
    """int64 `[R]`: the row's kind, a place in `row_kinds`."""
    is_cut: np.ndarray
    """bool `[R]`: some document of the row has several chunks."""


def stream_key(*parts: str | int) -> bytes:
    """The key that `seeded_rng` gives to Philox: two 64-bit words."""
    return hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()[:16]


def body_lengths(plan: RowPlan, row_tokens: int) -> np.ndarray:
    """int64 `[P]`: tokens of each document with its separator, unless the row is full without it."""
    import numpy as np

    lengths = plan.num_tokens.astype(np.int64) + plan.is_end
    ends = np.cumsum(lengths)[plan.row_offsets[1:] - 1]
    sums = np.diff(ends, prepend=0)
    lengths[plan.row_offsets[1:][sums >= row_tokens] - 1] -= 1
    return lengths


def draw_knots(rules: KnotRules, keys: Sequence[bytes], row_offsets: np.ndarray, lengths: np.ndarray) -> Knots:
    """Decide everything about rows, one key each, whose documents have these lengths (see `body_lengths`)."""
    import numpy as np

    from ropewalk.stages.data.compiled.knot_draws import draw

    kinds = rules.row_kinds
    hops = np.array([kind.hop_tokens or 0 for kind in kinds], np.int64)
    distributions = [_cumulative(kind.chunk_probabilities or (1.0,)) for kind in kinds]
    sizes = np.array([len(distribution) for distribution in distributions], np.int64)
    # Each document has as many chunks as its most cutting kind can make.
    most = np.zeros(len(lengths), np.int64)
    for hop, size in zip(hops.tolist(), sizes.tolist(), strict=True):
        np.maximum(most, -(-lengths // hop) if hop else np.minimum(lengths, size), out=most)
    room = int(most.sum()) + int(sizes.max())
    first_chunks, ends, slots = (np.empty(size, np.int64) for size in (len(lengths) + 1, room, room))
    num_characters = ID_CHARACTERS if rules.enable_backtracing else 0
    characters = np.zeros((room, num_characters), np.uint8)
    drawn_kinds, is_cut = np.empty(len(keys), np.int64), np.empty(len(keys), np.bool_)
    num_chunks = draw(
        np.frombuffer(b"".join(keys), "<u8").reshape(len(keys), 2),
        row_offsets,
        lengths,
        _cumulative([kind.rows_fraction for kind in kinds]),
        np.concatenate([[0], np.cumsum(sizes)]),
        np.concatenate(distributions),
        hops,
        np.array([kind.arrangement == "turns" for kind in kinds]),
        rules.cuts == "equal",
        rules.preserve_partial_order,
        num_characters,
        len(ID_ALPHABET),
        first_chunks,
        ends,
        slots,
        characters,
        drawn_kinds,
        is_cut,
    )
    return Knots(first_chunks, ends[:num_chunks], slots[:num_chunks], characters[:num_chunks], drawn_kinds, is_cut)


def _cumulative(probabilities: Sequence[float]) -> np.ndarray:
    import numpy as np

    sums = np.cumsum(np.asarray(probabilities, np.float64))
    return sums / sums[-1]


def lay_knots(
    rules: KnotRules,
    knots: Knots,
    plan: RowPlan,
    corpus: Corpus,
    info: TokenizerInfo,
    markers: Markers,
    tokenizer: Any,
    row_tokens: int,
) -> RowBatch:
    """Lay the rows of a plan as these knots say. What markers and ids push over a row's end is cut off.

    Tokens of documents (of a corpus with `targets` only those that are) and separators are targets. None are begin
    token, padding, markers, `<D> id </D>`, `<S>`, and a token that follows a marker, a `</D>` or a `</S>`.
    """
    import numpy as np

    from ropewalk.stages.data.compiled.utk import lay

    num_rows, num_chunks = plan.num_rows, len(knots.ends)
    tables = np.array([_table(kind) for kind in rules.row_kinds], np.int64)[knots.kinds]
    ids = slot_ids(rules, knots, plan, tokenizer) if rules.enable_backtracing else Ragged.of([])
    input_ids = np.empty((num_rows, row_tokens), np.int32)
    loss_mask = np.empty((num_rows, row_tokens), np.bool_)
    offsets, padding = np.empty(num_rows + 1, np.int64), np.empty(num_rows, np.int64)
    documents, tokens, row_starts = (np.empty(num_chunks, np.int32) for _ in range(3))
    starts = np.empty(num_chunks, np.int64)
    lay(
        plan.row_offsets,
        plan.documents,
        plan.starts,
        plan.num_tokens,
        knots.first_chunks,
        knots.ends,
        knots.slots,
        tables,
        markers.heads.offsets,
        markers.heads.ids,
        markers.tails.offsets,
        markers.tails.ids,
        ids.offsets if rules.enable_backtracing else np.zeros(num_chunks + 1, np.int64),
        ids.ids,
        markers.signs,
        corpus.offsets,
        corpus.ids,
        np.zeros(0, np.bool_) if corpus.targets is None else corpus.targets,
        info.bos_token_id,
        info.eos_token_id,
        input_ids,
        loss_mask,
        offsets,
        documents,
        starts,
        tokens,
        row_starts,
        padding,
    )
    end = int(offsets[-1])
    return RowBatch(
        input_ids, loss_mask, offsets, documents[:end], starts[:end], tokens[:end], row_starts[:end], padding
    )


def _table(kind: RowKind) -> int:
    if kind.arrangement == "turns":
        return UNMARKED
    return HOPS if kind.hop_tokens else NUMBERED


def slot_ids(rules: KnotRules, knots: Knots, plan: RowPlan, tokenizer: Any) -> Ragged:
    """The tokens of each slot's id; none where nothing is cut, or documents take turns."""
    import numpy as np

    counts = np.diff(knots.first_chunks)
    row_chunks = np.diff(knots.first_chunks[plan.row_offsets])
    first = np.repeat(knots.first_chunks[plan.row_offsets[:-1]], row_chunks)
    documents = np.repeat(np.arange(len(counts)), counts)[first + knots.slots]
    turns = np.array([kind.arrangement == "turns" for kind in rules.row_kinds])
    named = (counts[documents] > 1) & ~np.repeat(turns[knots.kinds], row_chunks)
    alphabet = np.frombuffer(ID_ALPHABET.encode(), np.uint8)
    letters = np.ascontiguousarray(alphabet[knots.characters[named]])
    texts = letters.view(f"S{ID_CHARACTERS}").reshape(-1).astype(str).tolist()
    encoded = Ragged.of([found.ids for found in encode_texts(tokenizer, texts)])
    sizes = np.zeros(len(named), np.int64)
    sizes[named] = np.diff(encoded.offsets)
    return Ragged(np.concatenate([[0], np.cumsum(sizes)]), encoded.ids)
