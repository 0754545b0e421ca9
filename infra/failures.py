"""What kind of failure an error is, and whether and when its step is tried again.

An error that the same input would bring again (a wrong value, a full disk, too little memory) is the user's; one that
comes from the machines (a dead worker, a lost node, a network that does not answer) is worth another try. Errors of
libraries that are not loaded here are known by the names of their classes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from ropewalk.infra.step import Retries

Kind = Literal["committed", "user", "infrastructure", "preempted", "timeout", "cancelled", "locked", "lease lost"]
"""How an attempt ended."""

_NETWORK_ERRNOS = {
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.ENETDOWN, errno.ENETRESET, errno.EHOSTDOWN, errno.EPIPE, errno.ESTALE, errno.EIO, errno.EREMOTEIO,
}  # fmt: skip
_MEMORY = {"MemoryError", "OutOfMemoryError"}
_MACHINES = {
    # Ray: a process or node is gone, or the way to it.
    "WorkerCrashedError", "NodeDiedError", "RayActorError", "ObjectLostError", "RaySystemError",
    "LocalRayletDiedError", "RpcError", "ObjectStoreFullError", "RuntimeEnvSetupError", "WorkerHealthCheckFailedError",
    # torch.distributed and multiprocessing: a peer is gone.
    "DistBackendError", "DistNetworkError", "DistStoreError", "BrokenProcessPool",
}  # fmt: skip
_NO_ANSWER = re.compile(r"Timeout|Connect(ion)?Error|ProtocolError|IncompleteRead|Throttl")


def classify(error: BaseException) -> Kind:
    """What kind of failure an error is, judged by the error and what it was raised from."""
    for each in _chain(error):
        kind = _kind_of(each)
        if kind is not None:
            return kind
    return "user"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what caused it; of Ray's wrapped errors what was raised in the worker."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__


def _kind_of(error: BaseException) -> Kind | None:
    """The kind that this one error tells; None if it says nothing of its own."""
    names = {each.__name__ for each in type(error).__mro__}
    if isinstance(error, KeyboardInterrupt) or names & {"TaskCancelledError", "CancelledError"}:
        return "cancelled"
    if "PreemptionError" in names or getattr(error, "preempted", False) is True:
        return "preempted"
    if names & _MEMORY or "out of memory" in str(error).lower():
        return "user"
    if names & _MACHINES:
        return "infrastructure"
    status = _http_status(error)
    if status is not None:
        return "infrastructure" if status >= 500 or status in (408, 425, 429) else "user"
    if isinstance(error, (TimeoutError, ConnectionError)) or any(map(_NO_ANSWER.search, names)):
        return "infrastructure"
    if isinstance(error, OSError) and error.errno is not None:
        return "infrastructure" if error.errno in _NETWORK_ERRNOS else "user"
    return "user" if isinstance(error, (ValueError, TypeError, LookupError, ArithmeticError)) else None


def _http_status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    for owner, name in ((error, "status_code"), (error, "status"), (error, "code"), (response, "status_code")):
        value = getattr(owner, name, None)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


@dataclass
class Tries:
    """How often a step was tried in a run. Preemptions have a count and a limit of their own."""

    retries: Retries
    random: Random
    failed: int = 0
    preempted: int = 0

    def again_in(self, kind: Kind) -> float | None:
        """Count a failed attempt; returns the seconds until the next one, None if there is none.

        The wait doubles from one failure to the next up to the cap, less a random part of up to one half, so that
        steps that failed together do not come back together.
        """
        if kind == "preempted":
            self.preempted += 1
            number, left = self.preempted, self.preempted <= self.retries.max_preemptions
        else:
            self.failed += 1
            number, left = (
                self.failed,
                kind in ("infrastructure", "timeout") and self.failed < self.retries.max_attempts,
            )
        if not left:
            return None
        whole = min(self.retries.backoff_cap_seconds, self.retries.backoff_seconds * 2.0 ** min(number - 1, 60))
        return whole * (1 - self.random.random() / 2)
