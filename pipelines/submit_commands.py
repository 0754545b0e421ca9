"""What `ropewalk submit` does: hands a run to a Ray cluster, or prints the Kubernetes manifest that runs it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ropewalk.infra.jobs import submit
from ropewalk.infra.record import new_run_id
from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import Pipeline, UserError
from ropewalk.pipelines.load import load_pipeline
from ropewalk.pipelines.logs_command import WholeLines
from ropewalk.pipelines.open_store import open_store
from ropewalk.pipelines.options import PipelineOptions, PolicyOptions, SelectionOptions, as_arguments
from ropewalk.pipelines.output import PLAIN, console_on, emit

PASSED_ON = ("MLFLOW_TRACKING_URI",)
"""Variables of the submitter's environment that the cluster gets too, if they name a server."""


@dataclass(frozen=True)
class Asked:
    """What is to run on the cluster, and with what."""

    what: PipelineOptions
    selected: SelectionOptions
    how: PolicyOptions
    store_uri: str
    shared_store: bool = False
    """The user says that all nodes see the store's folder."""
    env: tuple[str, ...] = ()
    """`NAME=VALUE`, or `NAME` for the value that it has here."""

    @property
    def pipeline_file(self) -> Path | None:
        """The pipeline's file; None for one that comes with the package."""
        path = Path(self.what.pipeline)
        return path if path.is_file() else None

    @property
    def request(self) -> dict[str, Any]:
        """What the run's record keeps, so that it can be asked for again on this machine."""
        file = self.pipeline_file
        pipeline = str(file.resolve()) if file else self.what.pipeline
        return {**self.what.request, "pipeline": pipeline, "selection": asdict(self.selected.selection)}

    def command(self, pipeline: str, options: Sequence[str] = ()) -> list[str]:
        """The `ropewalk run` that asks the cluster for the same."""
        words = [word for group in (self.what, self.selected, self.how) for word in as_arguments(group)]
        return submit.run_command(pipeline, _absolute(self.store_uri), [*words, *options])

    def load(self) -> Pipeline:
        """The pipeline, loaded here so that a wrong name or setting is refused before anything is sent."""
        pipeline = load_pipeline(self.what.pipeline, self.what.param, self.what.set_).pipeline
        self.selected.selection.names(pipeline)
        return pipeline

    def variables(self) -> dict[str, str]:
        """The environment to pass on."""
        found = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name, "").startswith("http")}
        for text in self.env:
            name, equals, value = text.partition("=")
            if not name.isidentifier():
                raise UserError(f"--env {name}: write NAME=VALUE, or NAME to pass on the value that it has here")
            if not equals and name not in os.environ:
                raise UserError(f"--env {name}: the variable is not set here; set it, or write --env {name}=VALUE")
            found[name] = value if equals else os.environ[name]
        return found


@dataclass(frozen=True)
class Manifest:
    """What `submit --kuberay` is told beside the run itself."""

    image: str
    workers: int = 1
    secrets: tuple[str, ...] = ()
    output: Path | None = None
    crd: Path | None = None


def submit_pipeline(asked: Asked, *, address: str, wait: bool, wheel: Path | None, as_json: bool) -> int:
    """Submit a run; with `wait`, follow it to its end and end as it ended."""
    from ropewalk.infra.jobs.wheel import unpack_wheel

    console = console_on(sys.stderr if as_json else sys.stdout)
    asked.load()
    environment = asked.variables()
    submit.connect(address)
    same_machine = submit.check_store_for(address, asked.store_uri, shared=asked.shared_store)
    store_uri, file = _absolute(asked.store_uri), asked.pipeline_file
    job = submit.Job(address, new_run_id(), scrub(asked.request), tuple(sorted(environment)), same_machine)
    options = ["--run-id", job.submission_id, *(["--json"] if as_json and wait else [])]
    command = asked.command(file.name if file else asked.what.pipeline, options)
    with tempfile.TemporaryDirectory(prefix="ropewalk-submit-") as scratch:
        if wheel is None:
            console.print("building the wheel of this code", **PLAIN)
        code = unpack_wheel(Path(scratch) / "wheel", wheel)
        working_dir = _working_dir(file, Path(scratch) / "pipeline")
        store = open_store(store_uri)
        if store.is_local and not same_machine:
            store = None  # A folder that the nodes share; whether this machine sees it is not known.
        try:
            submit.submit_job(job, command, store=store, code=code, working_dir=working_dir, variables=environment)
        except KeyboardInterrupt:
            raise UserError(
                f"interrupted while run {job.submission_id} was handed over; it may have begun: `{_cancel(job)}`"
            ) from None
    console.print(f"run {job.submission_id} · submitted to {address} · store {store_uri}", **PLAIN)
    if not wait:
        _tell_how_to_go_on(job, store_uri, console)
        _end_with_json(job, store_uri, "submitted", {}, as_json)
        return 0
    return _wait(job, store_uri, console, as_json)


