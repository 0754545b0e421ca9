"""MLflow's own client, with faults before or after some of its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Faulty:
    """MLflow's client with a fault before or after some of its calls, counted from 1; everything else is real."""

    def __init__(self, client: Any, fault: BaseException | None, *at: int, after: bool = False) -> None:
        self._client, self._fault, self._at, self._after = client, fault, at, after
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            number = self.calls
            if self._fault and number in self._at and not self._after:
                raise self._fault
            answer = method(*arguments, **named)
            if self._fault and number in self._at:
                raise self._fault
            return answer

        return call


class Interrupted:
    """MLflow's client; before call number `at`, counted from 1, something else happens."""

    def __init__(self, client: Any, happens: Callable[[], None], at: int) -> None:
        self._client, self._happens, self._at = client, happens, at
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                self._happens()
            return method(*arguments, **named)

        return call


class Killed(BaseException):
    """Stands for the process being killed: nothing catches it."""
