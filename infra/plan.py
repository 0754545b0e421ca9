"""Planning: what would run, what would be reused, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ropewalk.infra import closure, lease
from ropewalk.infra.external import external_digest
from ropewalk.infra.key import identity, step_key
from ropewalk.infra.reasons import Reason, differences, in_words
from ropewalk.infra.record import History
from ropewalk.infra.step import Pipeline, Step, UserError
from ropewalk.infra.store import Commit, Store

Status = Literal["run", "reuse", "may-run"]
LOOK_AGAIN_SECONDS = 30.0
"""How long a look at the files of an output stands."""


@dataclass(frozen=True)
class Selection:
    """Which steps a run is about. What several of these choose is what all of them choose."""

    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    """`--from`: these steps and what depends on them."""
    until: tuple[str, ...] = ()
    """`--until`: these steps and what they depend on."""
    force: tuple[str, ...] = ()
    """Run these even if they are fresh."""
    with_upstream: bool = False
    """`--only` brings what its steps depend on."""
    rerun_failed: bool = False
    """The steps whose last attempt failed, and what they depend on."""
    rerun_drifted: bool = False
    """Run selected steps anew if their code has changed since their output was made."""

    def names(self, pipeline: Pipeline, failed: Collection[str] = ()) -> set[str]:
        """The selected steps, given those whose last attempt failed. Raises UserError for an unknown one."""
        for name in (*self.only, *self.start, *self.until, *self.force):
            pipeline[name]
        if self.with_upstream and not self.only:
            raise UserError("--with-upstream goes with --only; name the steps")
        chosen = {step.name for step in pipeline}
        if self.only:
            chosen &= _union(pipeline.ancestors, self.only) if self.with_upstream else set(self.only)
        if self.start:
            chosen &= _union(pipeline.descendants, self.start)
        if self.until:
            chosen &= _union(pipeline.ancestors, self.until)
        if self.rerun_failed:
            chosen &= _union(pipeline.ancestors, failed)
        outside = set(self.force) - chosen
        if outside:
            raise UserError(f"--force {sorted(outside)[0]}: the step is not among the selected ones")
        return chosen


@dataclass(frozen=True)
class StepPlan:
    """What would happen to a step."""

    name: str
    status: Status
    key: str | None
    """None as long as it depends on outputs that are not made yet."""
    reason: str
    reasons: tuple[Reason, ...] = ()
    """The same for programs; none for a step that is fresh."""
    document: Mapping[str, Any] | None = None
    commit: Commit | None = None
    commit_number: int = 0
    """The number under which an output that is made now will be committed, and no other."""
    drift: tuple[str, ...] = ()
    """Modules of the stage's code that changed since the output was made."""
    selected: bool = True

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` shows it."""
        reasons = [reason.to_json() for reason in self.reasons]
        return {"name": self.name, "status": self.status, "key": self.key, "reason": self.reason, "reasons": reasons}


@dataclass
class Planner:
    """Plans the steps of one pipeline in order. `decide` is also what a run asks when a step becomes ready."""

    pipeline: Pipeline
    store: Store
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        self._history = History(self.store, self.pipeline.name)
        names = [step.name for step in self.pipeline] if self.selection.rerun_failed else []
        failed = [name for name in names if self._history.failure(name) is not None]
        self._selected = self.selection.names(self.pipeline, failed)
        self._sound: dict[str, tuple[Commit, float]] = {}
        """Outputs that `plan` has found sound, by key, and when."""

    def plan(self) -> list[StepPlan]:
        """The plan of every step."""
        plans: dict[str, StepPlan] = {}
        for step in self.pipeline:
            unsure = sorted({name for name in step.upstream.values() if plans[name].status != "reuse"})
            if unsure:
                plans[step.name] = self._undecided(step, unsure)
            else:
                digests = {name: _committed(plans[name]).digest for name in step.upstream.values()}
                plans[step.name] = plan = self._with_state(self.decide(step, digests))
                if plan.status == "reuse":
                    self._sound[_committed(plan).key] = (_committed(plan), time.monotonic())
        return list(plans.values())

    def is_selected(self, step: Step) -> bool:
        """Whether this run is about the step."""
        return step.name in self._selected

    def decide(self, step: Step, digests: Mapping[str, str]) -> StepPlan:
        """Run or reuse a step whose inputs have these output digests, by step name."""
        modules = closure.code_modules(step.stage)
        document = self.document(step, digests, modules)
        key = step_key(document)
        commit, problems, number = self._newest(key)
        selected = self.is_selected(step)
        if commit is None:
            reasons = self._why_missing(step, key, document, problems)
            return StepPlan(step.name, "run", key, in_words(reasons), reasons, document, None, number, (), selected)
        drift = tuple(closure.changed_modules(commit.record.get("code", {}), modules))
        if drift and step.code_policy == "pin":
            raise UserError(
                f"step {step.name}: its code is pinned but {', '.join(drift)} changed since the output was made;"
                " raise the stage's VERSION or lift the pin"
            )
        told = f"code drift: {', '.join(drift)} changed since"
        reasons = (Reason("drifted", told, {"modules": list(drift)}),) if drift else ()
        if step.name in self.selection.force:
            forced = (Reason("forced", "forced"),)
            return StepPlan(step.name, "run", key, "forced", forced, document, commit, number, drift, selected)
        if drift and self.selection.rerun_drifted and selected:
            return StepPlan(step.name, "run", key, told, reasons, document, commit, number, drift)
        reason = f"up to date; {told}" if drift else "up to date"
        return StepPlan(step.name, "reuse", key, reason, reasons, document, commit, number, drift, selected)

    def _undecided(self, step: Step, unsure: list[str]) -> StepPlan:
        """The plan of a step whose inputs may change."""
        selected = self.is_selected(step)
        text = f"depends on the output of {', '.join(unsure)}"
        if not selected:
            text = f"not selected, and depends on {unsure[0]}, which is not committed"
        reason = Reason("upstream", text, {"steps": unsure})
        return StepPlan(step.name, "may-run", None, text, (reason,), selected=selected)

    def _newest(self, key: str) -> tuple[Commit | None, list[str], int]:
        """The commit of a key, what is wrong with newer ones, and the number that a new one would get.

        A commit that comes between the two looks is found: the number is that after all that were seen.
        """
        commit = self._just_planned(key)
        if commit is not None:
            return commit, [], commit.number + 1
        commit, problems = self.store.latest(key)
        if commit is not None and not problems:
            return commit, problems, commit.number + 1
        number = self.store.next_number(key)
        return (*self.store.latest(key), number) if number else (None, problems, 0)

    def _just_planned(self, key: str) -> Commit | None:
        """The output that a plan has found sound a moment ago; good for one question.

        A run follows its plan at once and need not look at all outputs again. Whether one was withdrawn meanwhile,
        `Store.keep` finds out before it is used; who reads its files looks at them.
        """
        commit, when = self._sound.pop(key, (None, 0.0))
        return commit if time.monotonic() - when < LOOK_AGAIN_SECONDS else None

    def _with_state(self, plan: StepPlan) -> StepPlan:
        """The plan of a step that is to run, with who runs it now."""
        if plan.status != "run" or plan.key is None:
            return plan
        sighting = lease.look(self.store.objects, plan.key)
        if sighting.is_free:
            return plan
        running = Reason("running", f"held by {sighting.holder}", {"holder": str(sighting.holder)})
        reasons = (*plan.reasons, running)
        return replace(plan, reason=in_words(reasons), reasons=reasons)

    def externals(self, step: Step) -> dict[str, str]:
        """Digests of a step's external inputs by slot. Raises UserError for one that is not there."""
        return {
            slot: external_digest(external, f"step {step.name}, input {slot}", self.store)
            for slot, external in step.externals.items()
        }

    def document(self, step: Step, digests: Mapping[str, str], modules: dict[str, str]) -> dict[str, Any]:
        """The identity of a step."""
        externals = self.externals(step)
        inputs = {slot: digests[name] for slot, name in step.upstream.items()}
        code = closure.code_digest(modules) if step.code_policy == "strict" else None
        try:
            return identity(step.stage.NAME, step.stage.VERSION, step.config, inputs, externals, code)
        except (TypeError, ValueError) as error:
            raise UserError(f"step {step.name}: {error}") from None

    def _why_missing(
        self, step: Step, key: str, document: Mapping[str, Any], problems: list[str]
    ) -> tuple[Reason, ...]:
        if problems:
            return (Reason("corrupt", "corrupt output: " + "; ".join(problems), {"problems": problems}),)
        failure = self._history.failure(step.name)
        failed: tuple[Reason, ...] = ()
        if failure is not None and failure["key"] == key:
            facts = {"error": failure["error"], "run_id": failure["run_id"]}
            failed = (Reason("failed", f"failed in run {failure['run_id']}: {failure['error']}", facts),)
        before = self._history.output(step.name)
        if before is None:
            return failed or (Reason("never run", "never run"),)
        if before["key"] == key:
            return (*failed, Reason("deleted", "its output was deleted"))
        changed = differences(before["identity"], document) or [Reason("identity", "its identity changed")]
        return (*changed, *failed)


def _union(reach: Callable[[str], set[str]], names: Collection[str]) -> set[str]:
    return set().union(*(reach(name) for name in names))


def _committed(plan: StepPlan) -> Commit:
    if plan.commit is None:
        raise AssertionError(f"step {plan.name} is planned for reuse without a commit")
    return plan.commit


def check_selection(planner: Planner) -> list[StepPlan]:
    """The plan, refused with a UserError where a selected step needs an output that nothing selected will make, or an
    external input that is not there: before hours of work, not after.
    """
    plans = planner.plan()
    by_name = {plan.name: plan for plan in plans}
    for step in planner.pipeline:
        if not planner.is_selected(step) or by_name[step.name].status == "reuse":
            continue
        if by_name[step.name].document is None:
            planner.externals(step)
        for name in step.upstream.values():
            if by_name[name].status != "reuse" and not planner.is_selected(planner.pipeline[name]):
                raise UserError(
                    f"step {step.name} needs the output of {name}, which is neither committed nor selected;"
                    f" add --until {step.name} or run {name} first"
                )
    return plans
