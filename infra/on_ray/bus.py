"""The way between steps and driver on Ray: events go one way, the wish to stop goes the other.

A process keeps each event until the driver has recorded it, so the bus between them only holds what is on its way.
When it dies, Ray starts it again empty, and every process sends anew what is not confirmed; the numbers of events
keep their order and drop what arrives twice. A bus that never comes back costs only the live view: what a process
still keeps when its work is done goes back to the driver with the result.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ASK_SECONDS = 1.0
"""How often a process asks for orders when it has nothing to report."""
BATCH_SECONDS = 0.05
"""Events of so long travel together: bounds the load on the bus."""
PATIENCE_SECONDS = 10.0

Message = tuple[int, dict[str, Any]]
"""An event and its number: those of one sender increase."""
Put = Callable[[str, str, list[Message]], "tuple[str, int, Orders]"]
"""`EventBus.put`, wherever the bus is. Raises ConnectionError if it cannot be reached."""


@dataclass(frozen=True)
class Orders:
    """What the driver wants of attempts, by attempt name."""

    stop: frozenset[str] = frozenset()
    """To save and return."""
    ended: frozenset[str] = frozenset()
    """Given up: a process that still works for one must not write beside its successor's and ends itself."""


class EventBus:
    """The Ray actor between the processes of steps and the driver."""

    def __init__(self) -> None:
        self._life = uuid.uuid4().hex
        self._boxes: dict[str, list[Message]] = {}
        self._confirmed: Mapping[str, int] = {}
        self._orders = Orders()

    def put(self, sender: str, life: str, messages: list[Message]) -> tuple[str, int, Orders]:
        """Take a process's messages, if it knows that this bus is in this life; it must send anew otherwise.

        Returns the life, the number of the sender's last event that the driver has, and the driver's orders.
        """
        if life == self._life:
            self._boxes.setdefault(sender, []).extend(messages)
        return self._life, self._confirmed.get(sender, -1), self._orders

    def exchange(self, confirmed: Mapping[str, int], orders: Orders) -> dict[str, list[Message]]:
        """Give the driver what it has not confirmed, by sender, and take its confirmations and orders."""
        self._confirmed, self._orders = confirmed, orders
        left = {
            sender: [message for message in messages if message[0] > confirmed.get(sender, -1)]
            for sender, messages in self._boxes.items()
        }
        self._boxes = {sender: messages for sender, messages in left.items() if messages}
        return self._boxes


class Channel:
    """A process's end of the bus. It has a thread of its own: reporting never waits."""

    def __init__(self, put: Put, attempt: str) -> None:
        self.sender = f"{attempt}-{uuid.uuid4().hex[:8]}"
        self._put = put
        self._attempt = attempt
        self._kept: list[Message] = []
        self._carried: dict[str, list[Message]] = {}
        self._number = 0
        self._life, self._sent = "", -1
        self._stop = False
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def report(self, event: dict[str, Any]) -> None:
        """Send an event to the driver. Of progress that has not left yet only the last is kept."""
        with self._lock:
            last = self._kept[-1] if self._kept else (-1, event)
            if event["type"] == last[1]["type"] == "progress" and last[0] > self._sent:
                self._kept.pop()
            self._kept.append((self._number, event))
            self._number += 1
        self._wake.set()

    def cancelled(self) -> bool:
        """Whether the driver wants the attempt to stop."""
        return self._stop

    def carry(self, others: Mapping[str, list[Message]]) -> None:
        """Take along what other processes of the attempt could not send: their results of `close`."""
        self._carried.update(others)

    def close(self) -> dict[str, list[Message]]:
        """Stop sending; returns what the driver has not confirmed, by sender, to go to it by another way."""
        self._closing.set()
        self._wake.set()
        self._thread.join(PATIENCE_SECONDS)
        with self._lock:
            return {self.sender: list(self._kept), **self._carried}

    def _work(self) -> None:
        while not self._closing.is_set():
            self._exchange()
            self._wake.wait(ASK_SECONDS)
            self._closing.wait(BATCH_SECONDS)
            self._wake.clear()

    def _exchange(self) -> None:
        with self._lock:
            messages = [message for message in self._kept if message[0] > self._sent]
            self._sent = messages[-1][0] if messages else self._sent
        try:
            life, confirmed, orders = self._put(self.sender, self._life, messages)
        except ConnectionError:
            self._life = ""  # Whether the messages arrived is unknown.
            return
        with self._lock:
            if life != self._life:
                self._life, self._sent = life, confirmed
                self._wake.set()
            self._kept = [message for message in self._kept if message[0] > confirmed]
        self._stop = self._attempt in orders.stop
        if self._attempt in orders.ended:
            os._exit(1)


def put_on(bus: Any) -> Put:
    """The way to a bus that is a Ray actor."""
    import ray
    from ray.exceptions import RayError

    def put(sender: str, life: str, messages: list[Message]) -> tuple[str, int, Orders]:
        try:
            return ray.get(bus.put.remote(sender, life, messages), timeout=PATIENCE_SECONDS)
        except RayError as error:
            raise ConnectionError(str(error)) from error

    return put


class Inbox:
    """The driver's end: what every sender said, once and in order."""

    def __init__(self) -> None:
        self.confirmed: dict[str, int] = {}

    def accept(self, sender: str, messages: list[Message]) -> Iterator[dict[str, Any]]:
        """The events that are new."""
        for number, event in messages:
            if number > self.confirmed.get(sender, -1):
                self.confirmed[sender] = number
                yield event

    def forget(self, attempt: str) -> None:
        """Drop what is known of an attempt that has ended."""
        self.confirmed = {sender: number for sender, number in self.confirmed.items() if attempt_of(sender) != attempt}


def attempt_of(sender: str) -> str:
    """The attempt that a sender works for."""
    return sender.partition("-")[0]
