"""Why a step is not fresh: structured, so that programs can act on it, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ropewalk.infra.scrub import scrub

ReasonKind = Literal[
    "never run", "deleted", "corrupt", "stage", "version", "code", "config", "input", "external", "identity",
    "forced", "drifted", "upstream", "failed", "running", "not selected",
]  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """One reason why a step would run, or cannot."""

    kind: ReasonKind
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to the kind: `field`, `before` and `now` of a changed config field, `slot` of a changed input."""

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` shows it."""
        return {"kind": self.kind, "text": self.text, **self.facts}


def in_words(reasons: Iterable[Reason]) -> str:
    """Reasons as one line."""
    return "; ".join(reason.text for reason in reasons)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Reason]:
    """What changed from a recorded identity document to another, field by field. Records hold no secrets."""
    now = scrub(now)
    found: list[Reason] = []
    parts: tuple[tuple[str, ReasonKind, str], ...] = (
        ("stage", "stage", "stage"),
        ("version", "version", "stage version"),
        ("code", "code", "code digest"),
    )
    for part, kind, word in parts:
        found += _changed(kind, word, before.get(part), now.get(part))
    found += _nested(before.get("config", {}), now.get("config", {}), "")
    slots: tuple[tuple[str, ReasonKind, str], ...] = (
        ("inputs", "input", "input"),
        ("externals", "external", "external input"),
    )
    for part, kind, word in slots:
        old, new = before.get(part, {}), now.get(part, {})
        for slot in sorted(old.keys() | new.keys()):
            if old.get(slot) != new.get(slot):
                text = f"{word} {slot} {_short(old.get(slot))} -> {_short(new.get(slot))}"
                found.append(Reason(kind, text, {"slot": slot, "before": old.get(slot), "now": new.get(slot)}))
    return found


def _changed(kind: ReasonKind, word: str, before: Any, now: Any) -> list[Reason]:
    if before == now:
        return []
    return [Reason(kind, f"{word} {before} -> {now}", {"before": before, "now": now})]


def _nested(before: Any, now: Any, place: str) -> list[Reason]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs = [
            (before.get(name, "absent"), now.get(name, "absent"), name) for name in sorted(before.keys() | now.keys())
        ]
        return [
            reason for old, new, name in pairs for reason in _nested(old, new, f"{place}.{name}" if place else name)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        numbered = enumerate(zip(before, now, strict=True))
        return [reason for number, pair in numbered for reason in _nested(*pair, f"{place}.{number}")]
    if before == now and type(before) is type(now):
        return []
    return [Reason("config", f"config {place} {before!r} -> {now!r}", {"field": place, "before": before, "now": now})]


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest[:12]
