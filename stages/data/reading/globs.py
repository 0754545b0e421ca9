"""Chooses files by globs.

Globs are matched against relative POSIX paths, part by part and case-sensitively: `**` stands for any number of
folders, `*`, `?` and `[...]` for text inside one name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path


def list_files(root: Path, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Sorted relative POSIX paths of the files below `root` that match a glob of `include` and none of `exclude`.

    Folders that `exclude` covers whole are not entered; links to folders are not followed.
    """
    wanted, unwanted = _split_globs(include), _split_globs(exclude)
    covered = [glob for glob in unwanted if glob[-1] == "**"]
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root).parts
        folders[:] = [name for name in folders if not _matches_any((*here, name), covered)]
        for name in files:
            path = (*here, name)
            if _matches_any(path, wanted) and not _matches_any(path, unwanted):
                found.append("/".join(path))
    return sorted(found)


def _split_globs(globs: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(glob.split("/")) for glob in globs]


def _matches_any(path: tuple[str, ...], globs: Sequence[tuple[str, ...]]) -> bool:
    return any(_matches(path, glob) for glob in globs)


def _matches(path: tuple[str, ...], glob: tuple[str, ...]) -> bool:
    if not glob:
        return not path
    if glob[0] == "**":
        return any(_matches(path[skip:], glob[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], glob[0]) and _matches(path[1:], glob[1:])
