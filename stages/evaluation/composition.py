"""What a training mix says of itself, whatever stage wrote it: breakdowns to draw and single numbers to list.

Reads the details and counts of `artifact.json` and, where there is one, `statistics.json`. A mapping of names to
numbers is a breakdown (`tokens_by_source`: how many tokens from each source); a number is a fact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ropewalk.stages.schema import Record, read_artifact

LARGEST_PARTS = 5
"""Parts shown by name; the rest are summed, so that colours stay apart."""


class Composition(Record):
    """Breakdowns and facts of a mix."""

    shares: dict[str, dict[str, float]]
    """Breakdowns with their parts, largest first."""
    facts: dict[str, str]
    """Other numbers and short texts, as they are shown."""


def read_composition(folder: Path) -> Composition:
    """Read what an artifact says of its make-up. Raises ValueError only if it is no artifact."""
    artifact = read_artifact(folder)
    known: dict[str, Any] = {**artifact.counts, **artifact.details}
    statistics = folder / "statistics.json"
    if statistics.exists():
        found = json.loads(statistics.read_text(encoding="utf-8"))
        known |= found if isinstance(found, dict) else {}
    shares, facts = {}, {}
    for path, value in _leaves("", known):
        if isinstance(value, Mapping):
            shares[_title(path)] = _largest(value)
        elif isinstance(value, str):
            facts[_title(path)] = value
        elif path.endswith("_fraction"):
            facts[_title(path.removesuffix("_fraction"))] = f"{value:.1%}"
        else:
            facts[_title(path)] = f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    return Composition(shares=shares, facts=facts)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(path: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in sorted(tree.items()):
        here = f"{path}: {name}" if path else str(name)
        if isinstance(value, Mapping):
            if value and all(_number(part) and part >= 0 for part in value.values()) and sum(value.values()) > 0:
                yield here, value
            else:
                yield from _leaves(here, value)
        elif _number(value) or (isinstance(value, str) and len(value) <= 80):
            yield here, value


def _title(path: str) -> str:
    return path.replace("_", " ")


def _largest(parts: Mapping[str, float]) -> dict[str, float]:
    ordered = sorted(((name, value) for name, value in parts.items() if value), key=lambda part: (-part[1], part[0]))
    shown = {str(name): float(value) for name, value in ordered[:LARGEST_PARTS]}
    rest = sum(value for _, value in ordered[LARGEST_PARTS:])
    if rest:
        shown[f"{len(ordered) - LARGEST_PARTS} others"] = float(rest)
    return shown
