"""Runs a pipeline: starts every step when its inputs are committed, reuses what is fresh, records what happens."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ropewalk.infra.plan import Planner, StepPlan
from ropewalk.infra.record import RunRecord, git_state, versions
from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import External, Pipeline, Step, UserError
from ropewalk.infra.store import Commit, Store, new_attempt_name
from ropewalk.infra.task import Outcome, Task, make_task

StepStatus = Literal["ran", "reused", "failed", "skipped"]
OnEvent = Callable[[dict[str, Any]], None]


class Executor(Protocol):
    """Where steps run."""

    def start(self) -> dict[str, Any]:
        """Get ready; returns what to tell the user (`dashboard_url`)."""
        ...

    def submit(self, task: Task) -> None:
        """Take a task; it may start at once."""
        ...

    def poll(self, report: Callable[[str, dict[str, Any]], None]) -> list[Outcome]:
        """Wait a moment; pass on events as `report(step, event)`; return the outcomes of tasks that ended."""
        ...

    def cancel(self) -> None:
        """Ask running tasks to stop; asked twice, at once."""
        ...

    def stop(self) -> None:
        """Let go of all that was started."""
        ...


@dataclass
class StepResult:
    """How a step ended in this run."""

    name: str
    status: StepStatus
    key: str | None = None
    commit: Commit | None = None
    seconds: float = 0.0
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As `run --json` shows it."""
        return {
            "name": self.name,
            "status": self.status,
            "key": self.key,
            "output": self.commit.output if self.commit else None,
            "seconds": round(self.seconds, 3),
            "reason": self.reason,
        }


@dataclass
class RunResult:
    """How a run ended."""

    run_id: str
    pipeline: str
    status: Literal["succeeded", "failed", "cancelled"]
    steps: list[StepResult]


