"""Keeps the scratch folder of a step in the object store, so that another machine can go on from it.

    work/<key>/<000000>/begun.json   somebody works on the key for the nth time; created exclusively
    work/<key>/<000000>/<uuid>       content of a file, never changed
    work/<key>/<000000>/index.json   path, object, size and sha256 of every file, written after the objects it names

Who begins reads the newest index of those before it. Only the newest removes objects, and only after it has written
an index without them and seen that nobody has begun since: what a successor reads from an index is always there.
Symbolic links are not kept.
An index shows the folder as it was at one moment, as a crash would have left it, so that files that refer to each
other (a checkpoint and the file that names the latest one) belong together, whatever the stage did meanwhile. Only a
file that is being written in place may be missing, or be as it was before.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ropewalk.infra.objects import file_sha256
from ropewalk.infra.remote.object_store import ObjectStoreObjects
from ropewalk.infra.store import Store

INTERVAL_SECONDS = 5.0
LARGE_BYTES = 1 << 20
SETTLE_SECONDS = 1.0
"""A large file that was changed so recently is probably still being written."""
SNAPSHOT_TRIES = 5

Stamp = tuple[int, int, int]
"""Inode, size and time of change of a file: the same stamp means the same content."""
Index = dict[str, dict[str, Any]]
"""Object, size and sha256 of each file, by path."""


class WorkMirror:
    """Brings a key's scratch folder to this machine, then keeps the store's copy up to date until the block ends.

    A block that ends with an error has all that it left uploaded. One that ends well has no further use for it.
    """

    def __init__(self, store: Store, key: str, folder: Path, interval: float = INTERVAL_SECONDS) -> None:
        assert isinstance(store.objects, ObjectStoreObjects)
        self._objects = store.objects
        self._folder = folder
        self._name = f"work/{key}"
        self._side = store.root / "mirrors" / key
        """Beside the scratch folder, on the same file system: what this machine knows of the copy."""
        self._interval = interval
        self._generation = 0
        self._index: Index = {}
        self._pieces: dict[Stamp, dict[str, Any]] = {}
        self._superseded = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"mirror-{key[:8]}", daemon=True)

    def __enter__(self) -> WorkMirror:
        self._begin()
        self._restore()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is not None:
            self._try_to_sync(final=True)

    def sync(self, *, final: bool = False) -> None:
        """Upload what has changed; `final`: the stage has ended, and all of it counts as written."""
        for _ in range(SNAPSHOT_TRIES):
            found = self._scan()
            young = set() if final else _young(found)
            changed = {path: s for path, s in found.items() if s not in self._pieces and path not in young}
            with self._held(changed) as held:
                if not final and _inodes(self._scan()) != _inodes(found):
                    continue
                if not any(found[path][2] >= found[large][2] for large in young for path in changed):
                    self._upload(held)
                    self._publish(found)
                return

    def _publish(self, found: dict[str, Stamp]) -> None:
        """Write the index of the files that were found, each as it was uploaded last."""
        index = {
            path: piece
            for path, stamp in found.items()
            if (piece := self._pieces.get(stamp) or self._index.get(path)) is not None
        }
        if index != self._index and not self._superseded:
            self._objects.write(self._object("index.json"), json.dumps(index).encode())
            self._index = index
            self._remember(self._generation)
            self._remove_unused(found)

    def _work(self) -> None:
        pause = self._interval
        while not self._ended.wait(pause) and not self._superseded:
            started = time.monotonic()
            self._try_to_sync()
            pause = max(self._interval, 5 * (time.monotonic() - started))

    def _try_to_sync(self, *, final: bool = False) -> None:
        try:
            self.sync(final=final)
        except OSError as error:
            _tell(f"the scratch folder could not be copied to {self._objects.uri}: {error}")

    def _begin(self) -> None:
        self._generation = self._newest() + 1
        content = json.dumps({"by": uuid.uuid4().hex}).encode()
        while not self._objects.create(self._object("begun.json"), content):
            self._generation += 1

    def _restore(self) -> None:
        """Make the folder what the newest index says, unless this machine wrote that index."""
        for generation in range(self._generation - 1, -1, -1):
            try:
                self._index = json.loads(self._objects.read(f"{self._name}/{generation:06d}/index.json"))
            except FileNotFoundError:
                continue
            if not self._recall(generation):
                self._download()
                self._remember(generation)
            return

    def _download(self) -> None:
        total = sum(piece["size"] for piece in self._index.values())
        _tell(f"bringing the scratch folder of an earlier attempt: {len(self._index)} files, {total} bytes")
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for path in self._index:
            if not (self._folder / path).resolve().is_relative_to(self._folder.resolve()):
                raise OSError(f"{self._objects.uri}/{self._name}: path {path!r} leaves the scratch folder")
        self._objects.download(
            [(p["object"], self._folder / path, p["size"], p["sha256"]) for path, p in self._index.items()]
        )
        self._pieces = {stamp: self._index[path] for path, stamp in self._scan().items()}

    def _scan(self) -> dict[str, Stamp]:
        found: dict[str, Stamp] = {}
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if not path.is_symlink():
                        found[path.relative_to(self._folder).as_posix()] = _stamp(path)
        return found

    @contextlib.contextmanager
    def _held(self, changed: dict[str, Stamp]) -> Iterator[dict[str, tuple[Stamp, Path]]]:
        """Links that hold files while the stage may replace or remove them, with their stamps, by object."""
        links = self._side / uuid.uuid4().hex
        links.mkdir(parents=True)
        try:
            held: dict[str, tuple[Stamp, Path]] = {}
            for path, stamp in changed.items():
                link = links / uuid.uuid4().hex
                with contextlib.suppress(FileNotFoundError):
                    os.link(self._folder / path, link)
                    held[self._object(link.name)] = (stamp, link)
            yield held
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def _upload(self, held: dict[str, tuple[Stamp, Path]]) -> None:
        digests = {name: file_sha256(link) for name, (_, link) in held.items()}
        self._objects.upload({name: link for name, (_, link) in held.items()})
        for name, (stamp, link) in held.items():
            if _stamp(link) == stamp:
                self._pieces[stamp] = {"object": name, "size": stamp[1], "sha256": digests[name]}
            else:  # Written in place meanwhile.
                self._objects.remove_all([name])

    def _remove_unused(self, found: dict[str, Stamp]) -> None:
        newest = self._newest()
        if newest > self._generation:
            self._superseded = True
            return
        present = set(found.values())
        self._pieces = {stamp: piece for stamp, piece in self._pieces.items() if stamp in present}
        used = {piece["object"] for piece in self._index.values()}
        used |= {self._object("index.json"), self._object("begun.json")}
        there = {f"{self._name}/{name}" for name in self._objects.sizes(self._name)}
        self._objects.remove_all(sorted(there - used))

    def _newest(self) -> int:
        return max((int(name) for name in self._objects.names(self._name) if name.isdigit()), default=-1)

    def _object(self, name: str) -> str:
        return f"{self._name}/{self._generation:06d}/{name}"

    def _remember(self, generation: int) -> None:
        """Note on this machine that the folder goes on from an index, and which of its files that index holds."""
        state = {"generation": generation, "pieces": list(self._pieces.items())}
        self._side.mkdir(parents=True, exist_ok=True)
        temporary = self._side / "state.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self._side / "state.json")

    def _recall(self, generation: int) -> bool:
        """Whether the folder of this machine goes on from an index already."""
        try:
            state = json.loads((self._side / "state.json").read_text())
        except (OSError, ValueError):
            return False
        if state["generation"] != generation:
            return False
        self._pieces = {(stamp[0], stamp[1], stamp[2]): piece for stamp, piece in state["pieces"]}
        return True


def _stamp(path: Path) -> Stamp:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _inodes(found: dict[str, Stamp]) -> dict[str, int]:
    """Tell whether files came, went or were replaced; one that grows in place stays the same."""
    return {path: stamp[0] for path, stamp in found.items()}


def _young(found: dict[str, Stamp]) -> set[str]:
    cut = (time.time() - SETTLE_SECONDS) * 1e9
    return {path for path, (_, size, changed) in found.items() if size > LARGE_BYTES and changed > cut}


def _tell(text: str) -> None:
    """Into the log of the attempt."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
