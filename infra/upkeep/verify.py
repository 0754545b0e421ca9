"""Checks committed outputs against their manifests, and lets those that are damaged be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ropewalk.infra.artifact import Commit, StoreError
from ropewalk.infra.store import Store

DAMAGED = "damage"
"""Who withdraws a damaged commit."""

OnCommit = Callable[[int, int], None]
"""Called after each commit with how many are done and how many there are."""
OnRead = Callable[[int], None]
"""Called with the bytes of each file whose content was compared."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one commit."""

    key: str
    number: int
    step: str | None
    uri: str
    status: Literal["SOUND", "CORRUPT", "WITHDRAWN"]
    problems: tuple[str, ...] = ()
    num_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """As `verify --json` shows it."""
        return {
            "key": self.key,
            "commit": self.number,
            "step": self.step,
            "uri": self.uri,
            "status": self.status,
            "problems": list(self.problems),
        }


def verify(
    store: Store,
    keys: Iterable[str],
    *,
    deep: bool,
    repair: bool,
    on_commit: OnCommit = lambda done, total: None,
    on_read: OnRead = lambda num_bytes: None,
) -> list[Verdict]:
    """Check every commit of the keys.

    Args:
        store: Where they are.
        keys: Which.
        deep: Compare contents, not only sizes.
        repair: Withdraw what is corrupt, so that the next run makes it again and nothing that is sound.
        on_commit: Takes the progress in commits.
        on_read: Takes the progress in bytes.
    """
    numbered = [(key, number) for key in keys for number in store.numbers(key)]
    verdicts = []
    for done, (key, number) in enumerate(numbered, 1):
        verdict = _check(store, key, number, deep=deep, on_read=on_read)
        if repair and verdict.status == "CORRUPT":
            store.withdraw(key, number, DAMAGED, "; ".join(verdict.problems))
        verdicts.append(verdict)
        on_commit(done, len(numbered))
    return verdicts


def _check(store: Store, key: str, number: int, *, deep: bool, on_read: OnRead) -> Verdict:
    try:
        commit = store.read_commit(key, number)
    except StoreError as error:
        uri = f"{store.uri}/objects/{key}/commits/{number:06d}.json"
        status = "WITHDRAWN" if store.is_withdrawn(key, number) else "CORRUPT"
        return Verdict(key, number, None, uri, status, (str(error),))
    if store.is_withdrawn(key, number):
        return _verdict(commit, "WITHDRAWN", [])
    problems = store.problems(commit, deep=deep, on_read=on_read)
    return _verdict(commit, "CORRUPT" if problems else "SOUND", problems)


def _verdict(commit: Commit, status: Literal["SOUND", "CORRUPT", "WITHDRAWN"], problems: list[str]) -> Verdict:
    step = commit.record.get("step")
    return Verdict(commit.key, commit.number, step, commit.uri, status, tuple(problems), commit.num_bytes)
