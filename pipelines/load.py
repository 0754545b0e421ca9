"""Finds a pipeline by name or file, and calls its `pipeline()` with the user's parameters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ropewalk.infra.step import Pipeline, UserError, unknown


@dataclass(frozen=True)
class Loaded:
    """A pipeline and where its file's own modules are imported from."""

    pipeline: Pipeline
    import_paths: tuple[str, ...] = ()


def pipeline_names() -> list[str]:
    """The pipelines that come with the package."""
    # By their text: importing every module of the room to look for the function would be slow.
    room = Path(__file__).parent
    return sorted(path.stem for path in room.glob("*.py") if "\ndef pipeline(" in path.read_text(encoding="utf-8"))


def load_pipeline(target: str, parameters: Sequence[str] = (), settings: Sequence[str] = ()) -> Loaded:
    """The pipeline of a name in `pipelines/` or of a Python file, with `name=value` parameters and settings applied.

    Raises UserError naming the file, parameter or field at fault.
    """
    module, paths = _module(target)
    build = getattr(module, "pipeline", None)
    if build is None:
        raise UserError(f"{target} defines no pipeline() function")
    pipeline = build(**_arguments(build, parameters))
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"{target}: pipeline() returned a {type(pipeline).__name__}, not a Pipeline")
    return Loaded(pipeline.with_settings(settings), paths)


def pipeline_parameters(target: str) -> list[str]:
    """Names of the parameters that `pipeline()` takes."""
    return list(inspect.signature(_module(target)[0].pipeline).parameters)


def _module(target: str) -> tuple[Any, tuple[str, ...]]:
    path = Path(target)
    if path.suffix != ".py" and not path.exists():
        if target not in pipeline_names():
            raise UserError(unknown("pipeline", target, pipeline_names()))
        return importlib.import_module(f"ropewalk.pipelines.{target}"), ()
    if not path.is_file():
        raise UserError(f"pipeline file {target} does not exist")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"pipeline file {target} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Under its own name, so that stages defined in the file can be imported by other processes.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module, (folder,)


def _arguments(build: Callable[..., Any], parameters: Sequence[str]) -> dict[str, Any]:
    known = inspect.signature(build, eval_str=True).parameters
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        name, equals, text = parameter.partition("=")
        if not equals:
            raise UserError(f"--param {parameter}: write it as name=value")
        if name not in known:
            raise UserError(f"--param {parameter}: {unknown('parameter', name, list(known))}")
        try:
            arguments[name] = TypeAdapter(known[name].annotation).validate_strings(text)
        except ValidationError as error:
            raise UserError(f"--param {name}: {error.errors()[0]['msg']} (got {text!r})") from None
    return arguments
