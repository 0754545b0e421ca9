"""How every command behaves: its options, its errors, its exit status.

Every command takes `--json` and then ends standard output with one JSON object on a single line, also when it fails.
The exit status is 0 only if all that was asked for succeeded, 130 after Ctrl-C. Errors are one sentence; `--debug`
shows the traceback as well.
"""

from __future__ import annotations

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import wraps
from importlib import metadata
from typing import Annotated, Any, get_type_hints

import typer
from pydantic import ValidationError

from ropewalk.infra.settings import first_problem
from ropewalk.infra.step import UserError
from ropewalk.pipelines.options import DebugOption, default_of
from ropewalk.pipelines.output import emit, nobody_reads, prepare_streams, silence

INTERRUPTED = 130

app = typer.Typer(
    help="Turn a short-context language model into a long-context one: pipelines on Ray, tracked in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Command = Callable[..., int]
ADVICE = {
    errno.EACCES: ("change its permissions, or name another folder with --store",),
    errno.EPERM: ("change its permissions, or name another folder with --store",),
    errno.EROFS: ("name another folder with --store",),
    errno.ENOTDIR: ("one of these folders is a file",),
    errno.ENOSPC: ("make room there, then do the same again",),
}
"""What to do about the errors of a disk."""


def command(panel: str, *examples: str) -> Callable[[Command], Command]:
    """Register a function as a command, listed in a panel of `ropewalk --help`, with examples in its own help.

    Its parameters are options, or groups of options (dataclasses) that are spread into theirs; `--debug` is added. It
    returns the exit status.
    """

    def register(function: Command) -> Command:
        parameters = list(_parameters(function))

        @wraps(function)
        def wrapped(*, debug: bool = False, **given: Any) -> None:
            arguments = {each.name: each.taken_from(given) for each in parameters}
            raise typer.Exit(_guarded(lambda: function(**arguments), debug=debug, as_json=given["as_json"]))

        option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
        shown = [*(option for each in parameters for option in each.options), option]
        wrapped.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {each.name: each.annotation for each in shown}
        del wrapped.__wrapped__  # typer would read the annotations of `function`
        shown_examples = "\n\n".join(f"Example: {example}" for example in examples)
        app.command(rich_help_panel=panel, help=f"{inspect.getdoc(function)}\n\n{shown_examples}")(wrapped)
        return function

    return register


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"ropewalk {metadata.version('ropewalk')}\n")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


@app.callback()
def _without_command(version: VersionOption = False) -> None:
    """What `ropewalk` takes before a command."""


def main() -> None:
    """Entry point of the `ropewalk` command."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    prepare_streams()
    as_json = "--json" in sys.argv
    status = _guarded(lambda: _parse_and_run(as_json), debug="--debug" in sys.argv, as_json=as_json)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        status = status or 1
    sys.exit(status)


def _parse_and_run(as_json: bool) -> int:
    try:
        return int(app(prog_name="ropewalk", standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        return _refuse(error, as_json)


def _refuse(error: Any, as_json: bool) -> int:
    """Tell what is wrong with the words of the command line; help, if there are none.

    The exit status is 1: that of `plan --exit-code` is 2 if work remains.
    """
    message = error.format_message().strip().rstrip(".").replace("Value error, ", "")
    if not message:
        error.show()
        return 1
    place = error.ctx.command_path if error.ctx is not None else "ropewalk"
    return _fail(f"{message} (`{place} --help` shows what it takes)", as_json)


def _guarded(function: Callable[[], int], *, debug: bool, as_json: bool) -> int:
    """The exit status of a command, or of what went wrong in it, which is told in a sentence."""
    try:
        return function()
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _fail("interrupted", as_json)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            silence(sys.stdout)
            return 1
        if hasattr(error, "format_message"):
            raise
        if debug:
            traceback.print_exc()
        return _fail(in_a_sentence(error), as_json)


def _fail(message: str, as_json: bool) -> int:
    sys.stderr.write(f"ropewalk: {message}\n")
    sys.stderr.flush()
    if as_json:
        emit({"error": message})
    return 1


def in_a_sentence(error: Exception) -> str:
    """What went wrong, for people."""
    from ropewalk.infra.artifact import StoreError

    if isinstance(error, UserError | StoreError):
        return str(error)
    if isinstance(error, ValidationError):
        return first_problem(error, error.title)
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else first
        return "; ".join([text or type(error).__name__, *ADVICE.get(error.errno or 0, ())])
    return f"this should not happen: {type(error).__name__}: {first} (--debug shows where)"


@dataclass(frozen=True)
class _Parameter:
    """A parameter of a command's function, and the options that it is made of."""

    name: str
    options: tuple[inspect.Parameter, ...]
    group: type | None = None

    def taken_from(self, given: Mapping[str, Any]) -> Any:
        """Its value, from those of all options."""
        if self.group is None:
            return given[self.name]
        return self.group(**{option.name: given[option.name] for option in self.options})


def _parameters(function: Command) -> Iterator[_Parameter]:
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if isinstance(hint, type) and is_dataclass(hint):
            kinds = get_type_hints(hint, include_extras=True)
            options = tuple(_option(each, kinds[each.name]) for each in fields(hint))
            yield _Parameter(parameter.name, options, hint)
        else:
            option = parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
            yield _Parameter(parameter.name, (option,))


def _option(each: Field[Any], annotation: Any) -> inspect.Parameter:
    default = default_of(each)
    shown = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)
