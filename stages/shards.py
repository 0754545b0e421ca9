"""Data-parallel work whose finished parts outlive a crash: `context.map` with a ledger.

Each item is worked on in a folder of its own below `context.work`, under a name that nobody else has. When its files
are on the disk, an entry in the ledger says so. The entry is a JSON file that is created exclusively: of two workers
with the same item, one of them left over from a killed attempt, the first wins and the other's files are dropped. A
new attempt runs only items without an entry. Results come in item order, so what a stage makes of them is the same
for any number of workers and any number of crashes.

    work/<label>/<index>-<digest of the name>.json   {"folder", "counts"}
    work/<label>/files/<unique>/                     what the function wrote
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ropewalk.stages.context import Context, is_class

Counts = dict[str, Any]
"""What the function returned for an item: JSON."""


@dataclass(frozen=True)
class Shard:
    """A finished item."""

    name: str
    folder: Path
    """Its files."""
    counts: Counts

    def link_into(self, target: Path) -> None:
        """Give the files a second name below `target`, which must not have them yet."""
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                linked = target / path.relative_to(self.folder)
                linked.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, linked)


def map_shards(
    context: Context,
    function: Callable[..., Any],
    items: Mapping[str, Any],
    *,
    label: str = "shards",
    unit: str = "shards",
    resources: Any = None,
) -> Iterator[Shard]:
    """Apply `function(item, folder) -> counts` to every item and give the finished shards in item order.

    Args:
        context: Its `work` folder must be on a file system that all its workers share.
        function: As for `Context.map`, with a second argument: the empty folder to write to. A class is built once
            per worker.
        items: By name. Names and order must follow from config and inputs alone.
        label: Folder of the ledger below `context.work`; distinct for each use in a stage.
        unit: Of the progress that is reported.
        resources: As for `Context.map`.

    Raises ValueError for counts that are not JSON, or if a worker does not see the work folder.
    """
    ledger = context.work / label
    (ledger / "files").mkdir(parents=True, exist_ok=True)
    entries = {name: ledger / _entry_name(index, name) for index, name in enumerate(items)}
    missing = [name for name, entry in entries.items() if not entry.exists()]
    run = partial(_ShardBuilder if is_class(function) else _write_shard, function, ledger)
    fresh = context.map(run, [(entries[name].name, items[name]) for name in missing], resources=resources)
    done, unfinished = len(items) - len(missing), set(missing)
    for name, entry in entries.items():
        if name in unfinished:
            next(fresh)
            done += 1
            context.progress(done, len(items), unit)
        found = json.loads(entry.read_text(encoding="utf-8"))
        yield Shard(name, ledger / "files" / found["folder"], found["counts"])


class _ShardBuilder:
    """Builds the stage's class once, then writes one shard after another."""

    def __init__(self, build: Callable[[], Callable[[Any, Path], Counts]], ledger: Path) -> None:
        self._function, self._ledger = build(), ledger

    def __call__(self, work: tuple[str, Any]) -> None:
        _write_shard(self._function, self._ledger, work)


def _write_shard(function: Callable[[Any, Path], Counts], ledger: Path, work: tuple[str, Any]) -> None:
    entry_name, item = work
    folder = ledger / "files" / uuid.uuid4().hex
    try:
        folder.mkdir()
    except FileNotFoundError:
        raise ValueError(
            f"{folder.parent} does not exist here: several machines need a store, or ROPEWALK_SCRATCH, on a file "
            "system that all of them share"
        ) from None
    counts = function(item, folder)
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
    if not _create(ledger / entry_name, json.dumps({"folder": folder.name, "counts": counts}, allow_nan=False)):
        shutil.rmtree(folder)


def _entry_name(index: int, name: str) -> str:
    return f"{index:06d}-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def _create(path: Path, text: str) -> bool:
    """Make a file that appears whole or not at all; False if somebody else has made it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    _sync(path.parent)
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
