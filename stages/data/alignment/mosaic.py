"""Several unrelated instructions in one, answered together, by rule: Mosaic-IT.

Reads `chats`, and `tokenizer` (a model or tokenizer folder). Writes Chats of one question and one answer; `metadata`
names the chats inside, the rule, and the places that are answered, in the order of the answers.

Method: Mosaic-IT (Li et al., 2024, arXiv 2405.13326; tianyi-lab/Mosaic-IT: mosaic_main.py). The data is shuffled
`num_epochs` times; each time, items are taken in turn: a number is drawn, and so many items are put together while the
whole is shorter than `max_tokens`. What follows begins the next mosaic, so each chat is used once an epoch. A
meta-instruction asks for a form of the answers (`format`), also for an order (`order`), or to leave some out (`mask`);
order and mask are skipped for one item. Answers carry the number of their question. Wording is our own.

Where the code differs, ours: it draws the wording anew whenever an item is added (here once a mosaic), its lists of
orders and omissions end at 50 items (here they do not), and its Pareto draw subtracts 1 from a number that numpy
already has shifted (kept: more mosaics have all items). While items are added, tokens are counted part by part; the
finished text is counted as a whole and made shorter if that should be more.

Lost, counted: chats that are not one question and one answer (`num_dropped_several_turns`); items that are too long
alone (`num_items_dropped_oversize`, in each epoch). Memory: one block of 65,536 items' mosaics a worker; texts lie in
a mapped scratch file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.conversations import (
    SHARD_RECORDS,
    Chat,
    assistant,
    check_chats,
    iterate_chats,
    single_turn,
    user,
)
from ropewalk.stages.data.alignment.meta_instructions import Meta, Strategy, draw_meta
from ropewalk.stages.data.alignment.scratch import map_pile, write_pile
from ropewalk.stages.data.alignment.token_counts import TokenCounter
from ropewalk.stages.schema import (
    Artifact,
    Record,
    chats_schema,
    read_artifact,
    seeded_rng,
    stable_id,
    write_artifact,
    write_shard,
)
from ropewalk.stages.shards import map_shards

if TYPE_CHECKING:
    import numpy as np

NAME = "mosaic"
VERSION = 1
check = check_chats

_STRATEGIES: dict[str, tuple[Strategy, ...]] = {
    "format": ("format",),
    "order": ("format", "order"),
    "mask": ("format", "mask"),
    "all": ("format", "order", "mask"),
}
_ANSWER_SEPARATOR = "\n\n"


class MosaicConfig(Record):
    """How mosaics are put together."""

    num_epochs: int = Field(default=4, ge=1)
    """Shuffles of the data; each uses every chat once."""
    num_items: Literal["uniform", "fixed", "exponential", "pareto", "log_normal", "logistic", "fill"] = "uniform"
    """How many are drawn: uniformly from 1 to `max_items`; always `max_items`; `max_items` less a draw of that
    distribution, rounded down; or as many as fit."""
    max_items: int = Field(default=10, ge=1)
    """Most items of a mosaic. Not for `fill`."""
    max_tokens: int = Field(default=2000, ge=2)
    """A mosaic is shorter than this: tokens of question and answer, those of a chat template not counted."""
    meta_instructions: Literal["format", "order", "mask", "all"] = "all"
    """Strategies, each as likely: format alone; also format with order; with mask; with either."""
    seed: int = 0
    """Shuffles, and draws numbers and wordings."""


@dataclass(frozen=True)
class Item:
    """A chat to put in."""

    sample_id: str
    question: str
    answer: str


def draw_num_items(config: MosaicConfig, rng: np.random.Generator) -> int | None:
    """How many items are wanted; None for as many as fit."""
    if config.num_items == "fill":
        return None
    if config.num_items == "uniform":
        return int(rng.integers(1, config.max_items + 1))
    draws = {
        "fixed": lambda: 0.0,
        "exponential": rng.exponential,
        "pareto": lambda: rng.pareto(1) - 1,
        "log_normal": rng.lognormal,
        "logistic": lambda: rng.logistic(scale=2.0),
    }
    while True:
        drawn = draws[config.num_items]()
        if drawn < config.max_items and (config.num_items != "logistic" or drawn > 0):
            return min(config.max_items, config.max_items - int(drawn))


class MosaicWriter:
    """Puts items together by one draw of the wording."""

    def __init__(self, config: MosaicConfig, meta: Meta, key: tuple[str | int, ...], counter: TokenCounter) -> None:
        self._config, self.meta, self._key, self._counter = config, meta, key, counter

    def take(self, items: Sequence[Item]) -> tuple[list[Item], str, str, list[int]] | None:
        """The first items that together are short enough, their question and answer, and which are answered.

        None if the first alone is too long.
        """
        taken: list[Item] = []
        sizes: list[tuple[int, int]] = []
        for item in items:
            sizes.append(self._sizes(len(taken) + 1, item))
            if self._estimate([*taken, item], sizes) >= self._config.max_tokens:
                break
            taken.append(item)
        while taken:
            question, answer, answered = self.compose(taken)
            if self._counter(question, answer) < self._config.max_tokens:
                return taken, question, answer, answered
            taken.pop()
        return None

    def compose(self, items: Sequence[Item]) -> tuple[str, str, list[int]]:
        """Question, answer, and the places that are answered."""
        questions, ranks = [item.question for item in items], self._ranks(len(items))
        answered = self.meta.answered(questions, ranks)
        shown = self.meta.separator.join(self.meta.question(n, text) for n, text in enumerate(questions, 1))
        answers = [self.meta.answer(place + 1, items[place].answer) for place in answered]
        return self.meta.wrap(shown, questions, ranks), _ANSWER_SEPARATOR.join(answers), answered

    def _ranks(self, num_items: int) -> list[float]:
        # The first numbers of a stream: another item does not change the order of those before it.
        return seeded_rng(*self._key, "ranks").random(num_items).tolist()

    def _sizes(self, number: int, item: Item) -> tuple[int, int]:
        question = self.meta.question(number, item.question) + self.meta.separator
        return self._counter(question), self._counter(self.meta.answer(number, item.answer) + _ANSWER_SEPARATOR)

    def _estimate(self, items: Sequence[Item], sizes: Sequence[tuple[int, int]]) -> int:
        questions, ranks = [item.question for item in items], self._ranks(len(items))
        answered = self.meta.answered(questions, ranks)
        rule = self.meta.wrap("", questions, ranks)
        return self._counter(rule) + sum(size for size, _ in sizes) + sum(sizes[place][1] for place in answered)


def make_mosaics(
    config: MosaicConfig, items: Sequence[Item], counter: TokenCounter, *key: str | int
) -> Iterator[dict[str, Any] | None]:
    """The mosaics of items in order, as records of Chats; None for an item that is too long alone."""
    begin = 0
    while begin < len(items):
        here = (config.seed, NAME, *key, begin)
        rng = seeded_rng(*here)
        wanted = draw_num_items(config, rng)
        writer = MosaicWriter(config, draw_meta(_STRATEGIES[config.meta_instructions], rng), here, counter)
        found = writer.take(items[begin : None if wanted is None else begin + wanted])
        if found is None:
            begin += 1
            yield None
            continue
        taken, question, answer, answered = found
        begin += len(taken)
        yield _record(writer, here, taken, question, answer, answered)


def _record(
    writer: MosaicWriter,
    key: tuple[str | int, ...],
    taken: Sequence[Item],
    question: str,
    answer: str,
    answered: list[int],
) -> dict[str, Any]:
    meta = writer.meta
    rule = {"strategy": meta.strategy, "rule": meta.rule} if len(taken) > 1 else {"strategy": "format", "rule": ""}
    metadata = {"items": [item.sample_id for item in taken], "answered": answered, **rule}
    return Chat(f"{NAME}/{stable_id(*key)}", NAME, [user(question), assistant(answer)], metadata).record()


class BlockBuilder:
    """Makes the mosaics of one block of one epoch after another."""

    def __init__(self, config: MosaicConfig, tokenizer: Path, pile: Path) -> None:
        self._config, self._counter, self._table = config, TokenCounter(tokenizer), map_pile(pile)

    def __call__(self, block: tuple[int, int, int], folder: Path) -> dict[str, int]:
        """Write the mosaics of (shard, epoch, block); returns the counts."""
        import pyarrow as pa

        shard, epoch, number = block
        order = seeded_rng(self._config.seed, NAME, "epoch", epoch).permutation(self._table.num_rows)
        places = order[number * SHARD_RECORDS : (number + 1) * SHARD_RECORDS].tolist()
        counts, records = Counter(num_items_in=len(places)), []
        for record in make_mosaics(self._config, _Items(self._table, places), self._counter, epoch, number):
            counts["num_items_dropped_oversize"] += record is None
            records += [] if record is None else [record]
        counts["num_kept"] = len(records)
        write_shard(folder, "chats", shard, pa.Table.from_pylist(records, schema=chats_schema()))
        return dict(counts)


class _Items(Sequence[Item]):
    """Items of a mapped scratch file, read when they are asked for."""

    def __init__(self, table: Any, places: Sequence[int]) -> None:
        self._table, self._places = table, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _Items(self._table, self._places[place])
        import json

        row = self._places[place]
        question, answer = json.loads(self._table.column("messages")[row].as_py())
        return Item(self._table.column("sample_id")[row].as_py(), question["content"], answer["content"])


def _usable(folder: Path, counts: Counter[str]) -> Iterator[tuple[Chat, int]]:
    for chat in iterate_chats(folder):
        counts["num_in"] += 1
        if single_turn(chat) is None:
            counts["num_dropped_several_turns"] += 1
        else:
            yield chat, 0


def run(config: MosaicConfig, inputs: Mapping[str, Path], output: Output, context: Context) -> None:
    """Write the mosaics of all epochs. Raises ValueError on bad input, or if nothing is left."""
    read_artifact(inputs["chats"], "chats")
    counts: Counter[str] = Counter(num_dropped_several_turns=0, num_items_in=0, num_items_dropped_oversize=0)
    pile = write_pile(context.work, "chats", _usable(inputs["chats"], counts))
    num_usable = counts["num_in"] - counts["num_dropped_several_turns"]
    blocks = [(epoch, block) for epoch in range(config.num_epochs) for block in range(-(-num_usable // SHARD_RECORDS))]
    items = {f"{epoch}-{block}": (shard, epoch, block) for shard, (epoch, block) in enumerate(blocks)}
    for shard in map_shards(context, partial(BlockBuilder, config, inputs["tokenizer"], pile.path), items):
        counts.update(shard.counts)
        shard.link_into(output.data)
    if not counts["num_kept"]:
        raise ValueError(
            f"no mosaic is left: slot chats has {num_usable} chats of one question and one answer, "
            f"and none is shorter than max_tokens {config.max_tokens}"
        )
    if counts["num_items_in"] != num_usable * config.num_epochs:
        raise RuntimeError(f"mosaic lost count: {dict(counts)}")
    counts["num_items_used"] = counts["num_items_in"] - counts["num_items_dropped_oversize"]
    write_artifact(output.data, Artifact(kind="chats", counts=dict(counts)))
    context.log(dict(counts))
