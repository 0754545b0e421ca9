"""What the shell offers on TAB: pipelines, steps, run ids, settings. `ropewalk --install-completion` turns it on.

A completer never fails: whatever goes wrong while the command line is half typed, it offers nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import typer

Completer = Callable[[typer.Context, str], list[str]]


def _offer(find: Callable[[dict[str, Any], str], Iterator[str]]) -> Completer:
    """A completer from a function of the parameters given so far and the incomplete word."""

    @wraps(find)
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        unheard = io.StringIO()  # What a user's file prints when it is imported is no answer.
        try:
            with contextlib.redirect_stdout(unheard), contextlib.redirect_stderr(unheard):
                return [name for name in find(_given(ctx), incomplete) if name.startswith(incomplete)]
        except (Exception, SystemExit):  # noqa: BLE001 - a TAB must never print a traceback
            return []

    complete.__annotations__ = {"ctx": typer.Context, "incomplete": str, "return": list[str]}
    del complete.__wrapped__  # typer would read the signature of `find`
    return complete


def _given(ctx: typer.Context) -> dict[str, Any]:
    """The parameters given so far. Behind an option that still lacks its value, click leaves arguments unparsed."""
    arguments = [parameter.name for parameter in ctx.command.params if parameter.param_type_name == "argument"]
    return {**ctx.params, **dict(zip(arguments, ctx.args, strict=False))}


@_offer
def pipelines(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """Names of the package's pipelines, and Python files and folders that begin like the incomplete path."""
    from ropewalk.pipelines.load import pipeline_names

    yield from pipeline_names()
    for place, path in _places(incomplete):
        if path.is_dir() and not path.name.startswith("."):
            yield f"{place}/"
        elif path.suffix == ".py":
            yield place


@_offer
def folders(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """Folders that begin like the incomplete path."""
    yield from (f"{place}/" for place, path in _places(incomplete) if path.is_dir())


@_offer
def files(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """Files and folders that begin like the incomplete path."""
    yield from (f"{place}/" if path.is_dir() else place for place, path in _places(incomplete))


@_offer
def steps(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """Names of the steps of the pipeline or run that is already named."""
    if params.get("pipeline"):
        yield from (step.name for step in _loaded(params))
    elif params.get("run_id"):
        yield from _steps_of_run(params)


@_offer
def runs(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """`last`, and the run ids of the store."""
    yield "last"
    yield from _run_ids(_store(params))


@_offer
def settings(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """`step.field=` for every field of every step's config."""
    for step in _loaded(params):
        yield from (f"{step.name}.{field}=" for field in _fields(step.config))


@_offer
def parameters(params: dict[str, Any], incomplete: str) -> Iterator[str]:
    """`name=` for every parameter of the pipeline."""
    from ropewalk.pipelines.load import pipeline_parameters

    yield from (f"{name}=" for name in pipeline_parameters(params["pipeline"]))


def _places(incomplete: str) -> Iterator[tuple[str, Path]]:
    """What begins like an incomplete path, as the user would go on writing it and as a path."""
    folder, _, start = incomplete.rpartition("/")
    for path in sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).glob(f"{start}*")):
        yield (f"{folder}/{path.name}" if "/" in incomplete else path.name), path


def _fields(config: Any) -> Iterator[str]:
    """Names of fields, those of inner configs with the way to them."""
    for name in type(config).model_fields:
        inner = getattr(config, name)
        if hasattr(type(inner), "model_fields"):
            yield from (f"{name}.{field}" for field in _fields(inner))
        else:
            yield name


def _run_ids(store: Any) -> list[str]:
    """Runs that this machine knows of, newest first; a TAB does not wait for an object store."""
    return sorted((path.parent.name for path in (store.root / "runs").glob("*/run.json")), reverse=True)


def _loaded(params: dict[str, Any]) -> Any:
    from ropewalk.pipelines.load import load_pipeline

    return load_pipeline(params["pipeline"], params.get("param") or ()).pipeline


def _steps_of_run(params: dict[str, Any]) -> Iterator[str]:
    from ropewalk.infra.record import read_events

    store = _store(params)
    run_id = _run_ids(store)[0] if params["run_id"] == "last" else params["run_id"]
    started = next(event for event in read_events(store, run_id) if event["type"] == "run_started")
    yield from (step["name"] for step in started["steps"])


def _store(params: dict[str, Any]) -> Any:
    from ropewalk.infra.store import Store

    return Store(params["store"])
