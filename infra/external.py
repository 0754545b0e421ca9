"""External inputs: files of this machine, adopted data (`adopted://name`), repositories of the Hugging Face hub
(`hf://datasets/owner/repo@commit`) and objects of an object store (`s3://bucket/prefix`).

Digests of files are cached by path, size, mtime and inode, so that planning is quick.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropewalk.infra.key import canonical_json, sha256_hex
from ropewalk.infra.objects import file_sha256
from ropewalk.infra.step import External, UserError

if TYPE_CHECKING:
    from ropewalk.infra.store import Store


def external_files(external: External, place: str) -> list[tuple[str, Path]]:
    """The files of an external input as sorted (relative path, path).

    Raises UserError naming `place` (step and slot) if there is none.
    """
    root = Path(external.path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise UserError(f"{place}: {external.path} does not exist")
    files = sorted(
        (relative, root / relative)
        for relative in _walk(str(root))
        if matches(relative, external.include)
        and not matches(relative, external.exclude)
        and (root / relative).is_file()
    )
    if not files:
        raise UserError(f"{place}: no file in {external.path} matches {', '.join(external.include)}")
    return files


def external_digest(external: External, place: str, store: Store) -> str:
    """What an external input contributes to an identity; for files the sha256 of what `digest_files` finds.

    Raises UserError naming `place` for what is not there.
    """
    if "://" not in external.path:
        return sha256_hex(canonical_json(digest_files(external, place, store.external_cache)))
    from ropewalk.infra import adopt

    return adopt.resolve(external, place, store).digest


def external_uri(external: External, place: str, store: Store, digest: str) -> str | None:
    """What `Store.fetch` finds the input by, on whatever machine the step runs; None if its digest is another now."""
    if "://" not in external.path:
        path = str(Path(external.path).expanduser().absolute())
        return path if external_digest(external, place, store) == digest else None
    from ropewalk.infra import adopt

    outside = adopt.resolve(external, place, store, note=True)
    return outside.uri if outside.digest == digest else None


def fetch_external(store: Store, uri: str) -> Path:
    """The local file or folder of an input, brought here if that is needed. Raises UserError, StoreError or OSError."""
    from ropewalk.infra import adopt

    return adopt.fetch(store, uri)


def digest_files(external: External, place: str, cache_path: Path) -> list[list[Any]]:
    """The sorted [relative path, size, sha256] of the files."""
    files = external_files(external, place)
    known = _read_cache(cache_path)
    entries, changed = [], False
    for relative, path in files:
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        where = str(path.resolve())
        if known.get(where, [None])[:-1] != stamp:
            known[where] = [*stamp, file_sha256(path)]
            changed = True
        entries.append([relative, stat.st_size, known[where][-1]])
    if changed:
        _write_cache(cache_path, known)
    return entries


def matches(relative: str, patterns: tuple[str, ...]) -> bool:
    """Whether a posix path matches one of the globs; `**` spans folders, `*` does not."""
    return any(_pattern(pattern).match(relative) for pattern in patterns)


@cache
def _pattern(glob: str) -> re.Pattern[str]:
    pieces = []
    for piece in re.split(r"(\*\*/|\*\*|\*|\?)", glob):
        if piece == "**/":
            pieces.append(r"(?:.*/)?")
        elif piece == "**":
            pieces.append(r".*")
        elif piece == "*":
            pieces.append(r"[^/]*")
        elif piece == "?":
            pieces.append(r"[^/]")
        elif "[" in piece:
            pieces.append(fnmatch.translate(piece)[4:-3])
        else:
            pieces.append(re.escape(piece))
    return re.compile("".join(pieces) + r"\Z")


def _walk(root: str) -> Iterator[str]:
    """Paths below a folder, relative to it; of strings, since few of many files may match."""
    top = root.rstrip("/") + "/"
    for folder, _, names in os.walk(top):
        prefix = f"{folder}/"[len(top) :].lstrip("/")
        for name in names:
            yield prefix + name


def _read_cache(path: Path) -> dict[str, list]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _write_cache(path: Path, known: dict[str, list]) -> None:
    # It only saves time: two writers at once lose entries, a store that cannot be written keeps none.
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(path)
