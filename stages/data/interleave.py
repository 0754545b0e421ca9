"""NExtLong: a document in chunks, its hard negatives between them (Gao et al., ICML 2025, arXiv 2501.12766).

Reads   slots `tokens` (Tokens) and `neighbours` (Neighbours of the same documents). Deduplicate first: a copy of a
        chunk is no negative, and the paper finds that it hurts.
Writes  Rows (policy `causal`, which the method needs), shuffled by `seed`, and `edges-<unit>.parquet` as `splice` does:
        which document brought in which negative.
Loses   rests of cut documents shorter than `min_remainder_tokens`, the last row if `partial_row="drop"`, rows beyond
        `num_rows`; all counted.

A row is made around one document, the base. It is cut into p chunks, and the row into p equal spans; each span begins
with the next chunk (the paper's best place) and is filled up with what retrieval calls near and no row has yet. So from
one chunk to the next the model reads past a p-th of a row of look-alikes.

    level="chunk"     The paper's. Run `chunk` before `encode` and `neighbours`: each document is then a chunk of at
                      most 2,048 characters, named `<document>#<number>`, and each chunk of the base brings in its own
                      nearest chunks of other documents. Chunks that clustering put elsewhere are used there.
    level="document"  Works on the neighbours that other methods use. Chunks are `chunk_tokens` long, cut anywhere, and
                      all chunks of the base bring in neighbours of the whole document, in turns, the nearest first; of
                      each only the next `chunk_tokens`. The negatives are as hard as the document is near, no more.

Where we differ: the paper retrieves a number of negatives reckoned from the target length times 1.5 and drops samples
that stay short; here a span takes as many as it has room for, the last one cut, so that rows are full. It does not
reuse a negative in a sample; here no token is used twice at all, and what was cut off goes back. Bases are drawn
uniformly among documents of two chunks or more; when none is left, rows are one span (`num_rows_one_chunk`). A base
takes at most `max_base_fraction` of its row. Where retrieval finds nothing unused, a random document follows
(`num_roots` counts them and the bases).

The paper's code could not be read; this follows its section 3 and appendix D.1 as public notes report them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from ropewalk.stages.checks import check_rows
from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.packing.bins import Piece, RowPlan
from ropewalk.stages.data.packing.clusters import link_edges, log_details, map_clusters, retriever_of, walk_details
from ropewalk.stages.data.packing.rows import Corpus
from ropewalk.stages.data.packing.units import finish_rows
from ropewalk.stages.data.packing.walk import Edges, Walk, make_unused
from ropewalk.stages.schema import Record, seeded_rng

if TYPE_CHECKING:
    import numpy as np

    from ropewalk.stages.data.compiled.walk import Unused
    from ropewalk.stages.data.retrieval.pool import Pool

NAME = "nextlong"
VERSION = 1
check = check_rows

ASKED = 32
"""Documents that a masked query is asked for at a time: a base brings in more than its list holds."""


class NextlongConfig(Record):
    """What the rows depend on."""

    row_tokens: int = Field(ge=2)
    """Length of each row, in tokens, the begin token included."""
    seed: int = 0
    """Draws the bases and shuffles the finished rows."""
    level: Literal["document", "chunk"] = "document"
    """What an entry of slot `tokens` is: a document, or a chunk of one made by stage `chunk`."""
    chunk_tokens: int = Field(default=512, ge=1)
    """Level `document`: length of chunks of the base and of negatives. 512 tokens are about the paper's 2,048
    characters, its best of 512 to 32K."""
    max_base_fraction: float = Field(default=0.5, gt=0, lt=1)
    """A base takes at most this share of a row; what is left of it goes back."""
    min_remainder_tokens: int = Field(default=32, ge=1)
    """Shorter rests of cut documents are trimmed away instead of put back. Spans leave shorter rooms to the last."""
    partial_row: Literal["pad", "drop"] = "pad"
    """What becomes of the last row if it is not full."""
    num_rows: int | None = Field(default=None, ge=1)
    """Keep only so many rows, the first after the shuffle. None keeps all."""


class Found(NamedTuple):
    """A document found near another."""

    document: int
    rank: int
    score: float


@dataclass
class Weaver:
    """Makes rows from a pool, one after another."""

    config: NextlongConfig
    pool: Pool
    unused: Unused
    siblings: Mapping[int, list[int]]
    """Level `chunk`: all chunks of the document that a chunk is of, in order."""
    ends: np.ndarray
    """bool `[n]`: a separator follows the last token."""
    bases: deque[int]
    """To be tried in this order."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    edges: list[tuple[int, int, int, int, float]] = field(default_factory=list)
    rows: list[list[Piece]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.capacity = self.config.row_tokens - 1
        self.rests: dict[int, int] = {}
        self.candidates: dict[int, list[Found]] = {}

    def left(self, document: int) -> int:
        """Tokens left of a document."""
        return int(self.unused.lengths[document] - self.unused.starts[document])

    def make_row(self) -> bool:
        """Make a row; False if no document is left."""
        base = self._next_base()
        if base < 0:
            return False
        chunks = self._cut_chunks(base)
        self.counts["num_roots"] += 1
        self.counts["num_rows_one_chunk"] += len(chunks) == 1
        spans = [[chunk] for chunk in chunks]
        self._fill(spans)
        self.rows.append([piece for span in spans for piece in span])
        self._put_back()
        self.candidates.clear()
        return True

    def _next_base(self) -> int:
        """A document of two chunks or more; if there is none any document; -1 if there is none."""
        from ropewalk.stages.data.compiled.walk import draw

        while self.bases:
            base = self.bases.pop()
            if self._has_chunks(base):
                return base
        return int(draw(self.unused))

    def _has_chunks(self, base: int) -> bool:
        if self.config.level == "document":
            return bool(self.unused.mask[base]) and self.left(base) > self.config.chunk_tokens
        return sum(bool(self.unused.mask[chunk]) for chunk in self.siblings[base]) > 1

    def _cut_chunks(self, base: int) -> list[Piece]:
        """Take the base out, and its siblings, of which the row may bring in none. Returns its chunks."""
        most = max(1, int(self.config.max_base_fraction * self.capacity))
        if self.config.level == "document":
            start, stop = int(self.unused.starts[base]), int(self.unused.starts[base]) + min(self.left(base), most)
            step = self.config.chunk_tokens
            places = [(base, begin, min(begin + step, stop)) for begin in range(start, stop, step)]
            return [self._place(*place) for place in places]
        chunks: list[Piece] = []
        for item in [chunk for chunk in self.siblings[base] if self.unused.mask[chunk]]:
            start = int(self.unused.starts[item])
            if chunks and self.left(item) > most:
                most = 0
                self._take(item)
                self.rests[item] = start
            else:
                chunks.append(self._place(item, start, start + min(self.left(item), self.capacity)))
                most -= chunks[-1].num_tokens
        return chunks

    def _place(self, document: int, start: int, stop: int) -> Piece:
        """The piece of a document; what comes behind it is put back after the row."""
        self._take(document)
        length = int(self.unused.lengths[document])
        self.rests.pop(document, None)
        if stop < length:
            self.rests[document] = stop
        return Piece(document, start, stop - start, stop == length and bool(self.ends[document]))

    def _take(self, document: int) -> None:
        from ropewalk.stages.data.compiled.walk import take

        if self.unused.mask[document]:
            take(self.unused, document)

    def _put_back(self) -> None:
        """Put back what is left of the row's documents, if it is worth it."""
        from ropewalk.stages.data.compiled.walk import put_back

        for document, start in self.rests.items():
            left = int(self.unused.lengths[document]) - start
            # What the row has not touched stays whole, however short.
            if left < self.config.min_remainder_tokens and start > self.unused.starts[document]:
                self.counts["num_tokens_trimmed"] += left
                continue
            put_back(self.unused, document, start)
            if self.config.level == "document" and left > self.config.chunk_tokens:
                self.bases.appendleft(document)
        self.rests.clear()

    def _fill(self, spans: list[list[Piece]]) -> None:
        """Fill spans in turns, then the last one up to the row's end."""
        limits = [self.capacity * (place + 1) // len(spans) for place in range(len(spans))]
        rooms = [end - begin - _size(span[0]) for begin, end, span in zip([0, *limits], limits, spans, strict=False)]
        parents = [span[0].document for span in spans]
        turns = list(range(len(spans)))
        while turns:
            for place in list(turns):
                room = min(rooms[place], sum(rooms))
                if room < max(2, self.config.min_remainder_tokens):
                    turns.remove(place)
                elif not self._bring_in(parents[place], spans[place], room, is_last=False):
                    return
                else:
                    rooms[place] -= _size(spans[place][-1])
        room = sum(rooms)
        while room > 0 and self._bring_in(parents[-1], spans[-1], room, is_last=True):
            room -= _size(spans[-1][-1])

    def _bring_in(self, parent: int, span: list[Piece], room: int, *, is_last: bool) -> bool:
        """Append a negative that fits `room`; False if no document is left. Only behind the last no separator must."""
        found = self._nearest(parent)
        if found.document < 0:
            # Only what this row has cut is left.
            self._put_back()
            found = self._nearest(parent)
        if found.document < 0:
            return False
        self.edges.append((len(self.rows), parent, found.document, found.rank, found.score))
        start, left = int(self.unused.starts[found.document]), self.left(found.document)
        taken = min(left, room, self.config.chunk_tokens if self.config.level == "document" else room)
        if not is_last and taken == left == room and self.ends[found.document]:
            taken -= 1
        span.append(self._place(found.document, start, start + taken))
        return True

    def _nearest(self, parent: int) -> Found:
        """The nearest unused document; a random one if there is none; document -1 if none is left."""
        from ropewalk.stages.data.compiled.walk import AT_RANDOM, FROM_QUERY, draw

        self.counts["num_lookups"] += 1
        if parent not in self.candidates:
            listed = zip(self.pool.neighbours[parent].tolist(), self.pool.scores[parent].tolist(), strict=True)
            hits = [Found(other, rank, score) for rank, (other, score) in enumerate(listed) if other >= 0]
            self.candidates[parent] = hits[::-1]
        if (found := self._next_candidate(parent)) is not None:
            return found
        if self.unused.counters[1]:
            self.counts["num_requeries"] += 1
            others, scores = self.pool.requery(parent, ASKED, self.unused.mask)
            answers = zip(others.tolist(), scores.tolist(), strict=True)
            self.candidates[parent] = [Found(other, FROM_QUERY, score) for other, score in answers][::-1]
            if (found := self._next_candidate(parent)) is not None:
                return found
        root = int(draw(self.unused))
        self.counts["num_roots"] += root >= 0
        return Found(root, AT_RANDOM, 0.0)

    def _next_candidate(self, parent: int) -> Found | None:
        left = self.candidates[parent]
        while left:
            found = left.pop()
            if self.unused.mask[found.document]:
                return found
        return None


COUNTS = ("num_roots", "num_lookups", "num_requeries", "num_tokens_trimmed", "num_rows_one_chunk")


def _size(piece: Piece) -> int:
    return piece.num_tokens + piece.is_end


def group_chunks(doc_ids: list[str]) -> list[list[int]]:
    """The chunks of each document, in order. Raises ValueError for an id that stage `chunk` does not make."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for item, doc_id in enumerate(doc_ids):
        name, mark, number = doc_id.rpartition("#")
        if not mark or not number.isdigit():
            raise ValueError(
                f'document {doc_id!r} is no chunk: level="chunk" needs tokens and neighbours of what stage chunk makes'
            )
        found[name].append((int(number), item))
    return [[item for _, item in sorted(chunks)] for chunks in found.values()]


def interleave(config: NextlongConfig, lengths: np.ndarray, pool: Pool, *key: str | int) -> Walk:
    """Plan the rows of a pool whose documents have these lengths, in tokens (int64 `[n]`)."""
    import numpy as np

    unused = make_unused(lengths, np.zeros(len(lengths), np.int64), lengths > 0, *key)
    siblings: dict[int, list[int]] = {}
    ends = np.ones(len(lengths), np.bool_)
    bases = deque(seeded_rng(*key, "bases").permutation(len(lengths)).tolist())
    if config.level == "chunk":
        groups = group_chunks(pool.doc_ids)
        siblings = {item: chunks for chunks in groups for item in chunks}
        ends[[item for chunks in groups for item in chunks[:-1]]] = False
    weaver = Weaver(config, pool, unused, siblings, ends, bases)
    while weaver.make_row():
        pass
    columns: Any = list(zip(*weaver.edges, strict=True)) or [()] * 5
    rows, parents, children, ranks = (np.asarray(column, np.int32) for column in columns[:4])
    edges = Edges(rows, parents, children, ranks, np.asarray(columns[4], np.float32))
    return Walk(RowPlan.from_rows(weaver.rows), counts=weaver.counts, edges=edges)


def make_walk(config: NextlongConfig, corpus: Corpus, pool: Pool, unit: int) -> Walk:
    """Plan the rows of a cluster."""
    return interleave(config, corpus.lengths, pool, config.seed, NAME, unit)


def run(config: NextlongConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Interleave the documents of slot `tokens` with their neighbours of slot `neighbours`."""
    shards, info = map_clusters(context, NAME, config, make_walk, inputs["tokens"], inputs["neighbours"])
    details = {"retriever": retriever_of(inputs["neighbours"]), "level": config.level, **walk_details(shards)}
    log_details(context, details)
    kept = finish_rows(
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
    link_edges(output, shards, kept)
