"""Digests of external inputs, cached by path, size, mtime and inode, so that planning is quick."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ropewalk.infra.key import canonical_json, sha256_hex
from ropewalk.infra.step import External, UserError


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
        (relative, path)
        for relative, path in _walk(root)
        if matches(relative, external.include) and not matches(relative, external.exclude)
    )
    if not files:
        raise UserError(f"{place}: no file in {external.path} matches {', '.join(external.include)}")
    return files


def external_digest(external: External, place: str, cache_path: Path) -> str:
    """sha256 over the sorted [relative path, size, sha256] of the files."""
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
    return sha256_hex(canonical_json(entries))


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, names, files in os.walk(root):
        names.sort()
        for name in files:
            path = Path(folder, name)
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def _read_cache(path: Path) -> dict[str, list]:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _write_cache(path: Path, known: dict[str, list]) -> None:
    # The cache only saves time: two writers at once lose entries, never correctness.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known), encoding="utf-8")
    temporary.replace(path)
