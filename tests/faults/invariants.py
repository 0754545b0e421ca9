"""What must hold of a store whatever happened to its drivers. Each function lists what is broken, in words."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ropewalk.infra import lease
from ropewalk.infra.store import Store, StoreError

SLACK_SECONDS = 5.0
"""Between the last look for a commit and the journal's line of an execution, a process may be stopped for a while."""


def broken_commits(store: Store, more: Mapping[str, int] | None = None, unsound: Collection[str] = ()) -> Iterator[str]:
    """Numbers without gaps, one commit a key, and every byte of the latest one as it was committed.

    Args:
        store: The store.
        more: How many more commits a key may have had: each time that it was forced, damaged or collected is one.
        unsound: Keys that were damaged and not made again yet.
    """
    for key in store.objects.names("objects"):
        numbers = store.numbers(key)
        withdrawn = [int(name.partition(".")[0]) for name in store.objects.names(f"objects/{key}/withdrawn")]
        # Garbage collection removes a commit, but what says that it was withdrawn stays.
        if sorted({*numbers, *withdrawn}) != list(range(len({*numbers, *withdrawn}))):
            yield f"{key}: commits are numbered {numbers}, withdrawn are {withdrawn}"
        made, allowed = max((*numbers, *withdrawn), default=-1) + 1, 1 + (more or {}).get(key, 0)
        if made > allowed:
            yield f"{key}: {made} commits were made, {allowed} are accounted for"
        try:
            commit, problems = store.latest(key)
        except StoreError as error:
            yield f"{key}: {error}"
            continue
        if commit is not None and commit.number in withdrawn:
            yield f"{key}: commit {commit.number} counts though it was withdrawn"
        if set(numbers) - set(withdrawn) and key not in unsound:
            problems = store.problems(commit, deep=True) if commit else [*problems, "no commit is valid"]
            yield from (f"{key}: {problem}" for problem in problems)


def broken_leases(store: Store, *, drivers_ended: bool) -> Iterator[str]:
    """Generations without gaps and of different attempts; commits in the order of generations; none live at the end."""
    for key in store.objects.names("objects"):
        names = [name for name in store.objects.names(f"objects/{key}/leases") if name.endswith(".json")]
        generations = [int(Path(name).stem) for name in names]
        if generations != list(range(len(generations))):
            yield f"{key}: lease generations {generations}"
        holders = [json.loads(store.objects.read(f"objects/{key}/leases/{name}"))["attempt"] for name in names]
        if len(set(holders)) < len(holders):
            yield f"{key}: one attempt holds two generations"
        if drivers_ended and not lease.look(store.objects, key).is_free:
            yield f"{key}: its lease is held though no driver is left"
        by_attempt = {attempt: generation for generation, attempt in enumerate(holders)}
        committers = [_attempt_of(store, key, name) for name in store.objects.names(f"objects/{key}/commits")]
        order = [by_attempt.get(attempt) for attempt in committers if attempt is not None]
        if None in order or order != sorted(set(order)):
            yield f"{key}: commits were made under the generations {order}"


def repeated_work(store: Store, journal: Path, *, excused: Collection[str]) -> Iterator[str]:
    """No execution of a key begins after the key was committed."""
    for entry in read_journal(journal):
        key = entry["key"]
        if entry["what"] != "began" or key in excused:
            continue
        commit, _ = store.latest(key)
        if commit and entry["time"] > commit.record["committed_at"] + SLACK_SECONDS:
            late = entry["time"] - commit.record["committed_at"]
            yield f"{key}: attempt {entry['attempt']} began {late:.1f} s after the commit"


def lost_work(journal: Path, *, excused: Collection[str]) -> Iterator[str]:
    """What an execution of a key has kept in its scratch folder is found by every one that begins later.

    Not for an object store, to which the folder is copied every few seconds.
    """
    kept: dict[str, set[int]] = {}
    for entry in sorted(read_journal(journal), key=lambda entry: entry["time"]):
        before = kept.setdefault(entry["key"], set())
        if entry["what"] == "kept":
            before.add(entry["part"])
        elif entry["what"] == "began" and entry["key"] not in excused and not before <= set(entry["found"]):
            missing = sorted(before - set(entry["found"]))
            yield f"{entry['key']}: attempt {entry['attempt']} did not find the parts {missing} of earlier ones"


def broken_records(store: Store) -> Iterator[str]:
    """Every run's events can be read and are numbered from zero; only the last line may be torn."""
    for run in sorted((store.root / "runs").glob("*")):
        path = run / "events.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        for number, line in enumerate(lines[:-1]):
            try:
                sequence = json.loads(line)["seq"]
            except (ValueError, KeyError):
                yield f"{path}:{number + 1} cannot be read: {line[:80]!r}"
                break
            if sequence != number:
                yield f"{path}:{number + 1} has seq {sequence}"
                break


def lost_commits(store: Store, *, excused: Collection[str]) -> Iterator[str]:
    """What a run has recorded as its own output is committed, under the name of its attempt: nobody replaced it."""
    for run in sorted((store.root / "runs").glob("*/events.jsonl")):
        for line in run.read_text(encoding="utf-8").split("\n")[:-1]:
            event = json.loads(line)
            if event["type"] == "step_succeeded" and event["key"] not in excused:
                names = store.objects.names(f"objects/{event['key']}/commits")
                if event["attempt"] not in [_attempt_of(store, event["key"], name) for name in names]:
                    yield f"{event['key']}: the commit of attempt {event['attempt']} is gone, {run} tells of it"


def wrong_digests(found: Mapping[str, str | None], expected: Mapping[str, str | None]) -> Iterator[str]:
    """Every step's output is that of an undisturbed run."""
    for step in sorted(expected.keys() | found.keys()):
        if found.get(step) != expected.get(step):
            yield f"{step}: digest {found.get(step)}, undisturbed {expected.get(step)}"


def processes_with(variable: str, value: str) -> list[int]:
    """Living processes that inherited an environment variable with this value."""
    wanted = f"{variable}={value}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
                alive = (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
            if wanted in environment and alive:
                found.append(int(folder.name))
    return found


def read_journal(journal: Path) -> list[dict[str, Any]]:
    """What the stages of random_pipelines.py wrote of their executions."""
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def _attempt_of(store: Store, key: str, name: str) -> str | None:
    """The attempt that a commit names; None if the commit was damaged."""
    try:
        return json.loads(store.objects.read(f"objects/{key}/commits/{name}"))["attempt"]
    except (ValueError, KeyError):
        return None
