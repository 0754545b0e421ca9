"""The `ropewalk` command: every command's options, and which function does its work.

Nothing heavy is imported here, so that `--help` and completion are instant; what a command needs it imports itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ropewalk.pipelines import completion
from ropewalk.pipelines.app import app, command, main
from ropewalk.pipelines.options import (
    DASHBOARD,
    DEFAULT_STORE,
    PIPELINE,
    AddressOption,
    ExecutorOption,
    JobAddressOption,
    JsonOption,
    OptionalRunArgument,
    OptionalStepArgument,
    PipelineOptions,
    PolicyOptions,
    RunArgument,
    SelectionOptions,
    SettingOptions,
    StepArgument,
    StoreOption,
)

__all__ = ["app", "main"]
PIPELINES, RUNS, STORE, MACHINE = "Pipelines", "Runs", "Store", "This machine"


@command(PIPELINES, "ropewalk run quickstart --set extend.seed=2")
def run(
    asked: PipelineOptions,
    selected: SelectionOptions,
    how: PolicyOptions,
    store: StoreOption = DEFAULT_STORE,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    run_id: Annotated[str | None, typer.Option(help="Id for the run, chosen by who submits it.", hidden=True)] = None,
    as_json: JsonOption = False,
) -> int:
    """Run a pipeline: reuse what is fresh, run the rest."""
    from ropewalk.pipelines.run_commands import run_pipeline

    return run_pipeline(asked.request, store, selected.selection, how, executor, address, run_id, as_json)


@command(PIPELINES, "ropewalk plan quickstart")
def plan(
    asked: PipelineOptions,
    selected: SelectionOptions,
    store: StoreOption = DEFAULT_STORE,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 2 if work remains.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show what would run, what would be reused, and why."""
    from ropewalk.pipelines.plan_commands import plan_pipeline

    return plan_pipeline(asked.request, store, selected.selection, exit_code, as_json)


@command(PIPELINES, "ropewalk explain quickstart extend")
def explain(
    asked: PipelineOptions, step: StepArgument, store: StoreOption = DEFAULT_STORE, as_json: JsonOption = False
) -> int:
    """Say why a step is fresh or stale, field by field."""
    from ropewalk.pipelines.plan_commands import explain_step

    return explain_step(asked.request, store, step, as_json)


