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
from ropewalk.infra.failures import Kind, classify
from ropewalk.infra.lease import Holder, Lease, LeaseLostError, LockedError, Stamp, acquire
from ropewalk.infra.step import Resources, Step
from ropewalk.infra.store import Commit, Store
from ropewalk.infra.told import told

Report = Callable[[dict[str, Any]], None]
Stop = Callable[[], bool]
Interrupt = Callable[[], None]
MakeContext = Callable[["Task", Path, Report, Stop], Any]
"""Builds what a stage is given as `context` from the task, its work folder, where events go, and whether to stop."""

UNDERSTOOD_ALONE = {"ValueError", "UserError", "StoreError", "WorkerDiedError"}
"""Errors whose message says all."""


class StoppedError(Exception):
    """The stage ended because it was asked to; what it wrote is not its output."""


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
    """URI of each input's data, by slot."""
    store_uri: str
    key: str
    attempt: str
    """Name of the attempt, new for every try."""
    run_id: str
    record: Mapping[str, Any]
    """What goes into the commit beside what the attempt itself finds out."""
    commit_number: int
    """The only number under which the output may be committed. It was fixed when the step was decided."""
    log_name: str
    """The log, relative to the store's folder."""
    stale_lease: Stamp | None = None
    """The state of the key's lease that the driver has seen to be free."""
    resources: Resources = field(default_factory=Resources)
    worker_resources: Resources = field(default_factory=Resources)
    import_paths: tuple[str, ...] = ()
    """Folders that the pipeline file's own modules are imported from."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that hold in every process of a run, as its driver has them."""

    @property
    def store(self) -> Store:
        """The store that the task reads and writes."""
        return Store(self.store_uri)

    @property
    def log_path(self) -> str:
        """The log on this machine."""
        return str(self.store.root / self.log_name)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    step: str
    attempt: str
    seconds: float
    commit: Commit | None = None
    """The step's output; it may be of another attempt that was first."""
    error: str | None = None
    kind: Kind = "committed"


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


def run_task(task: Task, make_context: MakeContext, report: Report, stop: Stop, interrupt: Interrupt) -> Outcome:
    """Run one attempt and commit it. Never raises for a failing stage: the outcome says what went wrong.

    An attempt that fails leaves its log and its files for inspection, no commit and no lease. One that lost its lease
    is discarded: its successor goes on.

    Args:
        task: What to run.
        make_context: Builds the stage's context.
        report: Takes events.
        stop: Says whether the driver wants the attempt to end.
        interrupt: Ends the stage by force, called from another thread: the lease is lost and the stage goes on.
    """
    started = time.monotonic()
    try:
        with importable(task.import_paths), _leased(task, report, interrupt) as lease:
            commit = _committed(task) or _attempt(task, make_context, report, stop, lease)
            _drop_work(task, lease)
    except BaseException as error:  # noqa: BLE001 - whatever a stage raises becomes the outcome of its attempt
        with contextlib.suppress(OSError), Path(task.log_path).open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        kind = _kind(error, stop)
        if kind == "lease lost":
            with contextlib.suppress(OSError):  # What is left is garbage, for `gc` to find.
                task.store.drop_attempt(task.key, task.attempt)
        return Outcome(task.step, task.attempt, time.monotonic() - started, error=sentence(error), kind=kind)
    return Outcome(task.step, task.attempt, time.monotonic() - started, commit=commit)


def run_logged(task: Task, make_context: MakeContext, report: Report, stop: Stop, interrupt: Interrupt) -> Outcome:
    """As `run_task`, with all that this process writes, and what is reported, in the attempt's log meanwhile."""
    log = Path(task.log_path)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        message = f"the log of the step cannot be written: {error}"
        return Outcome(task.step, task.attempt, 0.0, error=message, kind=classify(error))
    with _log_mirror(task), output_to(task.log_path):
        return run_task(task, make_context, told(report), stop, interrupt)


def _log_mirror(task: Task) -> contextlib.AbstractContextManager[Any]:
    if task.store.is_local:
        return contextlib.nullcontext()
    from ropewalk.infra.remote.run_mirror import RunMirror

    return RunMirror.of_log(task.store, task.log_name)


@contextlib.contextmanager
def _leased(task: Task, report: Report, interrupt: Interrupt) -> Iterator[Lease]:
    """Hold the key's lease. It is given back only after the commit, so that the next holder finds it."""
    holder = Holder.here(task.attempt, task.run_id)
    lease = acquire(task.store.objects, task.key, holder, task.stale_lease, report, interrupt)
    try:
        yield lease
    except BaseException as error:
        # Whoever has taken the lease has taken the scratch folder, too: that may be all that went wrong.
        if not isinstance(error, LeaseLostError) and lease.is_taken():
            raise LeaseLostError(f"the lease was lost, then the stage ended: {sentence(error)}") from error
        raise
    finally:
        lease.release()


def _committed(task: Task) -> Commit | None:
    """The output, if the holder before us has committed it since the driver looked.

    Raises LeaseLostError if what it has committed counts no more: the driver decides anew.
    """
    if task.store.next_number(task.key) == task.commit_number:
        return None
    commit, problems = task.store.latest(task.key)
    if commit is None or commit.number < task.commit_number:
        raise LeaseLostError(f"another attempt has used the number of this commit: {'; '.join(problems)}")
    return commit


def _attempt(task: Task, make_context: MakeContext, report: Report, stop: Stop, lease: Lease) -> Commit:
    started = time.monotonic()
    store = task.store
    attempt = store.begin(task.key, task.attempt)
    stage = task.stage.load()
    modules = code_modules(stage)
    with _work(store, task.key, lease.generation) as work:
        context = make_context(task, work, report, lambda: lease.lost() or stop())
        inputs = {slot: store.fetch(uri) for slot, uri in task.inputs.items()}
        stage.run(task.config, inputs, Output(attempt.data, attempt.observed), context)
        if stop():
            raise StoppedError("stopped when it was asked to")
    if hasattr(stage, "check"):
        try:
            stage.check(task.config, attempt.data)
        except Exception:
            # What is broken may come from scratch, and the next attempt would take it from there again.
            _drop_work(task, lease)
            raise
    lease.confirm()
    record = {**task.record, "run_id": task.run_id, "code": modules, "seconds": time.monotonic() - started}
    return store.commit(attempt, record, number=task.commit_number)


@contextlib.contextmanager
def _work(store: Store, key: str, generation: int) -> Iterator[Path]:
    """The key's scratch folder, kept in the object store as well if that is where the store is."""
    folder = store.work(key, generation)
    if store.is_local:
        yield folder
        return
    from ropewalk.infra.remote.work_mirror import WorkMirror

    with WorkMirror(store, key, folder):
        yield folder


def _drop_work(task: Task, lease: Lease) -> None:
    """Remove the key's scratch folder, unless a successor uses it by now. The commit stands, whatever happens here."""
    with contextlib.suppress(LeaseLostError, OSError):
        lease.confirm()
        task.store.drop_work(task.key)


def _kind(error: BaseException, stop: Stop) -> Kind:
    if isinstance(error, LockedError):
        return "locked"
    if isinstance(error, LeaseLostError):
        return "lease lost"
    return "cancelled" if stop() or isinstance(error, StoppedError) else classify(error)


def sentence(error: BaseException) -> str:
    """An error as one line: its message, led by its type where the message alone would not be understood."""
    text = str(error).strip()
    last = text.splitlines()[-1] if text else ""
    if not text:
        return type(error).__name__
    if type(error).__name__ in UNDERSTOOD_ALONE and "\n" not in text:
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
