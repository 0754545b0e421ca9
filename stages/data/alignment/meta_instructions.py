"""What a mosaic tells the model to do with its questions, in our own words, and what then is the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

Strategy = Literal["format", "order", "mask"]

_LABELS = ("{n}.", "{n})", "({n})", "[{n}]", "{n}:", "#{n}", "### {n}", "Task {n}:", "Item {n}.", "<{n}>")
_FRAMES = ("[{}]", "<{}>", "<<{}>>", "({})", "|{}|", "**{}**", "=={}==", "#{}#", '"{}"', "@{}@")
_WORDS = (
    ("START", "END"),
    ("BEGIN", "DONE"),
    ("ANSWER", "/ANSWER"),
    ("REPLY", "END OF REPLY"),
    ("OPEN", "CLOSE"),
    ("HEAD", "TAIL"),
    ("first word", "last word"),
    ("from here", "to here"),
)
_FRAMED = (
    "Put {begin} in front of every answer and {end} behind it.",
    "Every answer starts with {begin} and stops with {end}.",
    "Enclose each of your answers: {begin} before it, {end} after it.",
    "Write each answer between {begin} and {end}.",
    "Mark where an answer begins by {begin} and where it ends by {end}.",
    "I will cut your text at {begin} and {end}, so set them around each answer.",
)
_PLAIN = (
    "Answer all of these.",
    "Several tasks follow in one message; deal with each.",
    "Here is more than one request. Reply to every one.",
    "Treat each of the tasks here on its own.",
    "Please take care of everything in this list.",
)
_ORDERS: dict[str, tuple[str, ...]] = {
    "permute": (
        "Answer in this order: {list}.",
        "The sequence of your answers has to be {list}.",
        "Do not go from top to bottom, but like this: {list}.",
    ),
    "reverse": (
        "Answer the last one first and the first one last.",
        "Go through them backwards, from the end to the beginning.",
        "Your answers come in the opposite order of the tasks.",
    ),
    "odd_first": (
        "Answer those with odd numbers first, then those with even numbers.",
        "Take numbers 1, 3, 5 and so on before 2, 4, 6 and so on.",
    ),
    "even_first": (
        "Answer those with even numbers first, then those with odd numbers.",
        "Take numbers 2, 4, 6 and so on before 1, 3, 5 and so on.",
    ),
    "alphabetical": (
        "Sort the tasks by their text as in a dictionary and answer in that order.",
        "The order of the answers is the alphabetical order of the tasks.",
    ),
    "shortest_first": (
        "Begin with the task of the fewest characters and end with that of the most.",
        "Answer by the length of the tasks in characters, shorter ones earlier.",
    ),
    "longest_first": (
        "Begin with the task of the most characters and end with that of the fewest.",
        "Answer by the length of the tasks in characters, longer ones earlier.",
    ),
}
_MASKS: dict[str, tuple[str, ...]] = {
    "listed": (
        "Leave out these numbers: {list}.",
        "Do not answer {list}; answer the rest.",
        "Skip whatever has one of these numbers: {list}.",
    ),
    "odd": ("Skip those with odd numbers.", "Only even numbers get an answer."),
    "even": ("Skip those with even numbers.", "Only odd numbers get an answer."),
    "most_words": (
        "Leave out the {count} with the most words.",
        "Count the words of each task and skip the {count} longest.",
    ),
    "fewest_words": (
        "Leave out the {count} with the fewest words.",
        "Count the words of each task and skip the {count} shortest.",
    ),
}
_LIST_FRAMES = ("{}", "({})", "[{}]", "<{}>", "|{}|")
_LIST_MARKS = (", ", "; ", " - ", " -> ", " ")
_SEPARATORS = ("\n", "\n\n")
MASK_FRACTIONS = (0.1, 0.5)
"""Share of the questions that are left out, drawn uniformly from this range; at least one."""


@dataclass(frozen=True)
class Meta:
    """One draw of everything that a mosaic's wording and rule depend on."""

    strategy: Strategy
    label: str
    """Numbers a question and its answer; holds {n}."""
    tags: tuple[str, str] | None
    """Around each answer."""
    request: str
    """What the model is told about the form."""
    is_request_first: bool
    """Before the questions, or behind them."""
    rule: str
    """Which order or which omission; "" for format."""
    rule_text: str
    """Its wording, with {list} or {count}."""
    is_rule_first: bool
    """Before all else, or behind all else."""
    mask_fraction: float
    list_frame: str
    list_mark: str
    separator: str
    """Between questions."""

    def question(self, number: int, text: str) -> str:
        """A question as the mosaic shows it; `number` counts from 1."""
        return f"{self.label.replace('{n}', str(number))} {text}"

    def answer(self, number: int, text: str) -> str:
        """Its answer: the label again, and the tags."""
        begin, end = self.tags or ("", "")
        return f"{self.label.replace('{n}', str(number))} {begin}{text}{end}"

    def answered(self, questions: Sequence[str], ranks: Sequence[float]) -> list[int]:
        """Places of the questions to answer, in order. `ranks` is a random number for each, which permutes."""
        if self.strategy == "format" or len(questions) < 2:
            return list(range(len(questions)))
        if self.strategy == "order":
            return _ordered(self.rule, questions, ranks)
        left_out = set(self.left_out(questions, ranks))
        return [place for place in range(len(questions)) if place not in left_out]

    def left_out(self, questions: Sequence[str], ranks: Sequence[float]) -> list[int]:
        """Places of the questions that `mask` skips, ascending; at least one and never all of two or more."""
        places = range(len(questions))
        if self.rule in ("odd", "even"):
            return [place for place in places if (place % 2 == 0) == (self.rule == "odd")]
        count = max(1, int(len(questions) * self.mask_fraction))
        words = [len(text.split()) for text in questions]
        keys: dict[str, Callable[[int], float]] = {
            "listed": lambda place: ranks[place],
            "most_words": lambda place: -words[place],
            "fewest_words": lambda place: words[place],
        }
        return sorted(sorted(places, key=keys[self.rule])[:count])

    def wrap(self, shown: str, questions: Sequence[str], ranks: Sequence[float]) -> str:
        """The whole request: the joined questions `shown` with what is asked of them."""
        parts = [self.request, shown] if self.is_request_first else [shown, self.request]
        if self.strategy != "format" and len(questions) > 1:
            rule = self._rule(questions, ranks)
            parts = [rule, *parts] if self.is_rule_first else [*parts, rule]
        return "\n\n".join(parts)

    def _rule(self, questions: Sequence[str], ranks: Sequence[float]) -> str:
        named = self.answered if self.strategy == "order" else self.left_out
        places = named(questions, ranks)
        numbers = self.list_frame.format(self.list_mark.join(str(place + 1) for place in places))
        return self.rule_text.replace("{list}", numbers).replace("{count}", str(len(places)))


