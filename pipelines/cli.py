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
from typing import Annotated, Any, Literal

import typer

from ropewalk.infra.step import UserError
from ropewalk.pipelines import completion

app = typer.Typer(
    help="Turn a short-context language model into a long-context one: pipelines on Ray, tracked in MLflow.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PipelineArgument = Annotated[
    str,
    typer.Argument(
        metavar="PIPELINE",
        help="A name in pipelines/ (quickstart) or a Python file with pipeline().",
        autocompletion=completion.pipelines,
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run id, or `last`.", autocompletion=completion.runs)]
StepArgument = Annotated[str, typer.Argument(help="Name of a step.", autocompletion=completion.steps)]
OptionalStepArgument = Annotated[str | None, typer.Argument(help="Name of a step.", autocompletion=completion.steps)]
StoreOption = Annotated[str, typer.Option("--store", help="Root folder of the store.", envvar="ROPEWALK_STORE")]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="STEP.FIELD=VALUE",
        help="Change a config field; repeatable.",
        autocompletion=completion.settings,
    ),
]
ParamOption = Annotated[
    list[str],
    typer.Option(
        "--param",
        metavar="NAME=VALUE",
        help="Pass a parameter to pipeline(); repeatable.",
        autocompletion=completion.parameters,
    ),
]
StepsOption = Annotated[list[str], typer.Option(metavar="STEP", help="Repeatable.", autocompletion=completion.steps)]
FromOption = Annotated[
    list[str],
    typer.Option("--from", metavar="STEP", help="This step and what depends on it.", autocompletion=completion.steps),
]
OnLockedOption = Annotated[
    Literal["wait", "fail", "skip"], typer.Option(help="What to do about a step that another run works on.")
]
FailFastOption = Annotated[
    bool, typer.Option("--fail-fast/--keep-going", help="After a failure start nothing more, or what does not need it.")
]
MaxParallelOption = Annotated[
    int | None, typer.Option("--max-parallel", min=1, metavar="N", help="At most so many steps at the same time.")
]
JobAddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ask this cluster about a submitted run, as long as the store does not know it or is out of reach.",
    ),
]
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
    from_: FromOption = [],  # noqa: B006
    until: StepsOption = [],  # noqa: B006
    force: StepsOption = [],  # noqa: B006
    with_upstream: Annotated[
        bool, typer.Option("--with-upstream", help="With --only: and what the steps depend on.")
    ] = False,
    rerun_failed: Annotated[
        bool, typer.Option("--rerun-failed", help="Only the steps whose last attempt failed, and what they depend on.")
    ] = False,
    rerun_drifted: Annotated[
        bool, typer.Option("--rerun-drifted", help="Run anew what was made by code that has changed since.")
    ] = False,
    on_locked: OnLockedOption = "wait",
    fail_fast: FailFastOption = False,
    max_parallel: MaxParallelOption = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default: this machine.")] = None,
    executor: Annotated[str, typer.Option(help="ray, or local: one step at a time in this process.")] = "ray",
    wait_for_resources: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for a cluster that grows to have room.")
    ] = 0.0,
    run_id: Annotated[str | None, typer.Option(help="Id for the run, chosen by who submits it.", hidden=True)] = None,
    as_json: JsonOption = False,
) -> int:
    """Run a pipeline: reuse what is fresh, run the rest. Example: ropewalk run quickstart --set extend.seed=2"""
    from ropewalk.infra.plan import Selection
    from ropewalk.infra.runner import RunPolicy
    from ropewalk.pipelines.commands import run_pipeline

    request = {"pipeline": pipeline, "set": set_, "param": param}
    names = (tuple(only), tuple(from_), tuple(until), tuple(force))
    selection = Selection(*names, with_upstream, rerun_failed, rerun_drifted)
    return run_pipeline(
        request,
        store,
        selection,
        executor=executor,
        address=address,
        wait_for_resources=wait_for_resources,
        run_id=run_id,
        as_json=as_json,
        policy=RunPolicy(on_locked, fail_fast, max_parallel),
    )


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
    step: StepArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006
    param: ParamOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> int:
    """Say why a step is fresh or stale, field by field. Example: ropewalk explain quickstart extend"""
    from ropewalk.pipelines.commands import explain_step

    return explain_step({"pipeline": pipeline, "set": set_, "param": param}, store, step, as_json)