def print_manifest(asked: Asked, manifest: Manifest, as_json: bool) -> int:
    """Print the RayJob of a run, or write it to a file; checked against a CRD file, if one is given."""
    from importlib import metadata

    from ropewalk.infra.jobs import rayjob

    pipeline = asked.load()
    if not _is_object_store(asked.store_uri) and not asked.shared_store:
        raise UserError(
            f"--store {asked.store_uri} would be a folder of a pod, gone with it: take an object store (--store"
            " s3://bucket/prefix), or say that all pods mount the folder (--shared-store) and add the volume yourself"
        )
    file = asked.pipeline_file
    target = f"{rayjob.PIPELINE_FOLDER}/{file.name}" if file else asked.what.pipeline
    job = rayjob.RayJob(
        pipeline,
        asked.command(target),
        manifest.image,
        metadata.version("ray"),
        manifest.workers,
        asked.variables(),
        manifest.secrets,
        _bundle_text(file) if file else {},
        {step.name: getattr(step.stage, "gang_size", lambda config: 1)(step.config) for step in pipeline},
    )
    text = job.text()
    if manifest.crd:
        rayjob.check_against_crd(job.documents()[-1], manifest.crd)
    if manifest.output:
        manifest.output.write_text(text, encoding="utf-8")
        sys.stderr.write(f"{manifest.output} is written; kubectl apply -f {manifest.output} starts it\n")
    if as_json:
        emit({"documents": job.documents()})
    elif not manifest.output:
        sys.stdout.write(text)
    return 0


def _working_dir(pipeline_file: Path | None, folder: Path) -> Path | None:
    from ropewalk.infra.jobs.bundle import copy_bundle

    if pipeline_file is None:
        return None
    copy_bundle(pipeline_file, folder)
    return folder


def _wait(job: submit.Job, store_uri: str, console: Console, as_json: bool) -> int:
    lines = WholeLines(console.file)
    try:
        end = submit.follow_job(job, lines.write)
    except KeyboardInterrupt:
        lines.close()
        console.print(f"run {job.submission_id} goes on", **PLAIN)
        _tell_how_to_go_on(job, store_uri, console)
        _end_with_json(job, store_uri, "submitted", {}, as_json)
        return 130
    lines.close()
    result = _result(lines.last)
    if end.status != "succeeded" and not result:
        console.print(f"run {job.submission_id} {end.status}: {end.message}", **PLAIN)
        result = {"error": end.message}
    _end_with_json(job, store_uri, end.status, result, as_json)
    return end.exit_code


def _tell_how_to_go_on(job: submit.Job, store_uri: str, console: Console) -> None:
    """How to follow and stop a run from any terminal: through its store, and through its cluster."""
    run = f"{job.submission_id} --store {store_uri}"
    console.print(f"  ropewalk logs {run} -f  follows it; with --address {job.address} through the cluster", **PLAIN)
    console.print(f"  {_cancel(job)}  stops it", **PLAIN)


def _cancel(job: submit.Job) -> str:
    return f"ropewalk cancel {job.submission_id} --address {job.address}"


def _result(line: str) -> dict[str, Any]:
    """What the driver itself ended with: its result or error; empty if it came to neither."""
    try:
        result = json.loads(line)
    except ValueError:
        return {}
    return result if isinstance(result, dict) and result.keys() & {"run_id", "error"} else {}


def _end_with_json(job: submit.Job, store_uri: str, status: str, result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        facts = {"run_id": job.submission_id, "submission_id": job.submission_id, "address": job.address}
        emit({**result, **facts, "store": store_uri, "status": status})


def _bundle_text(pipeline_file: Path) -> dict[str, str]:
    from ropewalk.infra.jobs.bundle import bundled_files

    folder = pipeline_file.resolve().parent
    paths = bundled_files(pipeline_file)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def _is_object_store(store_uri: str) -> bool:
    return "://" in store_uri and not store_uri.startswith("file://")


def _absolute(store_uri: str) -> str:
    if _is_object_store(store_uri):
        return store_uri
    return str(Path(store_uri.removeprefix("file://")).expanduser().absolute())
