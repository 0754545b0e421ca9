"""Settings: `step.field=value` changes to the configs of a pipeline, as a user gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ValidationError

from ropewalk.infra.step import Pipeline, Step, UserError, unknown


def with_settings(pipeline: Pipeline, settings: Sequence[str]) -> Pipeline:
    """The pipeline with `step.field=value` settings applied.

    Values are JSON where they parse as JSON, else strings; the config's own types check them.
    """
    changes: dict[str, list[tuple[str, Any]]] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        name, dot, path = target.partition(".")
        if not (equals and dot and path):
            raise UserError(f"--set {setting}: write it as step.field=value")
        changes.setdefault(pipeline[name].name, []).append((path, _parsed(text)))
    steps = [
        replace(step, config=_changed(step, changes[step.name])) if step.name in changes else step
        for step in pipeline.steps
    ]
    return replace(pipeline, steps=tuple(steps))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _changed(step: Step, changes: Sequence[tuple[str, Any]]) -> BaseModel:
    """The step's config with all changes made, then checked: fields that depend on each other change together."""
    plain = step.config.model_dump()
    for path, value in changes:
        _set(plain, step, path, value)
    try:
        return type(step.config).model_validate(plain)
    except ValidationError as error:
        names = ", ".join(f"{step.name}.{path}" for path, _ in changes)
        raise UserError(f"--set {names}: {first_problem(error, step.name)}") from None


def _set(plain: dict[str, Any], step: Step, path: str, value: Any) -> None:
    node: Any = plain
    model: Any = step.config
    parts = path.split(".")
    for depth, part in enumerate(parts):
        here = ".".join([step.name, *parts[:depth]])
        if isinstance(model, BaseModel) and part not in type(model).model_fields:
            message = unknown("field", part, list(type(model).model_fields))
            raise UserError(f"--set {step.name}.{path}: in {here} {message}")
        if depth == len(parts) - 1:
            break
        node, model = _descend(node, model, part, f"--set {step.name}.{path}: {here}")
    if isinstance(node, list):
        node[_index(node, parts[-1], f"--set {step.name}.{path}")] = value
    else:
        node[parts[-1]] = value


def _descend(node: Any, model: Any, part: str, place: str) -> tuple[Any, Any]:
    if isinstance(node, (list, tuple)):
        index = _index(node, part, place)
        return node[index], model[index]
    inner = getattr(model, part, None) if isinstance(model, BaseModel) else model.get(part)
    if isinstance(node[part], tuple):
        node[part] = list(node[part])
    if not isinstance(node[part], (dict, list)):
        raise UserError(f"{place}.{part} has no fields; it is {node[part]!r}")
    return node[part], inner


def _index(node: Sequence[Any], part: str, place: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{place} has {len(node)} entries; {part!r} is none of 0 to {len(node) - 1}")
    return int(part)


def first_problem(error: ValidationError, prefix: str) -> str:
    """The first complaint of pydantic as one sentence that names the field."""
    problem = error.errors(include_url=False)[0]
    place = ".".join([prefix, *map(str, problem["loc"])])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (got {problem['input']!r})" if problem["loc"] else f"{place}: {message}"
