"""Leases: who works on a key at the moment, so that nobody does the same work beside it.

    objects/<key>/leases/<000000>.json   generation n: who holds it. Created exclusively, so one of many takes it
    objects/<key>/leases/<000000>.beat   sign of life, written by the holder alone: a count, or that it was released

A lease saves work and nothing rests on it: that a key is committed once follows from the numbers of commits. It may be
taken over, as the next generation, when it was released, when its holder is a process of this machine that is gone, or
when its count has stood still for its ttl on the watcher's own monotonic clock. Clocks are never compared.

A holder may be given up without knowing it: it was stopped and woken, or its stage let no other thread run for longer
than the ttl. If nobody wanted the lease meanwhile, it goes on. Else the work is done twice, and the output of one of
them is used by both.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from ropewalk.infra.objects import Objects
from ropewalk.infra.process import is_alive, machine, process_start
from ropewalk.infra.step import UserError

DEFAULT_SECONDS = {"ROPEWALK_LEASE_SECONDS": 60.0, "ROPEWALK_GRACE_SECONDS": 20.0}
BEATS_PER_TTL = 4

Report = Callable[[dict[str, Any]], None]

Stamp = tuple[int, int]
"""Generation and count: two looks that find the same saw no sign of life in between. (-1, -1): never leased."""


class LockedError(Exception):
    """Somebody else holds the lease; the message says who."""


class LeaseLostError(Exception):
    """The lease was taken over, or could not be renewed for its ttl: somebody else may be at work."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    attempt: str
    run_id: str
    host: str
    machine: str
    pid: int
    process_started: float | None
    acquired_at: float
    """For people only: nobody compares it with a clock."""
    ttl_seconds: float

    @staticmethod
    def here(attempt: str, run_id: str) -> Holder:
        """This process, for an attempt."""
        pid = os.getpid()
        return Holder(
            attempt, run_id, socket.gethostname(), machine(), pid, process_start(pid), time.time(), ttl_seconds()
        )

    @property
    def is_gone(self) -> bool:
        """Whether its process is known to have ended; False where that cannot be known."""
        return self.machine == machine() and not is_alive(self.pid, self.process_started)

    def __str__(self) -> str:
        return f"run {self.run_id} (process {self.pid} on {self.host})"


@dataclass(frozen=True)
class Sighting:
    """The lease of a key as one look finds it."""

    stamp: Stamp
    holder: Holder | None = None
    released: bool = False

    @property
    def is_free(self) -> bool:
        """Whether it is certain that nobody works under it."""
        return self.holder is None or self.released or self.holder.is_gone


def ttl_seconds() -> float:
    """How long a holder may be silent: `ROPEWALK_LEASE_SECONDS`, 60 by default."""
    return _setting("ROPEWALK_LEASE_SECONDS")


def grace_seconds() -> float:
    """How long a stage may take to save and end once it is asked to: `ROPEWALK_GRACE_SECONDS`, 20 by default."""
    return _setting("ROPEWALK_GRACE_SECONDS")


def settings() -> dict[str, str]:
    """The environment variables above that are set."""
    return {name: os.environ[name] for name in DEFAULT_SECONDS if name in os.environ}


def _setting(name: str) -> float:
    text = os.environ.get(name, str(DEFAULT_SECONDS[name]))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{name}={text}: must be a positive number of seconds")
    return seconds


