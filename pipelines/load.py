"""Finds a pipeline by name or file, and calls its `pipeline()` with the user's parameters."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ropewalk.infra.settings import first_problem, with_settings
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
    build = _builder(module, target)
    arguments = _arguments(build, parameters)
    with _blamed_on(target, "its pipeline() failed", _file_of(module)):
        pipeline = build(**arguments)
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"{target}: pipeline() returned {type(pipeline).__name__}, not a Pipeline")
    return Loaded(with_settings(pipeline, settings), paths)


def pipeline_parameters(target: str) -> list[str]:
    """Names of the parameters that `pipeline()` takes."""
    return list(_known(_builder(_module(target)[0], target)))


def _module(target: str) -> tuple[Any, tuple[str, ...]]:
    path = Path(target)
    if path.suffix != ".py" and not path.is_file():
        if target not in pipeline_names():
            raise UserError(_no_such(path))
        return importlib.import_module(f"ropewalk.pipelines.{target}"), ()
    if not path.is_file():
        raise UserError(f"pipeline file {target} does not exist")
    path = path.resolve()
    _refuse_taken_name(path, target)
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path, loader=SourceFileLoader(path.stem, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Under its own name, so that stages defined in the file can be imported by other processes.
    sys.modules[path.stem] = module
    with _blamed_on(target, "the pipeline file cannot be imported", path):
        spec.loader.exec_module(module)
    return module, (folder,)


def _no_such(path: Path) -> str:
    """What to say of a name that is neither a pipeline of the package nor a file."""
    if path.is_dir():
        return f"{path} is a folder: name the Python file in it that defines pipeline()"
    if path.with_name(f"{path.name}.py").is_file():
        return f"no pipeline is called {path.name!r}; did you mean the file {path}.py?"
    return f"{unknown('pipeline', str(path), pipeline_names())}, or name a Python file"


def _refuse_taken_name(path: Path, target: str) -> None:
    """A file whose module would hide an installed one (`json.py`, `ray.py`) breaks whatever imports that one."""
    installed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if path.stem in sys.stdlib_module_names or PathFinder.find_spec(path.stem, installed):
        raise UserError(f"{target}: Python has a module called {path.stem!r} already; give the file another name")


def _builder(module: Any, target: str) -> Callable[..., Any]:
    build = getattr(module, "pipeline", None)
    if not callable(build):
        raise UserError(f"{target} defines no pipeline() function")
    return build


def _file_of(module: Any) -> Path:
    return Path(module.__file__).resolve()


@contextlib.contextmanager
def _blamed_on(target: str, what: str, path: Path) -> Iterator[None]:
    """Turn whatever goes wrong in a user's file into one sentence that names the file and the line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f"{target}, line {line}" if line else target
        raise UserError(f"{place}: {what}: {_complaint(error)} (--debug shows more)") from error


def _complaint(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        return first_problem(error, error.title)
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text.strip().splitlines()[0]}" if text.strip() else type(error).__name__


def _known(build: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of `pipeline()` that can be given by name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(build, eval_str=True).parameters
    return {name: each for name, each in parameters.items() if each.kind in named}


def _arguments(build: Callable[..., Any], parameters: Sequence[str]) -> dict[str, Any]:
    known = _known(build)
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        name, equals, text = parameter.partition("=")
        if not equals:
            raise UserError(f"--param {parameter}: write it as name=value")
        if name not in known:
            raise UserError(f"--param {parameter}: {unknown('parameter', name, list(known))}")
        arguments[name] = _value(name, text, known[name].annotation)
    missing = [name for name, each in known.items() if each.default is each.empty and name not in arguments]
    if missing:
        raise UserError(f"pipeline() needs the parameter {missing[0]}: add --param {missing[0]}=VALUE")
    return arguments


def _value(name: str, text: str, annotation: Any) -> Any:
    """A parameter's value as its annotation wants it; the text itself where there is none."""
    if annotation is inspect.Parameter.empty:
        return text
    try:
        return TypeAdapter(annotation).validate_strings(text)
    except ValidationError as error:
        raise UserError(f"--param {name}: {error.errors()[0]['msg']} (got {text!r})") from None
