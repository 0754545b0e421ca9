"""What the commands write to a terminal, a file or a pipe, whatever its encoding and whether anybody still reads it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
"""For `Console.print` of a line that people copy from: no colours, no markup, no line breaks."""
FILE_WIDTH = 400
"""Columns of a table in a file or pipe, where there is no edge to break its lines at."""


def emit(document: dict[str, Any]) -> None:
    """Write the JSON object that ends standard output, on a line of its own. Numbers that JSON lacks become strings."""
    text = json.dumps(_plain(document), ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(_plain(document))
    sys.stdout.flush()
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def console_on(stream: TextIO | None = None) -> Console:
    """A console on a stream (default: standard output). In a file or pipe it breaks no line of a table."""
    from rich.console import Console

    return _sized(Console(file=stream))


def lasting_console(stream: TextIO) -> Console:
    """A console on a stream, also while the local executor sends all output of this process to a step's log.

    A run goes on when nobody reads any more what it shows: its pipe or its terminal was closed.
    """
    from rich.console import Console

    try:
        handle = os.dup(stream.fileno())
    except OSError:  # A stream without a file: nothing can be redirected either.
        return _sized(Console(file=stream))
    copy = _Lasting(os.fdopen(handle, "wb"), stream.encoding, stream.errors, line_buffering=True)
    return _sized(Console(file=copy))


class _Lasting(io.TextIOWrapper):
    """Text that goes nowhere once it cannot be written."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            silence(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            silence(self)


def _sized(console: Console) -> Console:
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def prepare_streams() -> None:
    """Let no character that the terminal does not have, and no closed stream, end a command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # As after `ropewalk ... >&-`.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
        getattr(sys, name).reconfigure(errors="replace")


def nobody_reads() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence(stream: Any) -> None:
    """Let a stream go nowhere: what is still in its buffer would raise BrokenPipeError again when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