def look(objects: Objects, key: str) -> Sighting:
    """The lease of a key now. Raises OSError if the store does not answer."""
    generation = _newest(objects, key)
    if generation < 0:
        return Sighting((-1, -1))
    holder = _holder(objects.read(_name(key, generation, "json")))
    try:
        beat = json.loads(objects.read(_name(key, generation, "beat")))
        return Sighting((generation, int(beat["count"])), holder, bool(beat["released"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Sighting((generation, -1), holder)


def holders(objects: Objects, key: str) -> list[Holder]:
    """All that have ever held the lease of a key."""
    names = [name for name in objects.names(f"objects/{key}/leases") if name.endswith(".json")]
    return [_holder(objects.read(f"objects/{key}/leases/{name}")) for name in names]


class Watch:
    """Looks at the lease of one key again and again, and says when it may be taken."""

    def __init__(self, objects: Objects, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._objects = objects
        self._key = key
        self._clock = clock
        self._seen: Stamp | None = None
        self._since = 0.0
        self.holder: Holder | None = None
        """Who held it at the last look."""

    def free(self, ended: Collection[str] = ()) -> Stamp | None:
        """What to give to `acquire`, or None while somebody holds the lease.

        `ended` are attempts that are known to be over, whatever their lease says.
        """
        sighting = look(self._objects, self._key)
        if sighting.stamp != self._seen:
            self._seen, self._since = sighting.stamp, self._clock()
        self.holder = holder = sighting.holder
        if holder is None or sighting.is_free or holder.attempt in ended:
            return sighting.stamp
        return sighting.stamp if self._clock() - self._since >= holder.ttl_seconds else None


class Lease:
    """A lease that this process holds; a thread renews it until `release`."""

    def __init__(
        self, objects: Objects, key: str, generation: int, ttl: float, report: Report, interrupt: Callable[[], None]
    ) -> None:
        self._objects = objects
        self._key = key
        self.generation = generation
        """How many held it before."""
        self._ttl = ttl
        self._report = report
        self._interrupt = interrupt
        self._count = 0
        self._released = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"lease-{key[:8]}", daemon=True)
        self._thread.start()

    def lost(self) -> bool:
        """Whether the lease is known to be lost: stop, somebody else goes on."""
        return self._lost.is_set()

    def is_taken(self) -> bool:
        """Whether somebody else has the lease, as far as the store answers."""
        with contextlib.suppress(OSError, LeaseLostError):
            self.confirm()
        return self.lost()

    def confirm(self) -> None:
        """Raise LeaseLostError unless the lease is still held; asks the store."""
        if self.lost() or not self._newest_is_mine():
            self._lost.set()
            raise LeaseLostError("the lease was lost: this process was silent for too long, and another may be at work")

    def release(self) -> None:
        """Give the lease back. If the store does not take it, the ttl frees it."""
        self._released.set()
        self._thread.join()
        if not self.lost():
            try:
                self._write(released=True)
            except OSError as error:
                self._report({"type": "warning", "text": f"the lease could not be released: {error}"})

    def _work(self) -> None:
        """Renew until released. Once lost, give the work under it some time to end, then end it."""
        renewed = time.monotonic()
        while not self._released.wait(self._ttl / BEATS_PER_TTL):
            try:
                if not self._newest_is_mine():
                    break
                self._count += 1
                self._write(released=False)
                renewed = time.monotonic()
            except OSError as error:
                self._report({"type": "warning", "text": f"the lease could not be renewed: {error}"})
                if time.monotonic() - renewed > self._ttl:
                    break
        if not self._released.is_set():
            self._lost.set()
            self._report({"type": "lease_lost"})
            if not self._released.wait(grace_seconds()):
                self._interrupt()

    def _newest_is_mine(self) -> bool:
        return _newest(self._objects, self._key) == self.generation

    def _write(self, *, released: bool) -> None:
        beat: dict[str, Any] = {"count": self._count, "released": released}
        self._objects.write(_name(self._key, self.generation, "beat"), json.dumps(beat).encode())


def acquire(
    objects: Objects,
    key: str,
    holder: Holder,
    given_up: Stamp | None = None,
    report: Report = lambda event: None,
    interrupt: Callable[[], None] = lambda: None,
) -> Lease:
    """Take the lease of a key.

    Args:
        objects: The store.
        key: What is leased.
        holder: Who takes it.
        given_up: The state of the lease that a `Watch`, perhaps in another process, found to be free.
        report: Takes events from another thread: `warning` when a renewal fails, `lease_lost`.
        interrupt: Called when the work under a lost lease has not ended in time; is to end it by force.

    Raises:
        LockedError: Somebody else holds it.
    """
    sighting = look(objects, key)
    if not sighting.is_free and sighting.stamp != given_up:
        raise LockedError(f"locked by {sighting.holder}")
    generation = sighting.stamp[0] + 1
    if not objects.create(_name(key, generation, "json"), json.dumps(asdict(holder)).encode()):
        raise LockedError(f"locked by {look(objects, key).holder}")
    return Lease(objects, key, generation, holder.ttl_seconds, report, interrupt)


def _newest(objects: Objects, key: str) -> int:
    """The highest generation, -1 if there is none."""
    numbers = [int(name[:-5]) for name in objects.names(f"objects/{key}/leases") if name.endswith(".json")]
    return max(numbers, default=-1)


def _name(key: str, generation: int, kind: str) -> str:
    return f"objects/{key}/leases/{generation:06d}.{kind}"


def _holder(content: bytes) -> Holder:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        # Written by another version, or damaged: it counts as held until it has been silent for the usual time.
        return Holder("", "unknown", "unknown", "", 0, None, 0.0, ttl_seconds())
