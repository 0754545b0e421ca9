"""Steps and pipelines: which stages, with which configs, in which order.

A step names a stage (a module with `NAME`, `VERSION` and `run`), its config, its inputs by slot (other steps, or
external files) and, apart from these, how it is executed: resources never enter its identity.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel

CodePolicy = Literal["warn", "strict", "pin"]


class UserError(Exception):
    """Something that the user can mend: one sentence that names the field, file or step and what to do."""


class Stage(Protocol):
    """What a stage module offers. `run(config, inputs, output, context)` writes the output.

    It may also offer `check(config, output)`, which raises ValueError if the folder `output` does not hold what the
    stage promises. It is called before the commit.
    """

    NAME: str
    VERSION: int

    @property
    def run(self) -> Any:
        """The work itself."""
        ...


@dataclass(frozen=True)
class Resources:
    """What a process needs of its machine. Never part of an identity."""

    num_cpus: float = 1
    num_gpus: float = 0
    memory_gib: float | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    """Of Ray's custom resources, such as an accelerator type or a zone."""


@dataclass(frozen=True)
class Retries:
    """How often a step is tried again after failures that its input did not cause. Never part of an identity."""

    max_attempts: int = 3
    """Attempts in all, those that a preempted node ended left out."""
    max_preemptions: int = 10
    backoff_seconds: float = 2.0
    """Before the second attempt; it doubles from then on."""
    backoff_cap_seconds: float = 60.0


@dataclass(frozen=True)
class External:
    """Files made outside: a file, or the files of a folder that match `include` and not `exclude`.

    Their content digest enters the key, their path does not.
    """

    path: str
    include: tuple[str, ...] = ("**/*",)
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A stage in a pipeline."""

    name: str
    stage: Any
    """A stage module, or a class with the same members (see `Stage`)."""
    config: BaseModel
    inputs: Mapping[str, Step | External] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    """Of the step's own process. A step that only waits for its workers asks for `num_cpus=0`."""
    worker_resources: Resources = field(default_factory=Resources)
    """Of each worker that the stage starts through `context.map` or `context.gang`."""
    code_policy: CodePolicy = "warn"
    """What follows when the stage's code has changed since its output was made: `warn` says so, `strict` makes the
    code part of the key, `pin` refuses to go on."""
    retries: Retries = field(default_factory=Retries)
    timeout_seconds: float | None = None
    """The longest that an attempt may take, what it waits for its place and its workers left out. One that takes longer
    has failed: another would take as long."""
    stall_seconds: float | None = None
    """The longest without a report from a stage at work. An attempt that stalls is stopped and tried again."""

    @property
    def upstream(self) -> dict[str, str]:
        """Names of the steps that this one reads, by slot."""
        return {slot: source.name for slot, source in self.inputs.items() if isinstance(source, Step)}

    @property
    def externals(self) -> dict[str, External]:
        """External inputs by slot."""
        return {slot: source for slot, source in self.inputs.items() if isinstance(source, External)}


@dataclass(frozen=True)
class Pipeline:
    """A graph of steps, in an order in which every step follows its inputs."""

    name: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for step in self.steps:
            if step.name in seen:
                raise UserError(f"pipeline {self.name}: two steps are called {step.name!r}")
            if not step.name or not all(c.isalnum() or c in "-_" for c in step.name):
                raise UserError(f"pipeline {self.name}: step name {step.name!r} must be letters, digits, '-' and '_'")
            for slot, name in step.upstream.items():
                if name not in seen:
                    raise UserError(
                        f"step {step.name}: input {slot!r} is step {name!r}, which must be listed before it"
                    )
            seen.add(step.name)

    def __getitem__(self, name: str) -> Step:
        for step in self.steps:
            if step.name == name:
                return step
        raise UserError(unknown("step", name, [step.name for step in self.steps]))

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def descendants(self, name: str) -> set[str]:
        """The step and all that depend on it."""
        found = {self[name].name}
        for step in self.steps:
            if found & set(step.upstream.values()):
                found.add(step.name)
        return found

    def ancestors(self, name: str) -> set[str]:
        """The step and all that it depends on."""
        found = {self[name].name}
        for step in reversed(self.steps):
            if step.name in found:
                found |= set(step.upstream.values())
        return found


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """One sentence that refuses a name and offers the nearest right one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    return f"no {what} is called {name!r}; {hint}"
