"""What `ropewalk submit` does: hands a run to a Ray cluster, or prints the Kubernetes manifest that runs it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ropewalk.infra import submit
from ropewalk.infra.plan import Selection
from ropewalk.infra.record import new_run_id
from ropewalk.infra.runner import RunPolicy
from ropewalk.infra.scrub import scrub
from ropewalk.infra.step import Pipeline, UserError
from ropewalk.infra.store import Store
from ropewalk.pipelines.load import load_pipeline

PASSED_ON = ("MLFLOW_TRACKING_URI",)
"""Variables of the submitter's environment that the cluster gets too, if they name a server."""
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


@dataclass(frozen=True)
class Asked:
    """What is to run on the cluster, and with what."""

    request: Mapping[str, Any]
    """`pipeline`, `set` and `param`, as for `run`."""
    store_uri: str
    selection: Selection
    policy: RunPolicy
    shared_store: bool = False
    """The user says that all nodes see the store's folder."""
    env: tuple[str, ...] = ()
    """`NAME=VALUE`, or `NAME` for the value that it has here."""

    @property
    def pipeline_file(self) -> Path | None:
        """The pipeline's file; None for one that comes with the package."""
        path = Path(self.request["pipeline"])
        return path if path.is_file() else None

    def options(self) -> list[str]:
        """The options of `ropewalk run` that ask for the same."""
        values: dict[str, Sequence[str]] = {
            "--set": self.request["set"],
            "--param": self.request["param"],
            "--only": self.selection.only,
            "--from": self.selection.start,
            "--until": self.selection.until,
            "--force": self.selection.force,
            "--on-locked": [self.policy.on_locked] if self.policy.on_locked != "wait" else [],
            "--max-parallel": [str(self.policy.max_parallel_steps)] if self.policy.max_parallel_steps else [],
        }
        given = [text for option, texts in values.items() for value in texts for text in (option, value)]
        return [*given, *(["--fail-fast"] if self.policy.fail_fast else [])]

    def load(self) -> Pipeline:
        """The pipeline, loaded here so that a wrong name or setting is refused before anything is sent."""
        loaded = load_pipeline(self.request["pipeline"], self.request["param"], self.request["set"])
        self.selection.names(loaded.pipeline)
        return loaded.pipeline

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
    from ropewalk.infra.wheel import unpack_wheel

    console = Console(stderr=as_json)
    asked.load()
    environment = asked.variables()
    submit.connect(address)
    same_machine = submit.check_store_for(address, asked.store_uri, shared=asked.shared_store)
    store_uri, file = _absolute(asked.store_uri), asked.pipeline_file
    request = {**asked.request, "pipeline": str(file.resolve()) if file else asked.request["pipeline"]}
    job = submit.Job(address, new_run_id(), scrub(request), tuple(sorted(environment)), same_machine)
    options = [*asked.options(), "--run-id", job.submission_id, *(["--json"] if as_json and wait else [])]
    command = submit.run_command(file.name if file else asked.request["pipeline"], store_uri, options)
    with tempfile.TemporaryDirectory(prefix="ropewalk-submit-") as scratch:
        if wheel is None:
            console.print("building the wheel of this code", **PLAIN)
        submit.submit_job(
            job,
            command,
            store=Store(store_uri) if same_machine else None,
            code=unpack_wheel(Path(scratch) / "wheel", wheel),
            working_dir=_working_dir(file, Path(scratch) / "pipeline"),
            variables=environment,
        )
    console.print(f"run {job.submission_id} · submitted to {address} · store {store_uri}", **PLAIN)
    if not wait:
        console.print(f"ropewalk logs {job.submission_id} --store {store_uri} -f  follows it", **PLAIN)
        _emit(job, store_uri, "submitted", {}, as_json)
        return 0
    return _wait(job, store_uri, console, as_json)


def print_manifest(asked: Asked, manifest: Manifest, as_json: bool) -> int:
    """Print the RayJob of a run, or write it to a file; checked against a CRD file, if one is given."""
    from importlib import metadata

    from ropewalk.infra import rayjob

    pipeline = asked.load()
    if not _is_object_store(asked.store_uri) and not asked.shared_store:
        raise UserError(
            f"--store {asked.store_uri} would be a folder of a pod, gone with it: take an object store (--store"
            " s3://bucket/prefix), or say that all pods mount the folder (--shared-store) and add the volume yourself"
        )
    file = asked.pipeline_file
    target = f"{rayjob.PIPELINE_FOLDER}/{file.name}" if file else asked.request["pipeline"]
    job = rayjob.RayJob(
        pipeline,
        submit.run_command(target, _absolute(asked.store_uri), asked.options()),
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
        sys.stdout.write(json.dumps({"documents": job.documents()}, ensure_ascii=False) + "\n")
    elif not manifest.output:
        sys.stdout.write(text)
    return 0


def cancel_job(run_id: str, address: str, as_json: bool) -> int:
    """Stop a submitted run through its cluster: before it has begun, or when its store cannot be reached."""
    stopped = submit.stop_job(submit.Job(address, run_id))
    if not stopped:
        raise UserError(f"the job of run {run_id} has ended; there is nothing to cancel")
    if as_json:
        sys.stdout.write(json.dumps({"run_id": run_id, "address": address}) + "\n")
    else:
        Console().print(f"asked: run {run_id} lets its steps save, then stops", **PLAIN)
    return 0


def _working_dir(pipeline_file: Path | None, folder: Path) -> Path | None:
    from ropewalk.infra.bundle import copy_bundle

    if pipeline_file is None:
        return None
    copy_bundle(pipeline_file, folder)
    return folder


def _wait(job: submit.Job, store_uri: str, console: Console, as_json: bool) -> int:
    lines = LastLine(console.file)
    try:
        end = submit.follow_job(job, lines.write)
    except KeyboardInterrupt:
        console.print(f"\nrun {job.submission_id} goes on; ropewalk cancel {job.submission_id} stops it", **PLAIN)
        return 130
    result = _result(lines.last)
    if end.status != "succeeded" and not result:
        console.print(f"run {job.submission_id} {end.status}: {end.message}", **PLAIN)
        result = {"error": end.message}
    _emit(job, store_uri, end.status, result, as_json)
    return end.exit_code


class LastLine:
    """Passes text on, and remembers the last whole line: with `--json`, the driver's result."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._open = ""
        self.last = ""

    def write(self, text: str) -> None:
        """Take the next part of the log."""
        self._file.write(text)
        self._file.flush()
        *whole, self._open = (self._open + text).split("\n")
        self.last = next((line for line in reversed(whole) if line.strip()), self.last)


def _result(line: str) -> dict[str, Any]:
    """The driver's own result; empty if it came to none."""
    try:
        result = json.loads(line)
    except ValueError:
        return {}
    return result if isinstance(result, dict) and "run_id" in result else {}


def _emit(job: submit.Job, store_uri: str, status: str, result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        facts = {"run_id": job.submission_id, "submission_id": job.submission_id, "address": job.address}
        document = {**result, **facts, "store": store_uri, "status": status}
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")


def _bundle_text(pipeline_file: Path) -> dict[str, str]:
    from ropewalk.infra.bundle import bundled_files

    folder = pipeline_file.resolve().parent
    paths = bundled_files(pipeline_file)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def _is_object_store(store_uri: str) -> bool:
    return "://" in store_uri and not store_uri.startswith("file://")


def _absolute(store_uri: str) -> str:
    if _is_object_store(store_uri):
        return store_uri
    return str(Path(store_uri.removeprefix("file://")).expanduser().absolute())
