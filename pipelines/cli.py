"""The `ropewalk` command.

Every command takes `--json` and then ends standard output with one JSON object on a single line. The exit status is 0
only if all that was asked for succeeded. Errors are one sentence; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from ropewalk.infra.step import UserError

app = typer.Typer(
    help="Turn a short-context language model into a long-context one: pipelines on Ray, tracked in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PipelineArgument = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A name in pipelines/ (quickstart) or a Python file with pipeline().")
]
StoreOption = Annotated[str, typer.Option("--store", help="Root folder of the store.", envvar="ROPEWALK_STORE")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="STEP.FIELD=VALUE", help="Change a config field; repeatable.")
]
ParamOption = Annotated[
    list[str], typer.Option("--param", metavar="NAME=VALUE", help="Pass a parameter to pipeline(); repeatable.")
]
StepsOption = Annotated[list[str], typer.Option(metavar="STEP", help="Repeatable.")]
JsonOption = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object on one line.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
DEFAULT_STORE = ".ropewalk"


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a command; turn a UserError into one sentence and exit status 1."""

    @app.command()
    @wraps(function)
    def wrapped(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        from pydantic import ValidationError

        from ropewalk.infra.step import first_problem
        from ropewalk.infra.store import StoreError

        try:
            code = function(*args, **kwargs)
        except (UserError, StoreError, ValidationError) as error:
            if debug:
                raise
            message = first_problem(error, error.title) if isinstance(error, ValidationError) else str(error)
            if kwargs.get("as_json"):
                emit({"error": message})
            sys.stderr.write(f"ropewalk: {message}\n")
            raise typer.Exit(1) from None
        except Exception as error:
            if debug or isinstance(error, typer.Exit):
                raise
            sys.stderr.write(f"ropewalk: {type(error).__name__}: {error} (--debug shows where)\n")
            raise typer.Exit(1) from None
        raise typer.Exit(code or 0)

    import inspect

    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**function.__annotations__, "debug": DebugOption}
    return wrapped


def emit(document: dict[str, Any]) -> None:
    """The JSON object that ends standard output."""
    sys.stdout.flush()
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()


@command
def run(
    pipeline: PipelineArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006 - typer copies it
    param: ParamOption = [],  # noqa: B006
    only: StepsOption = [],  # noqa: B006
    from_: Annotated[list[str], typer.Option("--from", metavar="STEP", help="This step and what depends on it.")] = [],  # noqa: B006
    until: StepsOption = [],  # noqa: B006
    force: StepsOption = [],  # noqa: B006
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default: this machine.")] = None,
    executor: Annotated[str, typer.Option(help="ray, or local: one step at a time in this process.")] = "ray",
    as_json: JsonOption = False,
) -> int:
    """Run a pipeline: reuse what is fresh, run the rest. Example: ropewalk run quickstart --set extend.seed=2"""
    from ropewalk.infra.plan import Selection
    from ropewalk.pipelines.commands import run_pipeline

    request = {"pipeline": pipeline, "set": set_, "param": param}
    selection = Selection(tuple(only), tuple(from_), tuple(until), tuple(force))
    return run_pipeline(request, store, selection, executor=executor, address=address, as_json=as_json)


@command
def plan(
    pipeline: PipelineArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006
    param: ParamOption = [],  # noqa: B006
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 2 if work remains.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what would run, what would be reused, and why. Example: ropewalk plan quickstart"""
    from ropewalk.pipelines.commands import make_plan, show_plan

    plans = make_plan({"pipeline": pipeline, "set": set_, "param": param}, store)
    if as_json:
        emit({"steps": [p.to_json() for p in plans]})
    else:
        show_plan(plans)
    return 2 if exit_code and any(p.status != "reuse" for p in plans) else 0


@command
def explain(
    pipeline: PipelineArgument,
    step: Annotated[str, typer.Argument(help="Name of the step.")],
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006
    param: ParamOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> int:
    """Say why a step is fresh or stale, field by field. Example: ropewalk explain quickstart extend"""
    from ropewalk.pipelines.commands import explain_step

    return explain_step({"pipeline": pipeline, "set": set_, "param": param}, store, step, as_json)


@command
def status(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> int:
    """List the runs of a store and how they stand. Example: ropewalk status"""
    from ropewalk.pipelines.commands import show_status

    return show_status(store, as_json)


@command
def show(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or `last`.")],
    step: Annotated[str | None, typer.Argument(help="Name of a step.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> int:
    """Show a run, or one of its steps: config, inputs, output, metrics, log. Example: ropewalk show last extend"""
    from ropewalk.pipelines.commands import show_run

    return show_run(store, run_id, step, as_json)


@command
def rerun(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or `last`.")],
    step: Annotated[str, typer.Argument(help="The step to run again, fresh or not.")],
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default: this machine.")] = None,
    executor: Annotated[str, typer.Option(help="ray, or local.")] = "ray",
    as_json: JsonOption = False,
) -> int:
    """Run one step of an earlier run again, and what its new output makes stale. Example: ropewalk rerun last report"""
    from ropewalk.infra.plan import Selection
    from ropewalk.pipelines.commands import recorded_request, run_pipeline

    request = recorded_request(store, run_id)
    selection = Selection(force=(step,))
    return run_pipeline(request, store, selection, executor=executor, address=address, as_json=as_json)


@command
def sync(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="A run id, or `last`.")],
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> int:
    """Bring MLflow up to date with the record of a run. Example: ropewalk sync last"""
    from ropewalk.pipelines.commands import sync_run

    return sync_run(store, run_id, as_json)


@command
def ui(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 5000,
    as_json: JsonOption = False,
) -> int:
    """Start the MLflow UI on the store's database and print its address and the Ray dashboard's."""
    from ropewalk.infra.ui import serve_ui

    return serve_ui(Path(store).absolute(), host=host, port=port, on_ready=emit if as_json else None)


@command
def doctor(store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False) -> int:
    """Check this machine: packages, store, Ray authentication, MLflow, name clashes. Example: ropewalk doctor"""
    from ropewalk.pipelines.commands import show_diagnosis

    return show_diagnosis(store, as_json)


def main() -> None:
    """Entry point of the `ropewalk` command."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    app()


if __name__ == "__main__":
    main()
