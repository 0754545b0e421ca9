"""The folder that is shipped with a pipeline file: the file and the modules beside it that it imports, nothing else.

Never the working folder: on the cluster it would lie in front of the installed packages on the import path, where a
folder called `kernels`, `datasets` or `ray` takes the place of the package of that name.
"""

from __future__ import annotations

import ast
import shutil
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from ropewalk.infra.step import UserError

RESERVED = {"kernels", "ropewalk"}
"""Names that transformers looks for, and ours."""
MAX_BYTES = 20_000_000


def bundled_files(pipeline_file: Path) -> list[Path]:
    """The pipeline file and the modules in its folder that it imports, directly or not; paths are absolute.

    Only `import` statements are followed, wherever they stand. Raises UserError for a module whose name would shadow
    an installed package, and for more than 20 MB.
    """
    folder = pipeline_file.resolve().parent
    found: list[Path] = []
    waiting = [pipeline_file.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for name in _imported(path, folder):
            waiting.extend(_modules(folder, name))
    for path in found:
        _refuse_shadow(path, folder)
    size = sum(path.stat().st_size for path in found)
    if size > MAX_BYTES:
        raise UserError(
            f"{pipeline_file} and the modules it imports have {size / 1e6:.0f} MB; install them as a package"
        )
    return sorted(found)


def copy_bundle(pipeline_file: Path, target: Path) -> None:
    """Copy the bundle of a pipeline file into a folder, laid out as beside the file."""
    source = pipeline_file.resolve().parent
    for path in bundled_files(pipeline_file):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def _imported(path: Path, folder: Path) -> Iterator[str]:
    """Dotted names that a file may import, absolute from the folder."""
    package = path.relative_to(folder).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from a import b`: b may be a module of its own or a name inside a.
            yield base
            yield from (f"{base}.{alias.name}".lstrip(".") for alias in node.names)


def _modules(folder: Path, name: str) -> Iterator[Path]:
    """Files in the folder that importing a dotted name runs."""
    place = folder
    for part in name.split("."):
        place = place / part
        for candidate in (place / "__init__.py", place.with_suffix(".py")):
            if candidate.is_file():
                yield candidate.resolve()
                break


def _refuse_shadow(path: Path, folder: Path) -> None:
    name = Path(path.relative_to(folder).parts[0]).stem
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    installed = PathFinder.find_spec(name, elsewhere)
    # A folder without __init__.py found elsewhere (no loader) shadows nothing.
    if name in RESERVED or name in sys.stdlib_module_names or (installed is not None and installed.origin is not None):
        raise UserError(f"{path} would shadow the package {name!r} on the cluster: rename it")
