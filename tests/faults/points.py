"""Named points in the life of an attempt, at which a test does something to the process or its disk.

Points are told by what is about to be written, or was just written, so that they mean the same however the engine is
cut into functions. They are armed in the process that runs the engine; the step is told by the key of its attempt.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import toy_stages

from ropewalk.infra import task
from ropewalk.infra.objects import LocalObjects
from ropewalk.infra.record import RunRecord

WRITES = {
    "before the lease": ("objects/*/leases/*.json", "before"),
    "lease acquired": ("objects/*/leases/*.json", "after"),
    "before the manifest": ("objects/*/attempts/*/manifest.json", "before"),
    "before the commit": ("objects/*/commits/*.json", "before"),
    "after the commit": ("objects/*/commits/*.json", "after"),
    "before the release": ("objects/*/leases/*.beat", "before"),
}
OTHERS = ("data half written", "data written", "before it is recorded")
POINTS = (*WRITES, *OTHERS)


def arm(point: str, step: str, act: Callable[[], None], objects: type = LocalObjects) -> None:
    """Call `act` once, when the attempt at `step` (a `total` of the toy stages) comes to the point.

    `objects` is the class through which the store is written.
    """
    state = {"step": "", "done": False}
    _watch_steps(state)

    def fire(content: bytes = b"") -> None:
        if state["step"] == step and not state["done"]:
            state["done"] = True
            act()

    if point in WRITES:
        _watch_writes(objects, *WRITES[point], fire)
    elif point == "before it is recorded":
        append = RunRecord.append
        _replace(RunRecord, "append", lambda self, event: (_ended(event, step) and fire(), append(self, event))[1])
    else:
        _watch_stage(point, fire)


def _watch_steps(state: dict[str, Any]) -> None:
    run_task = task.run_task

    def watched(given: Any, *rest: Any) -> Any:
        state["step"] = given.step
        return run_task(given, *rest)

    task.run_task = watched


def _watch_writes(objects: Any, pattern: str, when: str, fire: Callable[[], None]) -> None:
    release = pattern.endswith(".beat")

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(self: Any, name: str, content: bytes) -> Any:
            matches = fnmatch.fnmatch(name, pattern) and (not release or b'"released": true' in content)
            if matches and when == "before":
                fire()
            result = real(self, name, content)
            if matches and when == "after":
                fire()
            return result

        return write

    for method in ("create", "write"):
        _replace(objects, method, watched(getattr(objects, method)))


def _watch_stage(point: str, fire: Callable[[], None]) -> None:
    real = toy_stages.total.run

    def run(config: Any, inputs: Any, output: Any, context: Any) -> None:
        if point == "data half written":
            (output.data / "value.json").write_text("1")
            fire()
        real(config, inputs, output, context)
        if point == "data written":
            fire()

    _replace(toy_stages.total, "run", staticmethod(run))


def _ended(event: dict[str, Any], step: str) -> bool:
    return event["type"] == "step_succeeded" and event["step"] == step


def _replace(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)
