"""Runs a pipeline: starts every step when its inputs are committed, reuses what is fresh, records what happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

from ropewalk.infra.executor import Executor
from ropewalk.infra.external import external_uri
from ropewalk.infra.failures import Tries, classify
from ropewalk.infra.journal import Journal, OnEvent
from ropewalk.infra.lease import Stamp, Watch, settings
from ropewalk.infra.open_step import OpenStep
from ropewalk.infra.plan import Planner, StepPlan
from ropewalk.infra.record import RunRecord, run_started
from ropewalk.infra.results import RunResult, StepResult
from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import Pipeline, Step, UserError
from ropewalk.infra.store import Commit, Store, StoreError, new_attempt_name
from ropewalk.infra.task import Outcome, make_task
from ropewalk.infra.watchdog import AT_ONCE, Watchdog

LOOK_SECONDS = 0.5
"""The longest between two looks at a lease that somebody else holds."""


@dataclass(frozen=True)
class RunPolicy:
    """How a run goes about its steps. Nothing of it enters an identity."""

    on_locked: Literal["wait", "fail", "skip"] = "wait"
    """What follows when another run works on the same key."""
    fail_fast: bool = False
    """Start nothing more once a step has failed. Otherwise all goes on that does not depend on it."""
    max_parallel_steps: int | None = None


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
    policy: RunPolicy = field(default_factory=RunPolicy)
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    random: Random = field(default_factory=Random)
    results: dict[str, StepResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plans: dict[str, StepPlan] = {}
        self._open: dict[str, OpenStep] = {}
        self._failed: str | None = None
        self._started = False
        self._journal = Journal(self.record, self.on_event)
        self._watchdog = Watchdog(
            self.executor, self.store.objects, self.record.run_id, self.clock, self._journal.event
        )

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline that is run."""
        return self.planner.pipeline

    @property
    def store(self) -> Store:
        """The store that outputs are committed to."""
        return self.planner.store

    def execute(self) -> RunResult:
        """Run to the end. A failed step stops what depends on it; everything else goes on, unless the policy says no.

        Raises UserError if the record of the run cannot be written.
        """
        began = time.monotonic()
        self._journal.event(run_started(self.pipeline, self.store, self.record.run_id))
        try:
            with self._watchdog, self._watchdog.signals(self._num_running):
                while len(self.results) < len(self.pipeline.steps):
                    self._advance()
                    self._wait()
                    self._journal.check()
        except KeyboardInterrupt:
            self._watchdog.ask(AT_ONCE)
        finally:
            if self._started:
                self.executor.stop()
            self._close_open_steps()
            status = self._status()
            self._journal.event({"type": "run_finished", "status": status, "seconds": time.monotonic() - began})
            self._journal.close()
        self._journal.check()
        return RunResult(self.record.run_id, self.pipeline.name, status, [self.results[s.name] for s in self.pipeline])

    def _advance(self) -> None:
        """Decide every step whose inputs are decided, and start what can start."""
        for step in self.pipeline:
            if step.name in self.results:
                continue
            halted = self._halted()
            if halted and not self._is_running(step):
                self._skip(step, halted)
            elif step.name not in self._open:
                self._consider(step)
            if step.name in self._open and not self._is_running(step):
                self._try(self._open[step.name])

    def _halted(self) -> str | None:
        """Why nothing more is started, None if something may be."""
        if self._watchdog.cancelled:
            return "the run was cancelled"
        return f"{self._failed} failed" if self._failed and self.policy.fail_fast else None

    def _is_running(self, step: Step) -> bool:
        return step.name in self._open and self._open[step.name].attempt is not None

    def _num_running(self) -> int:
        return sum(each.attempt is not None for each in self._open.values())

    def _wait(self) -> None:
        """Until something happens: an attempt ends, or it is time to try a step again."""
        if self._num_running():
            for outcome in self.executor.poll(self._report):
                self._finish(outcome)
        elif self._open:
            seconds = min(each.due for each in self._open.values()) - self.clock()
            self.pause(min(max(seconds, 0.0), LOOK_SECONDS))

    def _consider(self, step: Step) -> None:
        """Decide a step if its inputs are decided."""
        inputs = [self.results.get(name) for name in step.upstream.values()]
        missing = [r.name for r in inputs if r is not None and r.commit is None]
        if missing:
            self._skip(step, f"depends on {missing[0]}, which has no output")
            return
        commits = [r.commit for r in inputs if r is not None and r.commit is not None]
        if len(commits) < len(inputs):
            return
        try:
            self._decide(step, {name: each.digest for name, each in zip(step.upstream.values(), commits, strict=True)})
        except (OSError, UserError, StoreError) as error:
            self._undecidable(step, error)

    def _decide(self, step: Step, digests: dict[str, str]) -> None:
        plan = self._plans[step.name] = self.planner.decide(step, digests)
        assert plan.key is not None
        if plan.status == "reuse":
            assert plan.commit is not None
            self._remember(step, plan.commit)
            if self.store.keep(plan.commit):
                self._reuse(step, plan.commit, plan.reason)
            # Else it was being collected as garbage: the step is decided anew.
        elif not plan.selected:
            self._skip(step, "not selected")
        else:
            watch = Watch(self.store.objects, plan.key, self.clock)
            self._open[step.name] = OpenStep(step, plan, plan.key, watch, Tries(step.retries, self.random))

    def _undecidable(self, step: Step, error: Exception) -> None:
        """The store does not answer, or an external input is gone: what runs already is not to suffer from it."""
        self._failed, text = step.name, str(error)
        self._close(StepResult(step.name, "failed", reason=text))
        facts = {"key": None, "attempt": None, "seconds": 0.0, "num_failed": 0, "num_preempted": 0}
        self._journal.event({"type": "step_failed", "step": step.name, "kind": classify(error), "error": text, **facts})

    def _try(self, open_step: OpenStep) -> None:
        """Start an attempt if it is due, there is room and nobody else works on the key."""
        most = self.policy.max_parallel_steps
        if open_step.due > self.clock() or (most is not None and self._num_running() >= most):
            return
        try:
            stamp = open_step.watch.free(open_step.ended)
            number = self.store.next_number(open_step.key)
            commit = self._committed(open_step) if number > open_step.plan.commit_number else None
        except OSError as error:
            text = f"the store does not answer: {error}"
            self._try_again(open_step, Outcome(open_step.step.name, "", 0.0, error=text, kind=classify(error)))
            return
        if commit is not None:
            self._adopt(open_step, commit)
        elif stamp is None:
            self._locked(open_step)
        else:
            # A number that was used, and whose commit counts no more, is never used again.
            open_step.plan = replace(open_step.plan, commit_number=number)
            self._start_unless_changed(open_step, stamp)

    def _committed(self, open_step: OpenStep) -> Commit | None:
        """The output, if another run has committed it since the step was decided."""
        commit, _ = self.store.latest(open_step.key)
        return commit if commit is not None and commit.number >= open_step.plan.commit_number else None

    def _locked(self, open_step: OpenStep) -> None:
        """Another run works on the key: do as the policy says. Waiting occupies nothing."""
        holder, step = open_step.watch.holder, open_step.step
        assert holder is not None
        reason = f"locked by {holder}"
        if self.policy.on_locked == "skip":
            self._skip(step, reason)
        elif self.policy.on_locked == "fail":
            self._fail(open_step, Outcome(step.name, "", 0.0, error=reason, kind="locked"))
        else:
            open_step.due = self.clock() + min(LOOK_SECONDS, holder.ttl_seconds / 4)
            if holder.attempt not in open_step.waited_for:
                open_step.waited_for.add(holder.attempt)
                event = {"type": "step_waiting", "step": step.name, "key": open_step.key, "holder": str(holder)}
                self._journal.event({**event, "reason": reason})

    def _start_unless_changed(self, open_step: OpenStep, stamp: Stamp) -> None:
        """Start an attempt, if outside data is still what the key says; else the step is decided anew."""
        step = open_step.step
        try:
            uris = self._external_uris(open_step)
        except (OSError, UserError, StoreError) as error:
            self._undecidable(step, error)
            return
        if uris is None:
            self._open.pop(step.name)
        else:
            self._start(open_step, stamp, uris)

    def _start(self, open_step: OpenStep, stamp: Stamp, external_uris: dict[str, str]) -> None:
        step, plan, attempt = open_step.step, open_step.plan, new_attempt_name()
        if not self._started:
            self._started = True
            self.on_first_task(self.executor.start())
            self._watchdog.enabled = True
        inputs = self._inputs(step)
        task = make_task(
            step,
            inputs={slot: source["uri"] for slot, source in inputs.items()} | external_uris,
            store_uri=self.store.uri,
            key=open_step.key,
            attempt=attempt,
            run_id=self.record.run_id,
            record={"identity": scrub(plan.document), "step": step.name},
            commit_number=plan.commit_number,
            stale_lease=stamp,
            log_name=self.record.log_name(step.name, attempt),
            import_paths=self.import_paths,
            settings=settings(),
        )
        open_step.attempt, open_step.lost_lease = attempt, False
        open_step.series.begin()
        self._watchdog.begin(step.name, attempt, step.timeout_seconds, step.stall_seconds)
        event = {"type": "step_started", "step": step.name, "key": plan.key, "attempt": attempt, "inputs": inputs}
        self._journal.event({**event, "reason": plan.reason})
        self.executor.submit(task)

    def _finish(self, outcome: Outcome) -> None:
        """Take the end of an attempt: an output, another try, or a failure for good."""
        open_step = self._open[outcome.step]
        open_step.attempt = None
        open_step.ended.add(outcome.attempt)
        verdict = self._watchdog.end(outcome.step)
        if outcome.commit is not None:
            self._complete(open_step, outcome, outcome.commit)
        elif self._watchdog.cancelled:
            reason = f"cancelled: {outcome.error}" if outcome.kind != "cancelled" else f"cancelled ({outcome.error})"
            self._fail(open_step, replace(outcome, error=reason, kind="cancelled"))
        elif open_step.lost_lease:
            self._try_again(open_step, replace(outcome, kind="lease lost"))
        elif verdict is not None:
            end = self._try_again if verdict.is_worth_another_try else self._fail
            end(open_step, replace(outcome, error=verdict.text, kind="timeout"))
        else:
            self._try_again(open_step, outcome)

    def _complete(self, open_step: OpenStep, outcome: Outcome, commit: Commit) -> None:
        if commit.attempt.name != outcome.attempt:
            self._adopt(open_step, commit)
            return
        step, plan = open_step.step, open_step.plan
        self._close(StepResult(step.name, "ran", plan.key, commit, outcome.seconds, plan.reason))
        self._remember(step, commit)
        output = {**commit.output, "num_bytes": commit.num_bytes, "num_files": commit.num_files}
        event = {"type": "step_succeeded", "output": output, "reason": plan.reason, "seconds": outcome.seconds}
        self._journal.event({**event, "step": step.name, "key": plan.key, "attempt": outcome.attempt})

    def _adopt(self, open_step: OpenStep, commit: Commit) -> None:
        """Use the output that another run, or an attempt that had been given up, has committed meanwhile."""
        self._remember(open_step.step, commit)
        self._reuse(open_step.step, commit, f"committed by run {commit.record.get('run_id')} meanwhile")

    def _reuse(self, step: Step, commit: Commit, reason: str) -> None:
        self._close(StepResult(step.name, "reused", commit.key, commit, 0.0, reason))
        event = {"type": "step_reused", "step": step.name, "key": commit.key, "inputs": self._inputs(step)}
        self._journal.event({**event, "output": commit.output, "reason": reason})

    def _skip(self, step: Step, reason: str) -> None:
        self._close(StepResult(step.name, "skipped", reason=reason))
        self._journal.event({"type": "step_skipped", "step": step.name, "reason": reason})

    def _try_again(self, open_step: OpenStep, outcome: Outcome) -> None:
        """Wait for the holder that came between, or for the next attempt; or fail, if there is none."""
        if outcome.kind == "locked":
            return
        seconds = 0.0 if outcome.kind == "lease lost" else open_step.tries.again_in(outcome.kind)
        if seconds is None:
            self._fail(open_step, outcome)
            return
        open_step.due = self.clock() + seconds
        told = {"type": "attempt_failed", "retry_in_seconds": seconds}
        self._journal.event({**told, **open_step.failure(outcome)})

    def _fail(self, open_step: OpenStep, outcome: Outcome) -> None:
        step, failure = open_step.step, open_step.failure(outcome)
        self._failed = step.name
        self._close(StepResult(step.name, "failed", open_step.key, None, outcome.seconds, failure["error"]))
        document = {"run_id": self.record.run_id, "identity": open_step.plan.document, **failure}
        self._journal.write(f"failures/{step.name}.json", document)
        self._journal.event({"type": "step_failed", **failure})

    def _close(self, result: StepResult) -> None:
        """A step has ended."""
        self._open.pop(result.name, None)
        self.results[result.name] = result

    def _close_open_steps(self) -> None:
        """Give a result to the steps that an interrupt or an error of the engine left open."""
        for step in self.pipeline:
            if self._is_running(step):
                open_step = self._open[step.name]
                error = "cancelled: the run was interrupted"
                self._fail(open_step, Outcome(step.name, open_step.attempt or "", 0.0, error=error, kind="cancelled"))
            elif step.name not in self.results:
                self._skip(step, "the run was interrupted")

    def _status(self) -> Literal["succeeded", "failed", "cancelled"]:
        if self._watchdog.cancelled:
            return "cancelled"
        complete = len(self.results) == len(self.pipeline.steps)
        wanted = [r for r in self.results.values() if self.planner.is_selected(self.pipeline[r.name])]
        return "succeeded" if complete and all(r.status in ("ran", "reused") for r in wanted) else "failed"

    def _remember(self, step: Step, commit: Commit) -> None:
        document = {"key": commit.key, "identity": self._plans[step.name].document, "run_id": self.record.run_id}
        self._journal.write(f"steps/{step.name}.json", {**document, **commit.output})

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

    def _external_uris(self, open_step: OpenStep) -> dict[str, str] | None:
        """By slot, what outside data is found by on any machine; None if some is not what the key says."""
        assert open_step.plan.document is not None
        digests, found = open_step.plan.document["externals"], {}
        for slot, external in open_step.step.externals.items():
            place = f"step {open_step.step.name}, input {slot}"
            uri = external_uri(external, place, self.store, digests[slot])
            if uri is None:
                return None
            found[slot] = uri
        return found

    def _report(self, step: str, event: dict[str, Any]) -> None:
        """Take what a step reports while it runs."""
        kind = event["type"]
        self._watchdog.heard(step, kind)
        if kind == "progress":
            self.on_event({**event, "step": step})
        if step in self._open:
            if kind == "lease_lost":
                self._open[step].lost_lease = True
                self.executor.cancel(step)  # Workers of the step on other machines do not see the lease.
            for added in self._open[step].series.to_record(event):
                self._journal.event({**added, "step": step, "attempt": self._open[step].attempt})
