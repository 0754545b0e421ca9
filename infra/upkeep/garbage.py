"""Garbage collection: removes what no kept run uses, and never what a run relies on.

Kept are the outputs that the last runs of each pipeline used or made, those of runs that may still be under way, and
those of pinned runs (`pins/<run id>.json`). MLflow has no say. The unit is the attempt, committed or not.

It takes two calls, a grace period apart. The first leaves a tombstone (`objects/<key>/tombstones/<attempt>.json`).
A later one withdraws the commit, looks at what is used again, and only then removes it: the commit first, then the
data. A run that reuses an output records the use, lifts the tombstone, and then looks whether the commit was
withdrawn (`Store.keep`). Whoever comes second of the two sees the other: no run loses an input, whatever the clocks
say and however many collect at once. What is not committed is removed under the lease of its key.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ropewalk.infra import lease, record
from ropewalk.infra.lease import Holder, LockedError
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store, StoreError, new_attempt_name

REASON = "no kept run used it: garbage collection removed it"
UNKNOWN_RUN_DAYS = 7
"""A run of another machine that has recorded nothing for so long has ended."""
TAIL_BYTES = 1 << 16
WORK = "work"
"""Stands for the scratch folder of a key where the others have the name of an attempt."""

State = Literal["found", "waiting", "due", "removed", "in use"]


@dataclass(frozen=True)
class Policy:
    """What is kept, and for how long what is not."""

    keep_runs: int = 10
    """Of each pipeline, the newest."""
    grace_seconds: float = 24 * 3600.0


@dataclass(frozen=True)
class Roots:
    """What kept runs use."""

    runs: frozenset[str]
    keys: frozenset[str]
    attempts: frozenset[str]


@dataclass(frozen=True)
class Garbage:
    """An attempt, or a scratch folder, that nothing needs."""

    key: str
    attempt: str
    number: int | None
    """Of its commit."""
    reason: str
    num_bytes: int
    stamp: lease.Stamp
    """Of the key's lease: whoever holds it and stays silent until the removal is gone."""
    state: State = "found"

    def to_json(self) -> dict[str, Any]:
        """As `gc --json` shows it."""
        names = {"key": self.key, "attempt": self.attempt, "commit": self.number}
        return {**names, "reason": self.reason, "num_bytes": self.num_bytes, "state": self.state}


def collect(
    store: Store,
    policy: Policy,
    *,
    act: bool,
    clock: Callable[[], float] = time.time,
    before_removal: Callable[[], None] = lambda: None,
) -> list[Garbage]:
    """Find garbage; with `act`, mark what is new and remove what was marked a grace period ago.

    Args:
        store: What to clean.
        policy: What is kept.
        act: Whether to do anything but look.
        clock: Seconds since 1970.
        before_removal: Called between the marks and the removal; for tests.
    """
    found = list(find(store, find_roots(store, policy)))
    found = [replace(item, state=_state(store, item, policy, clock())) for item in found]
    if not act:
        return found
    by = f"gc{uuid.uuid4().hex}"
    for item in found:
        if item.state == "found":
            store.objects.write(_tombstone(item), json.dumps({"at": clock(), "stamp": item.stamp}).encode())
        elif item.state == "due" and item.number is not None:
            store.withdraw(item.key, item.number, by, REASON)
    before_removal()
    removed = _remove([item for item in found if item.state == "due"], store, policy, by)
    return [removed.get((item.key, item.attempt), item) for item in found]


def pin(store: Store, run_id: str, *, pinned: bool) -> None:
    """Keep the outputs of a run for ever, or no longer."""
    record.read_run(store, run_id)
    if pinned:
        store.objects.write(f"pins/{run_id}.json", json.dumps({"at": time.time()}).encode())
    else:
        store.objects.remove(f"pins/{run_id}.json")


def find_roots(store: Store, policy: Policy) -> Roots:
    """What is used, as the records of runs say at this moment."""
    store.pull_runs(at_once=True)
    runs = kept_runs(store, policy)
    keys, attempts = set(), set()
    for run_id in runs:
        for kind in ("steps", "failures"):
            for path in (store.root / "runs" / run_id / kind).glob("*.json"):
                document = _read_record(path)
                keys.add(document["key"])
                if match := re.search(r"/attempts/([^/]+)/data$", document.get("uri", "")):
                    attempts.add(match[1])
    return Roots(frozenset(runs), frozenset(keys), frozenset(attempts))


