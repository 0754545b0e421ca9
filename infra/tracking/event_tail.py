"""Reads a run's `events.jsonl` while it is being written.

A line counts once its newline is there: the last line may still be growing, or have been cut off by a crash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ropewalk.infra.step import UserError

CHUNK_BYTES = 2**22


class EventTail:
    """A position in the file. Memory is bounded by one chunk, not by the length of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._ended: tuple[int, bool] = (0, False)

    def read(self) -> list[dict[str, Any]]:
        """The next events, a chunk at most; empty when there are no new ones or no file yet.

        Raises UserError naming a line that is no JSON.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read(CHUNK_BYTES)
                if b"\n" not in text:
                    text += file.readline()
        except FileNotFoundError:
            return []
        complete, newline, _ = text.rpartition(b"\n")
        events = [self._parse(line) for line in complete.splitlines() if line.strip()]
        self._offset += len(complete) + len(newline)
        return events

    def rewind(self) -> None:
        """Go back to the first event."""
        self._offset = 0

    def first(self) -> dict[str, Any] | None:
        """The first event, None if there is none yet. Raises UserError if it is not `run_started`."""
        try:
            with self.path.open("rb") as file:
                line = file.readline()
        except FileNotFoundError:
            return None
        if not line.endswith(b"\n"):
            return None
        event = self._parse(line)
        if event["type"] != "run_started":
            raise UserError(f"{self.path} begins with {event['type']}, not with run_started: it is no run record")
        return event

    def last(self) -> dict[str, Any] | None:
        """The last complete event, None if there is none yet."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                length = 2**12
                while True:
                    file.seek(max(0, size - length))
                    lines = file.read(size - max(0, size - length)).rpartition(b"\n")[0].split(b"\n")
                    if length >= size or len(lines) > 1:
                        return self._parse(lines[-1]) if lines[-1].strip() else None
                    length *= 4
        except FileNotFoundError:
            return None

    def has_ended(self) -> bool:
        """Whether the last event is `run_finished`. Looks at the file only if it has grown."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._ended[0]:
            last = self.last()
            self._ended = (size, last is not None and last["type"] == "run_finished")
        return self._ended[1]

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            return json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path} has a line that is no JSON ({error}): {line[:80]!r}") from None