@command
def graph(
    pipeline: PipelineArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006
    param: ParamOption = [],  # noqa: B006
    form: Annotated[Literal["mermaid", "dot"], typer.Option("--format", help="Language of the drawing.")] = "mermaid",
    with_status: Annotated[bool, typer.Option("--status", help="Show what a run would do to each step.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Print the graph of a pipeline's steps. Example: ropewalk graph quickstart --format dot --status"""
    from ropewalk.pipelines.graph_command import show_graph

    request = {"pipeline": pipeline, "set": set_, "param": param}
    return show_graph(request, store, form=form, with_status=with_status, as_json=as_json)


@command
def status(
    store: StoreOption = DEFAULT_STORE,
    watch: Annotated[bool, typer.Option("--watch", help="Show them until Ctrl-C, as they change.")] = False,
    as_json: JsonOption = False,
) -> int:
    """List the runs of a store and how they stand. Example: ropewalk status --watch"""
    from ropewalk.pipelines.commands import show_status
    from ropewalk.pipelines.run_commands import watch_status

    return watch_status(store) if watch and not as_json else show_status(store, as_json)


@command
def show(
    run_id: RunArgument,
    step: OptionalStepArgument = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> int:
    """Show a run, or one of its steps: config, inputs, output, metrics, log. Example: ropewalk show last extend"""
    from ropewalk.pipelines.commands import show_run

    return show_run(store, run_id, step, as_json)


@command
def rerun(
    run_id: RunArgument,
    step: OptionalStepArgument = None,
    store: StoreOption = DEFAULT_STORE,
    failed: Annotated[bool, typer.Option("--failed", help="Only what failed in that run, and what it needs.")] = False,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STEP", help="This step anew, and what depends on it.", autocompletion=completion.steps
        ),
    ] = None,
    on_locked: OnLockedOption = "wait",
    fail_fast: FailFastOption = False,
    max_parallel: MaxParallelOption = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; default: this machine.")] = None,
    executor: Annotated[str, typer.Option(help="ray, or local.")] = "ray",
    as_json: JsonOption = False,
) -> int:
    """Ask for an earlier run again; with STEP, run that step anew. Example: ropewalk rerun last report"""
    from ropewalk.infra.runner import RunPolicy
    from ropewalk.pipelines.commands import run_pipeline
    from ropewalk.pipelines.run_commands import rerun_request

    request, selection = rerun_request(store, run_id, step, failed=failed, start=from_)
    policy = RunPolicy(on_locked, fail_fast, max_parallel)
    return run_pipeline(request, store, selection, executor=executor, address=address, as_json=as_json, policy=policy)


@command
def cancel(
    run_id: RunArgument,
    store: StoreOption = DEFAULT_STORE,
    now: Annotated[bool, typer.Option("--now", help="At once, instead of letting steps save first.")] = False,
    address: JobAddressOption = None,
    as_json: JsonOption = False,
) -> int:
    """Stop a run, on this machine or another that uses the store. Example: ropewalk cancel last"""
    from ropewalk.pipelines.run_commands import cancel_run
    from ropewalk.pipelines.submit_commands import cancel_job

    if address:
        return cancel_job(run_id, address, as_json)
    return cancel_run(store, run_id, now=now, as_json=as_json)


@command
def submit(
    pipeline: PipelineArgument,
    address: Annotated[str, typer.Option(help="Address of the cluster's dashboard.")] = "http://127.0.0.1:8265",
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006
    param: ParamOption = [],  # noqa: B006
    only: StepsOption = [],  # noqa: B006
    from_: FromOption = [],  # noqa: B006
    until: StepsOption = [],  # noqa: B006
    force: StepsOption = [],  # noqa: B006
    on_locked: OnLockedOption = "wait",
    fail_fast: FailFastOption = False,
    max_parallel: MaxParallelOption = None,
    wait: Annotated[bool, typer.Option(help="Follow the log, and end as the run ends.")] = True,
    env: Annotated[
        list[str], typer.Option(metavar="NAME[=VALUE]", help="Environment of the run; NAME alone: as it is here.")
    ] = [],  # noqa: B006
    wheel: Annotated[Path | None, typer.Option(help="Ship this wheel instead of the code that runs here.")] = None,
    shared_store: Annotated[
        bool, typer.Option("--shared-store", help="All nodes of the cluster see the store's folder.")
    ] = False,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="Print a RayJob manifest and submit nothing.")] = False,
    image: Annotated[str, typer.Option(help="--kuberay: image of all pods.")] = "ropewalk:latest",
    workers: Annotated[int, typer.Option(min=1, help="--kuberay: pods in each group of workers.")] = 1,
    secret: Annotated[
        list[str], typer.Option(metavar="NAME", help="--kuberay: Kubernetes secret whose entries become variables.")
    ] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option("--output", "-o", help="--kuberay: write the manifest here.")] = None,
    crd: Annotated[Path | None, typer.Option(help="--kuberay: check the manifest against this CRD file.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Run a pipeline on a Ray cluster, or print a Kubernetes manifest that does.

    Examples: ropewalk submit quickstart --address http://head:8265 --store s3://bucket/prefix;
    ropewalk submit quickstart --kuberay --store s3://bucket/prefix -o rayjob.yaml
    """
    from ropewalk.infra.plan import Selection
    from ropewalk.infra.runner import RunPolicy
    from ropewalk.pipelines.submit_commands import Asked, Manifest, print_manifest, submit_pipeline

    request = {"pipeline": pipeline, "set": set_, "param": param}
    selection = Selection(tuple(only), tuple(from_), tuple(until), tuple(force))
    asked = Asked(request, store, selection, RunPolicy(on_locked, fail_fast, max_parallel), shared_store, tuple(env))
    if kuberay:
        return print_manifest(asked, Manifest(image, workers, tuple(secret), output, crd), as_json)
    return submit_pipeline(asked, address=address, wait=wait, wheel=wheel, as_json=as_json)


@command
def logs(
    run_id: RunArgument = "last",
    step: OptionalStepArgument = None,
    store: StoreOption = DEFAULT_STORE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    attempt: Annotated[int | None, typer.Option(min=1, help="This attempt at each step only; 1 is the first.")] = None,
    driver: Annotated[bool, typer.Option("--driver", help="The log of a submitted run's driver.")] = False,
    address: JobAddressOption = None,
    as_json: JsonOption = False,
) -> int:
    """Print what the steps of a run wrote, workers included. Example: ropewalk logs last extend -f"""
    from ropewalk.pipelines.logs_command import show_driver_log, show_logs

    if driver or address:
        return show_driver_log(store, run_id, address, follow=follow, as_json=as_json)
    return show_logs(store, run_id, step, attempt=attempt, follow=follow, as_json=as_json)


@command
def sync(
    run_id: RunArgument = "last",
    store: StoreOption = DEFAULT_STORE,
    all_runs: Annotated[bool, typer.Option("--all", help="Every run that MLflow does not have whole.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Bring MLflow up to date with the record of a run, or of all. Examples: ropewalk sync last; ropewalk sync --all"""
    from ropewalk.pipelines.tracking_commands import sync_all_runs, sync_run

    return sync_all_runs(store, as_json) if all_runs else sync_run(store, run_id, as_json)


@command
def verify(
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="[PIPELINE]",
            help="Only what this pipeline would reuse. Default: all in the store.",
            autocompletion=completion.pipelines,
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = [],  # noqa: B006
    param: ParamOption = [],  # noqa: B006
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only of this run.", autocompletion=completion.runs)
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Only this key; its first digits will do.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Compare contents, not only sizes.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Let the next run make again what is corrupt.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Check committed outputs against what was committed. Example: ropewalk verify quickstart --deep --repair"""
    from ropewalk.pipelines.store_commands import verify_outputs

    request = {"pipeline": pipeline, "set": set_, "param": param} if pipeline else None
    return verify_outputs(request, store, run_id=run_id, key=key, deep=deep, repair=repair, as_json=as_json)


@command
def gc(
    store: StoreOption = DEFAULT_STORE,
    keep_runs: Annotated[int, typer.Option(min=0, help="Keep what the last runs of each pipeline use.")] = 10,
    grace_hours: Annotated[float, typer.Option(min=0, help="Remove what was marked so long ago.")] = 24.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Mark and remove; without it, only show.")] = False,
    with_runs: Annotated[bool, typer.Option("--runs", help="Remove the records of runs that are not kept.")] = False,
    pin: Annotated[
        list[str], typer.Option(metavar="RUN", help="Keep this run's outputs for ever.", autocompletion=completion.runs)
    ] = [],  # noqa: B006
    unpin: Annotated[list[str], typer.Option(metavar="RUN", help="Undo --pin.", autocompletion=completion.runs)] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> int:
    """Remove what no kept run uses: mark it now, remove it a day later. Example: ropewalk gc --keep-runs 5 --yes"""
    from ropewalk.pipelines.store_commands import collect_garbage

    return collect_garbage(
        store,
        keep_runs=keep_runs,
        grace_hours=grace_hours,
        yes=yes,
        with_runs=with_runs,
        pin=pin,
        unpin=unpin,
        as_json=as_json,
    )


@command
def adopt(
    source: Annotated[str, typer.Argument(help="A file, a folder, or hf://datasets/owner/repo@COMMIT.")],
    name: Annotated[str, typer.Option(help='What pipelines call it: External("adopted://NAME").')],
    store: StoreOption = DEFAULT_STORE,
    copy: Annotated[bool, typer.Option("--copy", help="Keep a copy of the files in the store.")] = False,
    include: Annotated[list[str], typer.Option(metavar="GLOB", help="Only these files; repeatable.")] = [],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(metavar="GLOB", help="Not these files; repeatable.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> int:
    """Register outside data for pipelines. Example: ropewalk adopt /data/books --name books --include '**/*.parquet'"""
    from ropewalk.pipelines.store_commands import adopt_data

    return adopt_data(source, store, name, copy=copy, include=include, exclude=exclude, as_json=as_json)


@command
def ui(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 5000,
    as_json: JsonOption = False,
) -> int:
    """Start the MLflow UI on the store's runs; print its address and the Ray dashboards'. Example: ropewalk ui"""
    from ropewalk.infra.store import Store
    from ropewalk.infra.ui import serve_ui

    return serve_ui(Store(store), host=host, port=port, on_ready=emit if as_json else None)


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
