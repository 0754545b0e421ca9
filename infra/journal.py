"""Where the events of a run go: into its record, then to whoever shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ropewalk.infra.record import RunRecord
from ropewalk.infra.step import UserError

OnEvent = Callable[[dict[str, Any]], None]


class Journal:
    """Writes the record of a run. Safe to call from several threads, and never raises in the middle of a report.

    A record that cannot be written ends the run, once its loop asks `check`: what nobody can read has not happened.
    """

    def __init__(self, record: RunRecord, on_event: OnEvent) -> None:
        self._record = record
        self._on_event = on_event
        self._error: OSError | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Record an event and pass it on."""
        try:
            event = self._record.append(event)
        except OSError as error:
            self._error = self._error or error
        self._on_event(event)

    def write(self, name: str, document: Any) -> None:
        """Write a JSON file of the record."""
        try:
            self._record.write(name, document)
        except OSError as error:
            self._error = self._error or error

    def close(self) -> None:
        """Close the record."""
        try:
            self._record.close()
        except OSError as error:
            self._error = self._error or error

    def check(self) -> None:
        """Raise UserError if something could not be written."""
        if self._error is not None:
            message = f"the run's record cannot be written: {self._error}; run it again when this is mended"
            raise UserError(message)
