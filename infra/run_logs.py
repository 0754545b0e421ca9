"""The logs of a run: which there are, and following them while they grow and new attempts begin.

runs/<run id>/logs/<step>/<attempt>.log          what the step's own process wrote
runs/<run id>/logs/<step>/<attempt>.<part>.log   what one of its workers wrote (`rank0`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ropewalk.infra.tracking.event_tail import EventTail


@dataclass(frozen=True)
class LogFile:
    """One log of a run."""

    step: str
    attempt: int
    """1 for the first attempt at the step in this run."""
    part: str
    """`rank0` and so on for a worker's own log, empty for the step's."""
    path: Path

    @property
    def title(self) -> str:
        """What stands above its lines."""
        return ", ".join([self.step, f"attempt {self.attempt}", *([self.part] if self.part else [])])

    def to_json(self) -> dict[str, str | int]:
        """As `logs --json` shows it."""
        names = {"step": self.step, "attempt": self.attempt, "part": self.part}
        return {**names, "path": str(self.path), "num_bytes": self.path.stat().st_size}


class RunLogs:
    """The logs in the folder of a run's record, of one step or of one attempt at each step only, if given."""

    def __init__(self, run_folder: Path, step: str | None = None, attempt: int | None = None) -> None:
        self._folder = run_folder
        self._step = step
        self._attempt = attempt
        self._events = EventTail(run_folder / "events.jsonl")
        self._attempts: dict[str, list[str]] = {}
        """Names of the attempts at each step, oldest first."""
        self._positions: dict[Path, int] = {}

    def files(self) -> list[LogFile]:
        """The logs that there are so far, by step in the order in which the steps began, and by attempt."""
        self._learn()
        found = []
        for step, names in self._attempts.items():
            for number, name in enumerate(names, 1):
                if self._step in (None, step) and self._attempt in (None, number):
                    paths = sorted((self._folder / "logs" / step).glob(f"{name}*.log"), key=_own_first)
                    found += [LogFile(step, number, path.stem.removeprefix(name).lstrip("."), path) for path in paths]
        return found

    def new_lines(self, *, rest: bool = False) -> Iterator[tuple[LogFile, list[str]]]:
        """What was added to each log since the last call, whole lines only; `rest`: a line without its end, too."""
        for log in self.files():
            with log.path.open("rb") as file:
                file.seek(self._positions.get(log.path, 0))
                added = file.read()
            if not rest:
                added = added[: added.rfind(b"\n") + 1]
            if added:
                self._positions[log.path] = self._positions.get(log.path, 0) + len(added)
                yield log, added.decode("utf-8", errors="replace").splitlines()

    def _learn(self) -> None:
        while events := self._events.read():
            for event in events:
                if event["type"] == "step_started":
                    names = self._attempts.setdefault(event["step"], [])
                    names += [event["attempt"]] if event["attempt"] not in names else []


def print_logs(logs: RunLogs, write: Callable[[str], None], wait: Callable[[], bool] = lambda: False) -> None:
    """Write logs line by line, with a title wherever another log goes on.

    `wait` is called before the logs are read again; it returns False once no process writes them any more.
    """
    last: Path | None = None
    more = True
    while more:
        # Asked before reading: what was written up to the end of the run is then read, too.
        more = wait()
        for log, lines in logs.new_lines(rest=not more):
            if log.path != last:
                write(f"==> {log.title} <==")
                last = log.path
            for line in lines:
                write(line)


def _own_first(path: Path) -> tuple[int, int, str]:
    """The step's own log, then its workers' by number."""
    digits = "".join(c for c in path.stem.partition(".")[2] if c.isdigit())
    return path.stem.count("."), int(digits or 0), path.name