@command(PIPELINES, "ropewalk graph quickstart --format dot --status")
def graph(
    asked: PipelineOptions,
    store: StoreOption = DEFAULT_STORE,
    form: Annotated[Literal["mermaid", "dot"], typer.Option("--format", help="Language of the drawing.")] = "mermaid",
    with_status: Annotated[bool, typer.Option("--status", help="Show what a run would do to each step.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Print the graph of a pipeline's steps."""
    from ropewalk.pipelines.graph_command import show_graph

    return show_graph(asked.request, store, form=form, with_status=with_status, as_json=as_json)


@command(
    PIPELINES,
    "ropewalk submit quickstart --address http://head:8265 --store s3://bucket/prefix",
    "ropewalk submit quickstart --kuberay --store s3://bucket/prefix -o rayjob.yaml",
)
def submit(
    asked: PipelineOptions,
    selected: SelectionOptions,
    how: PolicyOptions,
    address: Annotated[str, typer.Option(help="Address of the cluster's dashboard.")] = DASHBOARD,
    store: StoreOption = DEFAULT_STORE,
    wait: Annotated[bool, typer.Option(help="Follow the log, and end as the run ends.")] = True,
    env: Annotated[
        list[str], typer.Option(metavar="NAME[=VALUE]", help="Environment of the run; NAME alone: as it is here.")
    ] = [],  # noqa: B006 - typer copies it
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
    """Run a pipeline on a Ray cluster, or print a Kubernetes manifest that does."""
    from ropewalk.pipelines.submit_commands import Asked, Manifest, print_manifest, submit_pipeline

    job = Asked(asked, selected, how, store, shared_store, tuple(env))
    if kuberay:
        return print_manifest(job, Manifest(image, workers, tuple(secret), output, crd), as_json)
    return submit_pipeline(job, address=address, wait=wait, wheel=wheel, as_json=as_json)


@command(RUNS, "ropewalk status --watch")
def status(
    store: StoreOption = DEFAULT_STORE,
    watch: Annotated[bool, typer.Option("--watch", help="Show them until Ctrl-C, as they change.")] = False,
    as_json: JsonOption = False,
) -> int:
    """List the runs of a store and how they stand."""
    from ropewalk.pipelines.status_commands import show_status, watch_status

    return watch_status(store, as_json) if watch else show_status(store, as_json)


@command(RUNS, "ropewalk show last extend")
def show(
    run_id: RunArgument,
    step: OptionalStepArgument = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> int:
    """Show a run, or one of its steps: config, inputs, output, metrics, log."""
    from ropewalk.pipelines.status_commands import show_run

    return show_run(store, run_id, step, as_json)


@command(RUNS, "ropewalk logs last extend -f")
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
    """Print what the steps of a run wrote, workers included."""
    from ropewalk.pipelines.logs_command import show_driver_log, show_logs

    if driver or address:
        return show_driver_log(store, run_id, address, follow=follow, as_json=as_json)
    return show_logs(store, run_id, step, attempt=attempt, follow=follow, as_json=as_json)


@command(RUNS, "ropewalk rerun last report")
def rerun(
    run_id: RunArgument,
    selected: SelectionOptions,
    how: PolicyOptions,
    step: OptionalStepArgument = None,
    store: StoreOption = DEFAULT_STORE,
    failed: Annotated[bool, typer.Option("--failed", help="Only what failed in that run, and what it needs.")] = False,
    address: AddressOption = None,
    executor: ExecutorOption = "ray",
    as_json: JsonOption = False,
) -> int:
    """Ask for an earlier run again; with STEP or --from STEP, run that anew."""
    from ropewalk.pipelines.run_commands import rerun_request, run_pipeline

    request, selection = rerun_request(store, run_id, step, selected.selection, failed=failed)
    return run_pipeline(request, store, selection, how, executor, address, None, as_json)


@command(RUNS, "ropewalk cancel last")
def cancel(
    run_id: RunArgument,
    store: StoreOption = DEFAULT_STORE,
    now: Annotated[bool, typer.Option("--now", help="At once, instead of letting steps save first.")] = False,
    address: JobAddressOption = None,
    as_json: JsonOption = False,
) -> int:
    """Stop a run, on this machine or another that uses the store."""
    from ropewalk.pipelines.cancel_command import cancel_job, cancel_run

    if address:
        return cancel_job(run_id, address, now=now, as_json=as_json)
    return cancel_run(store, run_id, now=now, as_json=as_json)


@command(RUNS, "ropewalk sync last", "ropewalk sync --all")
def sync(
    run_id: OptionalRunArgument = None,
    store: StoreOption = DEFAULT_STORE,
    all_runs: Annotated[bool, typer.Option("--all", help="Every run that MLflow does not have whole.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Bring MLflow up to date with the record of a run, or of all."""
    from ropewalk.pipelines.tracking_commands import sync_runs

    return sync_runs(store, run_id, all_runs=all_runs, as_json=as_json)


@command(STORE, "ropewalk verify quickstart --deep --repair")
def verify(
    settings: SettingOptions,
    pipeline: Annotated[
        str | None,
        typer.Argument(
            metavar="[PIPELINE]",
            help=f"{PIPELINE} Only what it would reuse is checked. Default: all in the store.",
            autocompletion=completion.pipelines,
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only of this run.", autocompletion=completion.runs)
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Only this key; its first digits will do.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Compare contents, not only sizes.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Let the next run make again what is corrupt.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Check committed outputs against what was committed."""
    from ropewalk.pipelines.store_commands import verify_outputs

    request = {"pipeline": pipeline, "set": settings.set_, "param": settings.param} if pipeline else None
    return verify_outputs(request, store, run_id=run_id, key=key, deep=deep, repair=repair, as_json=as_json)


@command(STORE, "ropewalk gc --keep-runs 5 --yes")
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
    """Remove what no kept run uses: mark it now, remove it a day later."""
    from ropewalk.pipelines.store_commands import collect_garbage, pin_runs

    if pin or unpin:
        return pin_runs(store, pin, unpin, as_json)
    return collect_garbage(store, keep_runs, grace_hours, yes=yes, with_runs=with_runs, as_json=as_json)


@command(STORE, "ropewalk adopt /data/books --name books --include '**/*.parquet'")
def adopt(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file, a folder, or hf://datasets/owner/repo@COMMIT.",
            autocompletion=completion.files,
        ),
    ],
    name: Annotated[str, typer.Option(help='What pipelines call it: External("adopted://NAME").')],
    store: StoreOption = DEFAULT_STORE,
    copy: Annotated[bool, typer.Option("--copy", help="Keep a copy of the files in the store.")] = False,
    include: Annotated[list[str], typer.Option(metavar="GLOB", help="Only these files; repeatable.")] = [],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(metavar="GLOB", help="Not these files; repeatable.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> int:
    """Register outside data for pipelines."""
    from ropewalk.pipelines.store_commands import adopt_data

    return adopt_data(source, store, name, copy=copy, include=include, exclude=exclude, as_json=as_json)


@command(RUNS, "ropewalk ui")
def ui(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 5000,
    as_json: JsonOption = False,
) -> int:
    """Start the MLflow UI on the store's runs; print its address and the Ray dashboards'."""
    from ropewalk.pipelines.tracking_commands import show_ui

    return show_ui(store, host, port, as_json)


@command(MACHINE, "ropewalk doctor --store s3://bucket/prefix")
def doctor(
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Check this cluster, too; http://HOST:8265, its dashboard.")
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Check this machine, the store, MLflow and a cluster."""
    from ropewalk.pipelines.doctor_command import show_diagnosis

    return show_diagnosis(store, address, as_json)


if __name__ == "__main__":
    main()
