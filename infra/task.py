"""One attempt at a step, in whatever process an executor gives it: run the stage, commit its output.

This is the only code that calls a stage. It runs in the driver (local executor) or in a Ray worker.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ropewalk.infra.closure import code_modules
from ropewalk.infra.step import Resources, Step
from ropewalk.infra.store import Attempt, Commit, Store

Report = Callable[[dict[str, Any]], None]
MakeContext = Callable[["Task", Path, Report], Any]
"""Builds what a stage is given as `context` from the task, its work folder and where events go."""


@dataclass(frozen=True)
class Output:
    """Where a stage writes."""

    data: Path
    observed: Path


@dataclass(frozen=True)
class StageReference:
    """A stage by name, so that a task can travel to another process."""

    module: str
    qualname: str = ""

    @staticmethod
    def of(stage: Any) -> StageReference:
        """Refer to a stage module or class."""
        return (
            StageReference(stage.__module__, stage.__qualname__)
            if isinstance(stage, type)
            else StageReference(stage.__name__)
        )

    def load(self) -> Any:
        """Import the stage."""
        module = importlib.import_module(self.module)
        return reduce(getattr, self.qualname.split("."), module) if self.qualname else module


@dataclass(frozen=True)
class Task:
    """All that another process needs for one attempt."""

    step: str
    stage: StageReference
    config: BaseModel
    inputs: Mapping[str, str]
    """Path of each input's data, by slot."""
    store_uri: str
    key: str
    attempt: str
    """Name of the attempt, new for every try."""
    record: Mapping[str, Any]
    """What goes into the commit beside what the attempt itself finds out."""
    force: bool
    log_path: str
    resources: Resources = field(default_factory=Resources)
    worker_resources: Resources = field(default_factory=Resources)
    import_paths: tuple[str, ...] = ()
    """Folders that the pipeline file's own modules are imported from."""

    @property
    def store(self) -> Store:
        """The store that the task reads and writes."""
        return Store(self.store_uri)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    step: str
    attempt: str
    seconds: float
    commit: Commit | None = None
    error: str | None = None


def make_task(step: Step, **rest: Any) -> Task:
    """A task for a step; the rest as in `Task`."""
    return Task(
        step=step.name,
        stage=StageReference.of(step.stage),
        config=step.config,
        resources=step.resources,
        worker_resources=step.worker_resources,
        **rest,
    )


def run_task(task: Task, make_context: MakeContext, report: Report) -> Outcome:
    """Run one attempt and commit it. Never raises for a failing stage: the outcome says what went wrong.

    An attempt that fails leaves its log and its files for inspection, and no commit.
    """
    started = time.monotonic()
    store = task.store
    attempt = store.begin(task.key, task.attempt)
    try:
        commit = _attempt(task, store, attempt, make_context, report, started)
    except BaseException as error:  # noqa: BLE001 - whatever a stage raises becomes the outcome of its attempt
        with Path(task.log_path).open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        return Outcome(task.step, attempt.name, time.monotonic() - started, error=sentence(error))
    store.drop_work(task.key)
    return Outcome(task.step, attempt.name, time.monotonic() - started, commit=commit)


def _attempt(
    task: Task, store: Store, attempt: Attempt, make_context: MakeContext, report: Report, started: float
) -> Commit:
    with importable(task.import_paths):
        stage = task.stage.load()
        modules = code_modules(stage)
        context = make_context(task, store.work(task.key), report)
        inputs = {slot: Path(path) for slot, path in task.inputs.items()}
        stage.run(task.config, inputs, Output(attempt.data, attempt.observed), context)
    record = {**task.record, "code": modules, "seconds": time.monotonic() - started}
    return store.commit(attempt, record, force=task.force)


def sentence(error: BaseException) -> str:
    """An error as one line: its message, led by its type where the message alone would not be understood."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    if not text:
        return type(error).__name__
    if type(error).__name__ in {"ValueError", "UserError", "StoreError"} and "\n" not in text:
        return text
    return f"{type(error).__name__}: {last}"


@contextlib.contextmanager
def importable(paths: tuple[str, ...]) -> Iterator[None]:
    """Put folders in front of `sys.path` (for good: modules import lazily)."""
    for path in reversed(paths):
        if path not in sys.path:
            sys.path.insert(0, path)
    yield


@contextlib.contextmanager
def output_to(path: str) -> Iterator[None]:
    """Send this process's standard output and error, children included, to the end of a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with Path(path).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