def draw_meta(strategies: Sequence[Strategy], rng: np.random.Generator) -> Meta:
    """Draw a strategy and its wording, each possibility alike."""

    def one_of(things: Sequence[str]) -> str:
        return things[int(rng.integers(len(things)))]

    strategy: Strategy = strategies[int(rng.integers(len(strategies)))]
    label, frame = one_of(_LABELS), one_of(_FRAMES)
    begin, end = _WORDS[int(rng.integers(len(_WORDS)))]
    framed, plain = one_of(_FRAMED), one_of(_PLAIN)
    tags = (frame.format(begin), frame.format(end)) if rng.random() < 0.5 else None
    rules = {"format": {"": ("",)}, "order": _ORDERS, "mask": _MASKS}[strategy]
    rule = one_of(sorted(rules))
    return Meta(
        strategy=strategy,
        label=label,
        tags=tags,
        request=framed.replace("{begin}", tags[0]).replace("{end}", tags[1]) if tags else plain,
        is_request_first=bool(rng.random() < 0.5),
        rule=rule,
        rule_text=one_of(rules[rule]),
        is_rule_first=bool(rng.random() < 0.5),
        mask_fraction=float(rng.uniform(*MASK_FRACTIONS)),
        list_frame=one_of(_LIST_FRAMES),
        list_mark=one_of(_LIST_MARKS),
        separator=one_of(_SEPARATORS),
    )


def _ordered(rule: str, questions: Sequence[str], ranks: Sequence[float]) -> list[int]:
    keys: dict[str, Callable[[int], object]] = {
        "permute": lambda place: ranks[place],
        "reverse": lambda place: -place,
        "odd_first": lambda place: place % 2,
        "even_first": lambda place: -(place % 2),
        "alphabetical": lambda place: questions[place].casefold(),
        "shortest_first": lambda place: len(questions[place]),
        "longest_first": lambda place: -len(questions[place]),
    }
    key: Callable[[int], object] = keys[rule]
    return sorted(range(len(questions)), key=key)  # type: ignore[arg-type]  # Each rule's keys are of one type.
