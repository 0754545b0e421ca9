"""The commands that look after the store: verify, gc and adopt."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ropewalk.infra.adopt import adopt
from ropewalk.infra.step import External, UserError, unknown
from ropewalk.infra.store import Store
from ropewalk.infra.upkeep import garbage
from ropewalk.infra.upkeep.garbage import Garbage
from ropewalk.infra.upkeep.verify import Verdict, verify
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.output import PLAIN, console_on, emit
from ropewalk.pipelines.plan_commands import make_plan
from ropewalk.pipelines.records import find_run

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def verify_outputs(
    request: dict[str, Any] | None,
    store_uri: str,
    *,
    run_id: str | None,
    key: str | None,
    deep: bool,
    repair: bool,
    as_json: bool,
) -> int:
    """Check committed outputs; 1 if any is corrupt."""
    store = open_store(store_uri)
    keys = _chosen_keys(request, store, store_uri, run_id, key)
    verdicts = _verify_with_progress(store, keys, deep=deep, repair=repair)
    corrupt = [verdict for verdict in verdicts if verdict.status == "CORRUPT"]
    sound = sum(verdict.status == "SOUND" for verdict in verdicts)
    if as_json:
        rows = [verdict.to_json() for verdict in verdicts]
        emit({"store": store.uri, "deep": deep, "sound": sound, "corrupt": len(corrupt), "commits": rows})
        return 1 if corrupt else 0
    console = console_on()
    for verdict in corrupt:
        console.print(f"CORRUPT {verdict.step or verdict.key[:12]} (commit {verdict.number})", style="red")
        for problem in verdict.problems:
            console.print(f"  {problem}", **PLAIN)
    num_bytes = sum(verdict.num_bytes for verdict in verdicts)
    looked = "contents" if deep else "sizes"
    console.print(f"{sound} outputs are sound, {len(corrupt)} corrupt; {_size(num_bytes)}, {looked} compared")
    if corrupt and repair:
        console.print("the corrupt ones count no more; the next run makes them again")
    elif corrupt:
        console.print("--repair lets the next run make the corrupt ones again")
    return 1 if corrupt else 0


def collect_garbage(
    store_uri: str, keep_runs: int, grace_hours: float, *, yes: bool, with_runs: bool, as_json: bool
) -> int:
    """Show or remove what no kept run uses."""
    store = open_store(store_uri)
    policy = garbage.parse_policy(keep_runs, grace_hours)
    with Console(stderr=True).status("looking for what no kept run uses"):
        dropped = garbage.drop_runs(store, policy, act=yes) if with_runs else []
        found = garbage.collect(store, policy, act=yes)
    sums = {state: sum(item.num_bytes for item in found if item.state == state) for state in ("removed", "due")}
    if as_json:
        rows = [item.to_json() for item in found]
        emit({"store": store.uri, "acted": yes, "freed_bytes": sums["removed"], "garbage": rows, "runs": dropped})
        return 0
    _show_garbage(found, dropped, policy, yes)
    return 0


def pin_runs(store_uri: str, pin: list[str], unpin: list[str], as_json: bool) -> int:
    """Keep what runs use for ever, or no longer; nothing is removed."""
    store = open_store(store_uri)
    pinned = {find_run(store, run_id): True for run_id in pin}
    pinned |= {find_run(store, run_id): False for run_id in unpin}
    for run_id, is_pinned in pinned.items():
        garbage.pin(store, run_id, pinned=is_pinned)
        if not as_json:
            console_on().print(f"run {run_id} is {'pinned' if is_pinned else 'no longer pinned'}", **PLAIN)
    if as_json:
        emit({"pinned": pinned})
    return 0


def adopt_data(
    source: str, store_uri: str, name: str, *, copy: bool, include: list[str], exclude: list[str], as_json: bool
) -> int:
    """Register outside data under a name."""
    external = External(source, tuple(include) or ("**/*",), tuple(exclude))
    with Console(stderr=True).status(f"reading {source}"):
        document = adopt(open_store(store_uri), source, name, external, copy=copy)
    if as_json:
        facts = {field: document[field] for field in ("name", "number", "kind", "source", "digest")}
        num_bytes = sum(entry["size"] for entry in document["files"])
        emit({**facts, "uri": f"adopted://{name}", "num_files": len(document["files"]), "num_bytes": num_bytes})
        return 0
    files = document["files"]
    size = f", {len(files)} files, {_size(sum(entry['size'] for entry in files))}" if files else ""
    console = console_on()
    console.print(f"adopted {name}, version {document['number']}{size}", **PLAIN)
    console.print(f'use it in a pipeline as External("adopted://{name}")', **PLAIN)
    return 0


def _chosen_keys(
    request: dict[str, Any] | None, store: Store, store_uri: str, run_id: str | None, key: str | None
) -> list[str]:
    if sum(choice is not None for choice in (request, run_id, key)) > 1:
        raise UserError("name a pipeline, a --run or a --key, not several of them")
    if request is not None:
        return sorted({plan.key for plan in make_plan(request, store_uri) if plan.key})
    if run_id is not None:
        folder = store.root / "runs" / find_run(store, run_id) / "steps"
        return sorted({json.loads(path.read_text(encoding="utf-8"))["key"] for path in folder.glob("*.json")})
    if key is None:
        return store.known_keys()
    found = [known for known in store.known_keys() if known.startswith(key)]
    if len(found) != 1:
        several = f"{len(found)} keys of the store begin with it; give more of its digits"
        raise UserError(f"--key {key}: {several if found else unknown('key', key, store.known_keys()[:5])}")
    return found


def _verify_with_progress(store: Store, keys: list[str], *, deep: bool, repair: bool) -> list[Verdict]:
    columns = TextColumn("verifying"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[read]}")
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar, total_bytes = progress.add_task("verify", total=None, read=""), 0

        def read(num_bytes: int) -> None:
            nonlocal total_bytes
            total_bytes += num_bytes
            progress.update(bar, read=f"{_size(total_bytes)} read")

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        return verify(store, keys, deep=deep, repair=repair, on_commit=advance, on_read=read)


def _show_garbage(found: list[Garbage], dropped: list[str], policy: garbage.Policy, yes: bool) -> None:
    console = console_on()
    table = Table("key", "attempt", "size", "why", "state", box=None, pad_edge=False)
    for item in found:
        table.add_row(item.key[:12], item.attempt[:12], _size(item.num_bytes), item.reason, item.state)
    if found:
        console.print(table)
    for run_id in dropped:
        console.print(f"run record {run_id}: {'removed' if yes else 'would be removed'}", highlight=False)
    by_state = {state: [i for i in found if i.state == state] for state in ("removed", "due", "found", "waiting")}
    sizes = {state: _size(sum(item.num_bytes for item in items)) for state, items in by_state.items()}
    hours = f"{policy.grace_seconds / 3600:g} hours"
    if yes:
        console.print(f"{sizes['removed']} freed; {sizes['found']} marked now, to be removed by a call in {hours}")
    else:
        console.print(f"{sizes['due']} can be removed and {sizes['found']} marked: add --yes. Nothing was changed.")
    if by_state["waiting"]:
        console.print(f"{sizes['waiting']} are marked and wait until {hours} are over")


def _size(num_bytes: int) -> str:
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 else f"{value:.1f} {UNITS[unit]}"
