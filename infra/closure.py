"""The digest of a stage's code: its module and everything of the same package that it imports, normalised.

Comments, docstrings and formatting do not count. The digest is recorded with every artifact, by module, so that a
later plan can say which modules have changed since.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ropewalk.infra.key import canonical_json, sha256_hex


def code_modules(stage: Any) -> dict[str, str]:
    """Digest of each module in the stage's source closure, by module name."""
    start = stage.__module__ if isinstance(stage, type) else stage.__name__
    found: dict[str, str] = {}
    waiting = [start]
    while waiting:
        name = waiting.pop()
        path = _source_path(name)
        if name in found or path is None:
            continue
        stat = path.stat()
        found[name], imported = _digest_and_imports(str(path), name, stat.st_mtime_ns, stat.st_size)
        waiting.extend(imported)
    return dict(sorted(found.items()))


def code_digest(modules: dict[str, str]) -> str:
    """One digest for a closure."""
    return sha256_hex(canonical_json(modules))


def changed_modules(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Names of the modules that differ, were added or are gone."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


@cache
def _digest_and_imports(path: str, name: str, mtime_ns: int, size: int) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    package = name.split(".")[0]
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names if alias.name.split(".")[0] == package]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, node)
            if base.split(".")[0] == package:
                # `from a.b import c`: c may be a module of its own or a name inside a.b.
                imported += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        _drop_docstring(node)
    text = ast.dump(tree, annotate_fields=False, include_attributes=False)
    return hashlib.sha256(text.encode()).hexdigest(), tuple(imported)


def _absolute(name: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = name.split(".")[: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _drop_docstring(node: ast.AST) -> None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]


@cache
def _source_path(name: str) -> Path | None:
    """The file of a module, found without importing it (parents of two levels apart: these rooms are cheap)."""
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None):
        return Path(str(loaded.__file__))
    parts = name.split(".")
    depth = min(2, len(parts))
    try:
        spec = importlib.util.find_spec(".".join(parts[:depth]))
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if len(parts) == depth:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or ():
        target = Path(folder, *parts[depth:])
        for candidate in (target.with_suffix(".py"), target / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
