"""A client of any OpenAI-compatible chat endpoint (`POST <url>/chat/completions`).

Where the endpoint is and how patiently it is asked changes no answer, so none of it is in a config or recorded. It
comes from the environment:

    ROPEWALK_CHAT_URL              base URL, such as http://127.0.0.1:8000/v1 (required)
    ROPEWALK_CHAT_KEY              bearer token, if the endpoint wants one
    ROPEWALK_CHAT_THREADS          requests at a time; 8
    ROPEWALK_CHAT_TIMEOUT_SECONDS  of one request; 600
    ROPEWALK_CHAT_ATTEMPTS         tries of one request; 6
    ROPEWALK_CHAT_BACKOFF_SECONDS  before the second try, then twice as long each time, at most 60; 1

Tried again, and counted by cause: 429 and other statuses that pass (408, 409, 425, 5xx), with the server's Retry-After
where it asks for more than the backoff; no connection; no answer in time; an answer that is not the protocol's
(`garbage`). Any other status fails the one call, except those that would fail every call (401, 403, 404), which stop
the step. Nothing of a URL or key is in a message.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ropewalk.stages.schema import Record

_PASSING = {408, 409, 425, 429}
_HOPELESS = {
    401: "check ROPEWALK_CHAT_KEY",
    403: "check ROPEWALK_CHAT_KEY",
    404: "check ROPEWALK_CHAT_URL and generation.model",
}
_MAX_WAIT_SECONDS = 60.0
_MAX_SERVER_WAIT_SECONDS = 600.0


class CallFailedError(Exception):
    """One call has no answer, for good: its sample is dropped and counted."""


class Completion(Record):
    """An answer."""

    text: str
    finish_reason: str
    """`stop`, or `length` where the answer was cut at its greatest length, or what else the endpoint says."""
    num_prompt_tokens: int = 0
    """As the backend counts; 0 if it does not say."""
    num_completion_tokens: int = 0


@dataclass
class Tally:
    """Counts of several threads."""

    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **values: int) -> None:
        """Add to the counts by name."""
        with self._lock:
            self.counts.update(values)


@dataclass(frozen=True)
class EndpointSettings:
    """See the module's docstring."""

    url: str
    key: str | None = None
    num_threads: int = 8
    timeout_seconds: float = 600.0
    num_attempts: int = 6
    backoff_seconds: float = 1.0

    @classmethod
    def from_environment(cls) -> EndpointSettings:
        """Raises ValueError if ROPEWALK_CHAT_URL is missing or a number is none."""
        url = os.environ.get("ROPEWALK_CHAT_URL", "").rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                "generation.model names a model of an endpoint: set ROPEWALK_CHAT_URL to its base URL, such as "
                "http://127.0.0.1:8000/v1, or connect a model to the slot `model` instead"
            )
        return cls(
            url=url,
            key=os.environ.get("ROPEWALK_CHAT_KEY") or None,
            num_threads=cls.threads_from_environment(),
            timeout_seconds=_positive("ROPEWALK_CHAT_TIMEOUT_SECONDS", 600),
            num_attempts=int(_positive("ROPEWALK_CHAT_ATTEMPTS", 6)),
            backoff_seconds=_positive("ROPEWALK_CHAT_BACKOFF_SECONDS", 1),
        )

    @staticmethod
    def threads_from_environment() -> int:
        """Requests at a time. Raises ValueError if it is no number."""
        return int(_positive("ROPEWALK_CHAT_THREADS", 8))


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf) or (name.endswith(("THREADS", "ATTEMPTS")) and value < 1):
        raise ValueError(f"{name} must be a positive number, not {text!r}")
    return value


class _RetryError(Exception):
    def __init__(self, cause: str, wait_seconds: float = 0.0) -> None:
        super().__init__(cause)
        self.cause, self.wait_seconds = cause, wait_seconds


class Endpoint:
    """Answers requests; safe for several threads, each of which has a connection of its own."""

    def __init__(self, settings: EndpointSettings, tally: Tally) -> None:
        self._settings, self._tally = settings, tally
        self._local = threading.local()
        self._stopped = threading.Event()

    @property
    def num_threads(self) -> int:
        """How many requests are wanted at a time."""
        return self._settings.num_threads

    def close(self) -> None:
        """Calls that wait for another try fail at once."""
        self._stopped.set()

    def complete(self, request: dict[str, Any]) -> Completion:
        """The answer to a request of the protocol.

        Raises CallFailedError if this call has none, and ValueError if no call can have one.
        """
        cause = "it was not tried"
        for attempt in range(self._settings.num_attempts):
            if self._stopped.is_set():
                raise CallFailedError("the step was stopped")
            try:
                return self._try(request)
            except _RetryError as retry:
                cause = retry.cause
                self._tally.add(**{f"num_retries_{cause}": 1})
                if attempt + 1 < self._settings.num_attempts:
                    self._wait(attempt, retry.wait_seconds)
        raise CallFailedError(f"{cause} after {self._settings.num_attempts} attempts")

    def _wait(self, attempt: int, at_least: float) -> None:
        backoff = min(self._settings.backoff_seconds * 2**attempt, _MAX_WAIT_SECONDS)
        if self._stopped.wait(max(backoff, at_least)):
            raise CallFailedError("the step was stopped")

    def _try(self, request: dict[str, Any]) -> Completion:
        import requests

        started = time.perf_counter()
        self._tally.add(num_requests=1)
        try:
            response = self._session().post(
                f"{self._settings.url}/chat/completions", json=request, timeout=self._settings.timeout_seconds
            )
        except requests.Timeout:
            raise _RetryError("timeout") from None
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            raise _RetryError("no_connection") from None
        except requests.exceptions.ContentDecodingError:
            raise _RetryError("garbage") from None
        finally:
            self._tally.add(request_milliseconds=round((time.perf_counter() - started) * 1000))
        self._judge(response)
        return _completion(response)

    def _judge(self, response: Any) -> None:
        status = response.status_code
        if status in _HOPELESS:
            raise ValueError(f"the chat endpoint answers {status}: {_HOPELESS[status]}")
        if status in _PASSING or status >= 500:
            raise _RetryError(
                "status_429" if status == 429 else "status_5xx" if status >= 500 else f"status_{status}",
                _retry_after(response),
            )
        if status != 200:
            raise CallFailedError(f"the endpoint answers {status}")

    def _session(self) -> Any:
        import requests

        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            if self._settings.key:
                self._local.session.headers["Authorization"] = f"Bearer {self._settings.key}"
        return self._local.session


def _retry_after(response: Any) -> float:
    """Seconds that the server asks to wait; dates and nonsense count as 0."""
    try:
        seconds = float(response.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), _MAX_SERVER_WAIT_SECONDS) if math.isfinite(seconds) else 0.0


def _completion(response: Any) -> Completion:
    try:
        body = response.json()
        choice = body["choices"][0]
        usage = body.get("usage") or {}
        text = choice["message"]["content"]
        completion = Completion(
            text="" if text is None else text,
            finish_reason=str(choice.get("finish_reason") or "stop"),
            num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
            num_completion_tokens=int(usage.get("completion_tokens") or 0),
        )
        completion.text.encode()
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _RetryError("garbage") from None
    return completion
