"""What became of a process that Ray has lost, in one sentence."""

from __future__ import annotations

import re


class WorkerDiedError(RuntimeError):
    """A process of a step is gone. Its cause is Ray's error, which says all that Ray knows."""


def died(error: Exception, who: str) -> WorkerDiedError:
    """What died (in words: `who`), where and why, from Ray's error."""
    text = str(error)
    pid, host = _named(r"\bpid: (\d+)", text), _named(r"\b(?:node )?ip: ([\w.:]+\w)", text)
    place = " on ".join(filter(None, [f"process {pid}" if pid else None, host]))
    # The reason in Ray's words, without its advice.
    said = _named(r"worker exit detail: ([^.\n]+)", text) or _named(
        r"^\s*the actor (?:died|is dead) (because [^.\n]+)", text
    )
    why = ", ".join(filter(None, [type(error).__name__, said]))
    found = WorkerDiedError(f"{who} died{f' ({place})' if place else ''}: {why}")
    found.__cause__ = error
    return found


def _named(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.IGNORECASE | re.MULTILINE)
    return match[1] if match else None
