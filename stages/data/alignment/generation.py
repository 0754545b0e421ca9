"""Samples made by asking a model: several at a time, results in order, every loss counted.

A sample asks as often as it needs to, one call after another; samples run beside each other in as many threads as the
model takes requests. What they give is written in the order of the samples, with the calls as a table of their own.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ropewalk.stages.context import Context, Output
from ropewalk.stages.data.alignment.calls import Call, Caller, calls_schema
from ropewalk.stages.data.alignment.conversations import Message, RecordWriter
from ropewalk.stages.data.alignment.endpoint import CallFailedError

if TYPE_CHECKING:
    import pyarrow as pa

CALL_REASONS = ("call_failed", "truncated", "filtered", "empty_answer")
"""Why a sample is dropped after a call: it failed for good, or its answer was cut, withheld or blank."""

Sample = TypeVar("Sample")


class DroppedError(Exception):
    """A sample that is dropped, with the reason to count."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Ask:
    """The calls of one sample."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self.calls: list[Call] = []

    def __call__(self, messages: Sequence[Message], attempt: int = 0) -> str:
        """The answer, without white space at its ends.

        Raises DroppedError if it is cut, withheld or blank, and CallFailedError.
        """
        call = self._caller.ask(messages, attempt)
        self.calls.append(call)
        if call.completion.finish_reason == "length":
            raise DroppedError("truncated")
        if call.completion.finish_reason == "content_filter":
            raise DroppedError("filtered")
        if not call.completion.text.strip():
            raise DroppedError("empty_answer")
        return call.completion.text.strip()


Make = Callable[[Any, Ask], dict[str, Any]]
"""Makes the record of a sample. May raise DroppedError and CallFailedError."""


@dataclass(frozen=True)
class Made:
    """What became of a sample."""

    record: dict[str, Any] | None
    calls: list[Call]
    reason: str | None = None
    cause: str = ""


def make_samples(samples: Iterable[Sample], make: Make, caller: Caller) -> Iterator[Made]:
    """Make every sample, in order; so many wait as keep the threads busy."""
    num_threads = caller.backend.num_threads
    waiting: deque[Future[Made]] = deque()
    errors: list[BaseException] = []

    def next_made() -> Made:
        made = waiting.popleft().result()
        if errors:
            raise errors[0]
        return made

    with ThreadPoolExecutor(num_threads, thread_name_prefix="ask") as pool:
        try:
            for sample in samples:
                waiting.append(pool.submit(_make_one, make, sample, caller, errors))
                if len(waiting) > 2 * num_threads:
                    yield next_made()
            while waiting:
                yield next_made()
        finally:
            caller.backend.close()
            for future in waiting:
                future.cancel()


def _make_one(make: Make, sample: Any, caller: Caller, errors: list[BaseException]) -> Made:
    """Make a sample. An error ends the others, too: they may wait for minutes to try again."""
    try:
        return _made(make, sample, caller)
    except BaseException as error:
        errors.append(error)
        caller.backend.close()
        raise


def _made(make: Make, sample: Any, caller: Caller) -> Made:
    ask = Ask(caller)
    try:
        return Made(make(sample, ask), ask.calls)
    except DroppedError as dropped:
        return Made(None, ask.calls, dropped.reason)
    except CallFailedError as failed:
        return Made(None, ask.calls, "call_failed", str(failed))


@dataclass
class SampleWriter:
    """Writes what samples became: a table of records, one of calls, and the counts."""

    output: Output
    name: str
    schema: pa.Schema
    reasons: Sequence[str]
    """Every reason for which the stage may drop a sample."""
    num_samples: int
    """How many there will be."""
    max_failed_fraction: float
    counts: Counter[str] = field(default_factory=Counter)

    def write(self, made: Iterable[Made], context: Context) -> dict[str, int]:
        """Write all of them and return the counts.

        Raises RuntimeError if too many failed, and ValueError if all are lost.
        """
        records = RecordWriter(self.output.data, self.name, self.schema)
        calls = RecordWriter(self.output.data, "calls", calls_schema())
        written: set[bytes] = set()
        for one in made:
            self._count(one)
            if one.record is not None:
                records.write(one.record)
            for call in one.calls:
                if (key := bytes.fromhex(call.key)) not in written:
                    written.add(key)
                    calls.write(call.record())
            context.progress(self.counts["num_in"], self.num_samples, "samples")
        records.close()
        calls.close()
        return self._totals(len(written))

    def _count(self, one: Made) -> None:
        self.counts["num_in"] += 1
        if one.reason is None:
            self.counts["num_kept"] += 1
            return
        if one.reason not in self.reasons:
            raise RuntimeError(f"unknown reason {one.reason!r}")
        self.counts[f"num_dropped_{one.reason}"] += 1
        failed = self.counts["num_dropped_call_failed"]
        if one.reason == "call_failed" and failed > self.max_failed_fraction * self.num_samples:
            raise RuntimeError(
                f"{failed} of {self.num_samples} samples have a call without an answer (the last: {one.cause}), more "
                "than generation.max_failed_fraction allows; a rerun asks only for what is missing"
            )

    def _totals(self, num_calls: int) -> dict[str, int]:
        names = ("num_in", "num_kept", *(f"num_dropped_{reason}" for reason in self.reasons))
        totals = {name: self.counts[name] for name in names}
        if totals["num_in"] != self.num_samples or totals["num_in"] != sum(totals.values()) - totals["num_in"]:
            raise RuntimeError(f"samples lost count: {self.num_samples} expected, {totals}")
        if not totals["num_kept"]:
            raise ValueError(f"no sample is left: {totals}")
        return {**totals, "num_calls": num_calls}


def generate(
    writer: SampleWriter, samples: Iterable[Sample], make: Make, caller: Caller, context: Context
) -> dict[str, int]:
    """Make and write all samples; returns the counts of the artifact. What the calls took goes under observed."""
    started = time.perf_counter()
    try:
        totals = writer.write(make_samples(samples, make, caller), context)
    finally:
        measured: dict[str, float] = {**caller.tally.counts, "seconds": time.perf_counter() - started}
        text = json.dumps(dict(sorted(measured.items())), indent=1)
        (writer.output.observed / "calls.json").write_text(text + "\n")
    context.log({**totals, **measured})
    return totals