def _read_record(path: Path) -> dict[str, Any]:
    """A file of a run's record. Raises UserError if it cannot be read: what the run uses is then unknown."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.keys() & {"key", "pipeline"}:
            return document
        problem = "it is not what a run records"
    except (OSError, ValueError) as error:
        problem = str(error)
    raise UserError(
        f"{path} cannot be read ({problem}), so what its run uses is not known and nothing was removed;"
        " if nobody needs that run, remove its folder from runs/"
    )


def kept_runs(store: Store, policy: Policy) -> list[str]:
    """The runs whose outputs are kept, newest first."""
    pinned = {name.removesuffix(".json") for name in store.objects.names("pins")}
    seen: dict[str, int] = {}
    kept = []
    for run_id in record.run_ids(store):
        run = _read_record(store.root / "runs" / run_id / "run.json")
        seen[run["pipeline"]] = seen.get(run["pipeline"], 0) + 1
        if seen[run["pipeline"]] <= policy.keep_runs or run_id in pinned or _may_run(store, run_id, run):
            kept.append(run_id)
    return kept


def drop_runs(store: Store, policy: Policy, *, act: bool) -> list[str]:
    """The runs that are not kept; with `act`, their records are removed."""
    kept = set(kept_runs(store, policy))
    dropped = [run_id for run_id in record.run_ids(store) if run_id not in kept]
    for run_id in dropped if act else []:
        store.objects.remove(f"runs/{run_id}")
        shutil.rmtree(store.root / "runs" / run_id, ignore_errors=True)
    return dropped


def find(store: Store, roots: Roots) -> Iterator[Garbage]:
    """All that nothing needs, given what is used."""
    working = set(store.objects.names("work"))
    for key in sorted({*store.known_keys(), *working}):
        yield from _find_in(store, key, roots, has_work=key in working)


def _find_in(store: Store, key: str, roots: Roots, *, has_work: bool) -> Iterator[Garbage]:
    folder = f"objects/{key}/attempts"
    attempts = store.objects.names(folder)
    if not attempts and not has_work:
        return
    committed = _committed(store, key)
    reachable = key in roots.keys or bool(_workers(store, key) & roots.runs)
    latest = store.latest(key)[0] if reachable and committed else None
    stamp = lease.look(store.objects, key).stamp
    needed = roots.attempts | ({latest.attempt.name} if latest else set())
    for attempt in attempts:
        if attempt in needed:
            continue
        number = committed.get(attempt)
        reason = "never committed" if number is None else "superseded" if reachable else "no kept run uses it"
        num_bytes = sum(store.objects.sizes(f"{folder}/{attempt}").values())
        yield Garbage(key, attempt, number, reason, num_bytes, stamp)
    if has_work and (latest or not reachable):
        num_bytes = sum(store.objects.sizes(f"work/{key}").values())
        yield Garbage(key, WORK, None, "scratch that nobody will go on from", num_bytes, stamp)


def _committed(store: Store, key: str) -> dict[str, int]:
    """Numbers of the commits that can be read, by attempt."""
    found: dict[str, int] = {}
    for number in store.numbers(key):
        with contextlib.suppress(StoreError):
            found[store.read_commit(key, number).attempt.name] = number
    return found


def _workers(store: Store, key: str) -> set[str]:
    """Ids of the runs that have ever worked on a key."""
    return {holder.run_id for holder in lease.holders(store.objects, key)}


def _state(store: Store, item: Garbage, policy: Policy, now: float) -> State:
    try:
        tombstone = json.loads(store.objects.read(_tombstone(item)))
        marked_at, stamp = float(tombstone["at"]), tombstone["stamp"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return "found"
    wait = policy.grace_seconds
    if item.number is None:
        if stamp != list(item.stamp):
            return "found"  # Somebody was at work since then; the time begins anew.
        holder = lease.look(store.objects, item.key).holder
        # That a holder is gone is known after its ttl of silence.
        wait = max(wait, holder.ttl_seconds if holder else 0.0)
    return "due" if now - marked_at >= wait else "waiting"


def _remove(due: list[Garbage], store: Store, policy: Policy, by: str) -> dict[tuple[str, str], Garbage]:
    """Remove what is due and, after another look, still garbage with its tombstone in place."""
    done: dict[tuple[str, str], Garbage] = {}
    if not due:
        return done
    roots, working = find_roots(store, policy), set(store.objects.names("work"))
    for key in sorted({item.key for item in due}):
        still = {item.attempt: item for item in _find_in(store, key, roots, has_work=key in working)}
        mine = [item for item in due if item.key == key]
        marked = set(store.objects.names(f"objects/{key}/tombstones"))
        for item in mine:
            unused = item.attempt in still and f"{item.attempt}.json" in marked
            removed = unused and _remove_from(store, key, item)
            done[key, item.attempt] = replace(item, state="removed" if removed else "in use")
            if not removed:
                store.objects.remove(_tombstone(item))
                if item.number is not None:
                    store.reinstate(key, item.number, by)
    return done


def _remove_from(store: Store, key: str, item: Garbage) -> bool:
    """Remove one item of a key; False if somebody works on it."""
    if item.number is not None:
        store.objects.remove(f"objects/{key}/commits/{item.number:06d}.json")
        store.drop_attempt(key, item.attempt)
    else:
        try:
            held = lease.acquire(store.objects, key, Holder.here(new_attempt_name(), "gc"), item.stamp)
        except LockedError:
            return False
        try:
            store.drop_work(key) if item.attempt == WORK else store.drop_attempt(key, item.attempt)
        finally:
            held.release()
    store.objects.remove(_tombstone(item))
    return True


def _may_run(store: Store, run_id: str, run: dict[str, Any]) -> bool:
    """Whether a run may still be under way."""
    path = store.root / "runs" / run_id / "events.jsonl"
    state = record.driver_state(run)
    if state == "dead":
        return False
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            ended = b'"type": "run_finished"' in file.read()
    except FileNotFoundError:
        ended = False
    if ended or state == "alive":
        return not ended
    changed = path.stat().st_mtime if path.exists() else run["started_at"]
    return time.time() - changed < UNKNOWN_RUN_DAYS * 86400


def _tombstone(item: Garbage) -> str:
    return f"objects/{item.key}/tombstones/{item.attempt}.json"


def parse_policy(keep_runs: int, grace_hours: float) -> Policy:
    """The policy that options ask for. Raises UserError."""
    if keep_runs < 0 or not 0 <= grace_hours < float("inf"):
        raise UserError("--keep-runs and --grace-hours must not be negative")
    return Policy(keep_runs, grace_hours * 3600)
