"""Planning: what would run, what would be reused, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ropewalk.infra import closure
from ropewalk.infra.external import external_digest
from ropewalk.infra.key import identity, step_key
from ropewalk.infra.record import previous_step
from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import Pipeline, Step, UserError
from ropewalk.infra.store import Commit, Store

Status = Literal["run", "reuse", "may-run"]


@dataclass(frozen=True)
class Selection:
    """Which steps a run is about."""

    only: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    """`--from`: these steps and what depends on them."""
    until: tuple[str, ...] = ()
    """`--until`: these steps and what they depend on."""
    force: tuple[str, ...] = ()
    """Run these even if they are fresh."""

    def names(self, pipeline: Pipeline) -> set[str]:
        """The selected steps; raises UserError for an unknown one."""
        for name in (*self.only, *self.start, *self.until, *self.force):
            pipeline[name]
        chosen = {step.name for step in pipeline}
        if self.only:
            chosen &= set(self.only)
        if self.start:
            chosen &= set().union(*(pipeline.descendants(name) for name in self.start))
        if self.until:
            chosen &= set().union(*(pipeline.ancestors(name) for name in self.until))
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
    document: Mapping[str, Any] | None = None
    commit: Commit | None = None
    drift: tuple[str, ...] = ()
    """Modules of the stage's code that changed since the output was made."""
    selected: bool = True

    def to_json(self) -> dict[str, Any]:
        """As `plan --json` shows it."""
        return {"name": self.name, "status": self.status, "key": self.key, "reason": self.reason}


@dataclass
class Planner:
    """Plans the steps of one pipeline in order. `decide` is also what a run asks when a step becomes ready."""

    pipeline: Pipeline
    store: Store
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        self._selected = self.selection.names(self.pipeline)

    def plan(self) -> list[StepPlan]:
        """The plan of every step."""
        plans: dict[str, StepPlan] = {}
        for step in self.pipeline:
            unsure = [name for name in step.upstream.values() if plans[name].status != "reuse"]
            if unsure and not self.is_selected(step):
                reason = f"not selected, and depends on {unsure[0]}, which is not committed"
                plans[step.name] = StepPlan(step.name, "may-run", None, reason, selected=False)
            elif unsure:
                reason = f"depends on the output of {', '.join(sorted(set(unsure)))}"
                plans[step.name] = StepPlan(step.name, "may-run", None, reason)
            else:
                digests = {name: _committed(plans[name]).digest for name in step.upstream.values()}
                plans[step.name] = self.decide(step, digests)
        return list(plans.values())

    def is_selected(self, step: Step) -> bool:
        """Whether this run is about the step."""
        return step.name in self._selected

    def decide(self, step: Step, digests: Mapping[str, str]) -> StepPlan:
        """Run or reuse a step whose inputs have these output digests, by step name."""
        modules = closure.code_modules(step.stage)
        document = self.document(step, digests, modules)
        key = step_key(document)
        commit, problems = self.store.latest(key)
        selected = self.is_selected(step)
        if commit is None:
            reason = self._why_missing(step, key, document, problems)
            return StepPlan(step.name, "run", key, reason, document, selected=selected)
        drift = closure.changed_modules(commit.record.get("code", {}), modules)
        if drift and step.code_policy == "pin":
            raise UserError(
                f"step {step.name}: its code is pinned but {', '.join(drift)} changed since the output was made;"
                " raise the stage's VERSION or lift the pin"
            )
        if step.name in self.selection.force:
            return StepPlan(step.name, "run", key, "forced", document, commit, tuple(drift), selected)
        reason = "up to date" + (f"; code drift: {', '.join(drift)} changed since" if drift else "")
        return StepPlan(step.name, "reuse", key, reason, document, commit, tuple(drift), selected)

    def document(self, step: Step, digests: Mapping[str, str], modules: dict[str, str]) -> dict[str, Any]:
        """The identity of a step."""
        externals = {
            slot: external_digest(external, f"step {step.name}, input {slot}", self.store.external_cache)
            for slot, external in step.externals.items()
        }
        inputs = {slot: digests[name] for slot, name in step.upstream.items()}
        code = closure.code_digest(modules) if step.code_policy == "strict" else None
        try:
            return identity(step.stage.NAME, step.stage.VERSION, step.config, inputs, externals, code)
        except (TypeError, ValueError) as error:
            raise UserError(f"step {step.name}: {error}") from None

    def _why_missing(self, step: Step, key: str, document: Mapping[str, Any], problems: list[str]) -> str:
        if problems:
            return "corrupt output: " + "; ".join(problems)
        before = previous_step(self.store, self.pipeline.name, step.name)
        if before is None:
            return "never run"
        if before["key"] == key:
            return "its output was deleted"
        return "; ".join(differences(before["identity"], document)) or "its identity changed"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from a recorded identity document to another, field by field. Records hold no secrets."""
    now = scrub(now)
    found = []
    for part, word in (("stage", "stage"), ("version", "stage version"), ("code", "code digest")):
        if before.get(part) != now.get(part):
            found.append(f"{word} {before.get(part)} -> {now.get(part)}")
    found += _nested(before.get("config", {}), now.get("config", {}), "")
    for part, word in (("inputs", "input"), ("externals", "external input")):
        old, new = before.get(part, {}), now.get(part, {})
        for slot in sorted(old.keys() | new.keys()):
            if old.get(slot) != new.get(slot):
                found.append(f"{word} {slot} {_short(old.get(slot))} -> {_short(new.get(slot))}")
    return found


def _nested(before: Any, now: Any, place: str) -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = sorted(before.keys() | now.keys())
        return [
            line
            for name in names
            for line in _nested(
                before.get(name, "absent"), now.get(name, "absent"), f"{place}.{name}" if place else name
            )
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return [line for i, pair in enumerate(zip(before, now, strict=True)) for line in _nested(*pair, f"{place}.{i}")]
    return [] if before == now and type(before) is type(now) else [f"config {place} {before!r} -> {now!r}"]


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest[:12]


def _committed(plan: StepPlan) -> Commit:
    if plan.commit is None:
        raise AssertionError(f"step {plan.name} is planned for reuse without a commit")
    return plan.commit
