"""What became of a process that Ray has lost: in one sentence, and whether its node was taken away."""

from __future__ import annotations

import re
from typing import Any


class WorkerDiedError(RuntimeError):
    """A process of a step is gone. Its cause is Ray's error, which says all that Ray knows."""

    preempted = False
    """Whether its node was being taken away."""


def died(error: Exception, who: str, node: str | None = None) -> WorkerDiedError:
    """What died, where and why.

    Args:
        error: Ray's.
        who: What died, in words.
        node: Ray's id of the node that it ran on, if the error may not name it.
    """
    text = str(error)
    found = WorkerDiedError(f"{who} died{_where(text)}: {_why(error, text)}")
    found.__cause__ = error
    found.preempted = getattr(error, "preempted", False) or _is_taken_away(_named(r"node id: (\w+)", text) or node)
    return found


def _where(text: str) -> str:
    pid, host = _named(r"\bpid: (\d+)", text), _named(r"\b(?:node )?ip: ([\w.:]+\w)", text)
    return f" ({' on '.join(filter(None, [pid and f'process {pid}', host]))})" if pid or host else ""


def _why(error: Exception, text: str) -> str:
    """The reason in Ray's words, without its advice; the kind of error says the rest."""
    said = _named(r"worker exit detail: ([^.\n]+)", text) or _named(r"^\s*the actor (is dead because [^.\n]+)", text)
    return f"{type(error).__name__}, {said}" if said else type(error).__name__


def _named(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text, re.IGNORECASE | re.MULTILINE)
    return match[1] if match else None


def _is_taken_away(node: str | None) -> bool:
    """Whether a node drains, or was lost after it had been told to.

    Ray has no public way to ask. Where a version of it lacks this one, a node that was taken away counts as lost.
    """
    if node is None:
        return False
    try:
        import ray
        from ray._private.state import state
        from ray.core.generated import common_pb2

        deaths: Any = common_pb2  # Its classes are made at import time, where type checkers do not see them.
        drained = deaths.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
        reasons = {entry["NodeID"]: entry["DeathReason"] for entry in ray.nodes() if not entry["Alive"]}
        # Until Ray has noticed that the node is gone, it is one that drains; afterwards its entry says why.
        return node in state.get_draining_nodes() or reasons.get(node) == drained
    except (ImportError, AttributeError, KeyError):
        return False