@dataclass
class Runner:
    """One run of a pipeline. `execute` does it."""

    planner: Planner
    executor: Executor
    record: RunRecord
    on_event: OnEvent
    import_paths: tuple[str, ...] = ()
    on_first_task: Callable[[dict[str, Any]], None] = lambda started: None
    """Called once, when the first step really has to run, with what the executor's `start` returned."""
    results: dict[str, StepResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans: dict[str, StepPlan] = {}
        self._attempts: dict[str, str] = {}
        self._started = False
        self._cancelled = threading.Event()

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that is run."""
        return self.planner.pipeline

    @property
    def store(self) -> Store:
        """The store that outputs are committed to."""
        return self.planner.store

    def execute(self) -> RunResult:
        """Run to the end. A failed step stops what depends on it; everything else goes on."""
        began = time.monotonic()
        self._event(self._run_started())
        try:
            with self._signals():
                while len(self.results) < len(self.pipeline.steps):
                    self._advance()
                    if self._running():
                        for outcome in self.executor.poll(self._report):
                            self._finish(outcome)
        except KeyboardInterrupt:
            self._cancelled.set()
        finally:
            if self._started:
                self.executor.stop()
            self._close_open_steps()
            status = self._status()
            self._event({"type": "run_finished", "status": status, "seconds": time.monotonic() - began})
            self.record.close()
        return RunResult(self.record.run_id, self.pipeline.name, status, [self.results[s.name] for s in self.pipeline])

    def _close_open_steps(self) -> None:
        """Give a result to the steps that an interrupt or an error of the engine left open."""
        for step in self.pipeline:
            if step.name in self._attempts:
                self._finish(Outcome(step.name, self._attempts[step.name], 0.0, error="interrupted"))
            elif step.name not in self.results:
                self._skip(step, "the run was interrupted")

    def _status(self) -> Literal["succeeded", "failed", "cancelled"]:
        if self._cancelled.is_set():
            return "cancelled"
        complete = len(self.results) == len(self.pipeline.steps)
        wanted = [r for r in self.results.values() if self.planner.is_selected(self.pipeline[r.name])]
        return "succeeded" if complete and all(r.status in ("ran", "reused") for r in wanted) else "failed"

    def _running(self) -> bool:
        return bool(self._attempts)

    def _advance(self) -> None:
        """Decide every step whose inputs are decided."""
        for step in self.pipeline:
            if step.name in self.results or step.name in self._attempts:
                continue
            inputs = [self.results.get(name) for name in step.upstream.values()]
            missing = [r.name for r in inputs if r is not None and r.commit is None]
            if missing:
                self._skip(step, f"depends on {missing[0]}, which has no output")
            elif self._cancelled.is_set():
                self._skip(step, "the run was cancelled")
            elif None not in inputs:
                self._decide(step)

    def _decide(self, step: Step) -> None:
        commits = {name: self.results[name].commit for name in step.upstream.values()}
        plan = self.planner.decide(step, {name: commit.digest for name, commit in commits.items() if commit})
        self._plans[step.name] = plan
        if plan.status == "reuse":
            self._reuse(step, plan)
        elif not plan.selected:
            self._skip(step, "not selected")
        else:
            self._start(step, plan)

    def _reuse(self, step: Step, plan: StepPlan) -> None:
        assert plan.commit is not None
        self.results[step.name] = StepResult(step.name, "reused", plan.key, plan.commit, 0.0, plan.reason)
        self._remember(step, plan, plan.commit)
        output = plan.commit.output
        event = {"type": "step_reused", "key": plan.key, "inputs": self._inputs(step), "output": output}
        self._event({**event, "step": step.name, "reason": plan.reason})

    def _skip(self, step: Step, reason: str) -> None:
        self.results[step.name] = StepResult(step.name, "skipped", reason=reason)
        self._event({"type": "step_skipped", "step": step.name, "reason": reason})

    def _start(self, step: Step, plan: StepPlan) -> None:
        if not self._started:
            self._started = True
            self.on_first_task(self.executor.start())
        assert plan.key is not None
        attempt = new_attempt_name()
        inputs = self._inputs(step)
        task = make_task(
            step,
            inputs={slot: source["uri"] for slot, source in inputs.items()},
            store_uri=self.store.uri,
            key=plan.key,
            attempt=attempt,
            record={"identity": scrub(plan.document), "step": step.name, "run_id": self.record.run_id},
            force=plan.commit is not None,
            log_path=str(self.record.log_path(step.name, attempt)),
            import_paths=self.import_paths,
        )
        self._attempts[step.name] = attempt
        event = {"type": "step_started", "step": step.name, "key": plan.key, "attempt": attempt, "inputs": inputs}
        self._event({**event, "reason": plan.reason})
        self.executor.submit(task)

    def _finish(self, outcome: Outcome) -> None:
        step, plan = self.pipeline[outcome.step], self._plans[outcome.step]
        del self._attempts[outcome.step]
        base = {"step": step.name, "key": plan.key, "attempt": outcome.attempt, "seconds": outcome.seconds}
        commit = outcome.commit
        if commit is None:
            error = outcome.error or "failed"
            self.results[step.name] = StepResult(step.name, "failed", plan.key, None, outcome.seconds, error)
            self._event({"type": "step_failed", "error": error, **base})
            return
        self.results[step.name] = StepResult(step.name, "ran", plan.key, commit, outcome.seconds, plan.reason)
        self._remember(step, plan, commit)
        output = {**commit.output, "num_bytes": commit.num_bytes, "num_files": commit.num_files}
        self._event({"type": "step_succeeded", "output": output, "reason": plan.reason, **base})

    def _remember(self, step: Step, plan: StepPlan, commit: Commit) -> None:
        document = {"key": plan.key, "identity": plan.document, "run_id": self.record.run_id, **commit.output}
        self.record.write(f"steps/{step.name}.json", document)

    def _inputs(self, step: Step) -> dict[str, dict[str, Any]]:
        plan = self._plans[step.name]
        assert plan.document is not None
        found: dict[str, dict[str, Any]] = {}
        for slot, name in step.upstream.items():
            commit = self.results[name].commit
            assert commit is not None
            found[slot] = {**commit.output, "step": name}
        for slot, external in step.externals.items():
            found[slot] = {"uri": external.path, "digest": plan.document["externals"][slot], "step": None}
        return found

    def _report(self, step: str, event: dict[str, Any]) -> None:
        if event["type"] == "progress":
            self.on_event({**event, "step": step})
            return
        metric_step = event.get("step")
        self._event({**event, "step": step, "metric_step": metric_step, "attempt": self._attempts.get(step)})

    def _event(self, event: dict[str, Any]) -> None:
        self.on_event(self.record.append(event))

    def _run_started(self) -> dict[str, Any]:
        return {
            "type": "run_started",
            "run_id": self.record.run_id,
            "pipeline": self.pipeline.name,
            "store_uri": self.store.uri,
            "git": git_state(),
            "versions": versions(),
            "steps": [_described(step) for step in self.pipeline],
        }

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks running steps to save and stop, the second stops them at once."""

        def stop(number: int, frame: Any) -> None:
            again = self._cancelled.is_set()
            self._cancelled.set()
            if self._started:
                self.executor.cancel()
            if again:
                raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        saved = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)


def _described(step: Step) -> dict[str, Any]:
    inputs = {
        slot: {"external": source.path} if isinstance(source, External) else {"step": source.name}
        for slot, source in step.inputs.items()
    }
    config = step.config.model_dump(mode="json")
    return {
        "name": step.name,
        "stage": step.stage.NAME,
        "version": step.stage.VERSION,
        "config": config,
        "inputs": inputs,
    }


def check_selection(planner: Planner) -> list[StepPlan]:
    """The plan, refused with a UserError where a selected step needs an output that nothing selected will make."""
    plans = planner.plan()
    by_name = {plan.name: plan for plan in plans}
    for step in planner.pipeline:
        if not planner.is_selected(step) or by_name[step.name].status == "reuse":
            continue
        for name in step.upstream.values():
            if by_name[name].status != "reuse" and not planner.is_selected(planner.pipeline[name]):
                raise UserError(
                    f"step {step.name} needs the output of {name}, which is neither committed nor selected;"
                    f" add --until {step.name} or run {name} first"
                )
    return plans
