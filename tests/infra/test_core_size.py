"""The engine's core stays small enough to be read in one sitting."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

INFRA = Path(__file__).parents[2] / "infra"
MAX_LINES = 2500
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def core_modules() -> list[str]:
    """The modules that infra/README.md says to read, in its order."""
    page = (INFRA / "README.md").read_text(encoding="utf-8")
    table = page.partition("| what | modules, in order |")[2].partition("\n\n")[0]
    return re.findall(r"`(\w+)`", table)


def lines_of_code(path: Path) -> int:
    """Lines that hold code: blank lines, comments and docstrings left out."""
    source = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_the_core_is_under_2500_lines_of_code() -> None:
    sizes = {name: lines_of_code(INFRA / f"{name}.py") for name in core_modules()}
    assert len(sizes) > 15
    assert sum(sizes.values()) < MAX_LINES, sizes


def test_the_core_imports_nothing_of_the_engine_that_is_not_core() -> None:
    allowed = {*core_modules(), "scrub", "series", "told"}
    for name in core_modules():
        tree = ast.parse((INFRA / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ropewalk.infra."):
                assert (node.module or "").removeprefix("ropewalk.infra.") in allowed, f"{name} imports {node.module}"
