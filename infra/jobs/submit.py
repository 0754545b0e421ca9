"""Runs a pipeline on a Ray cluster through Ray Jobs: hands the job in, follows its log, stops it.

A job is the `ropewalk run` command on the cluster's head node, with the code that runs here as a wheel. Ray runs a job
once and never again: what was committed before a job was killed is reused by the next one that is submitted. The run
id is also Ray's submission id.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ropewalk.infra.remote.reachable import why_unreachable
from ropewalk.infra.scrub import scrub_text
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store

JOB_VARIABLE = "ROPEWALK_JOB"
"""Tells the driver on the cluster which job it is; JSON of `Job`."""
STOP_WAIT_SECONDS = 45
"""Between SIGTERM and SIGKILL when a job is stopped: the engine's grace period, and time to close the record."""
PATIENCE_SECONDS = 300.0
"""How long a cluster may not answer while its job is followed."""
POLL_SECONDS = 1.0
OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Variables that Ray's client takes before the address it is given."""


@dataclass(frozen=True)
class Job:
    """A submitted run, as `runs/<run id>/job.json` keeps it."""

    address: str
    """Of the cluster's dashboard, as the submitter reaches it."""
    submission_id: str
    request: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for, with paths of the submitter's machine."""
    variables: tuple[str, ...] = ()
    """Names of the environment variables that were passed on; their values are kept nowhere by us."""
    same_machine: bool = False
    """The store is a folder of the submitter's own machine, where it has written this file."""

    def to_json(self) -> dict[str, Any]:
        """As it is kept."""
        return asdict(self)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    status: Literal["succeeded", "failed", "cancelled"]
    message: str

    @property
    def exit_code(self) -> int:
        """As `ropewalk run` would have ended."""
        return {"succeeded": 0, "failed": 1, "cancelled": 130}[self.status]


def run_command(pipeline: str, store_uri: str, options: Sequence[str]) -> list[str]:
    """The command that a cluster runs. `-P`: whatever folder it starts in stays off the import path."""
    command = ["python", "-P", "-m", "ropewalk.pipelines.cli", "run", pipeline]
    return [*command, "--store", store_uri, *options, "--address", "auto"]


def submit_job(
    job: Job,
    command: Sequence[str],
    *,
    store: Store | None,
    code: Sequence[Path],
    working_dir: Path | None,
    variables: Mapping[str, str],
) -> None:
    """Hand a job to the cluster.

    Args:
        job: Where it goes and what it is called.
        command: What its driver runs.
        store: The store, if this machine has its folder or scratch folder; the job is noted there before it starts.
        code: Folders of the wheel, as `unpack_wheel` lays them out.
        working_dir: Holds the pipeline file and its modules, if the pipeline is a file.
        variables: Environment of the driver and of all its workers.

    Raises:
        UserError: if the cluster does not answer, refuses the login, or refuses the job.
    """
    environment = {
        **variables,
        JOB_VARIABLE: json.dumps(job.to_json()),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    runtime_env: dict[str, Any] = {"py_modules": [str(path) for path in code], "env_vars": environment}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    client = connect(job.address)
    with _explained(job.address), _announced(job, store):
        client.submit_job(entrypoint=shlex.join(command), submission_id=job.submission_id, runtime_env=runtime_env)


def check_store_for(address: str, store_uri: str, *, shared: bool) -> bool:
    """Whether the store is a folder of this machine that the cluster, which runs on this machine too, can reach.

    False for an object store, and for a folder that the user says all nodes share. Raises UserError for a folder that
    the cluster's nodes cannot be expected to see.
    """
    if "://" in store_uri and not store_uri.startswith("file://"):
        return False
    if shared:
        return False
    advice = "take an object store (--store s3://bucket/prefix), or say that all nodes share the folder: --shared-store"
    if not _is_this_machine(urlsplit(address).hostname or ""):
        raise UserError(f"--store {store_uri} is a folder of this machine, and the cluster is another one: {advice}")
    machines = {node.node_ip for node in _nodes(address)}
    if len(machines) > 1:
        raise UserError(
            f"--store {store_uri} is a local folder, and the cluster has {len(machines)} machines: {advice}"
        )
    return True


def describe_cluster(address: str) -> str:
    """What a cluster has, in words. Raises UserError saying what to set if it cannot be used."""
    connect(address)
    nodes = _nodes(address)
    sums = {name: sum(node.resources_total.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    return f"{len(nodes)} nodes, {sums['CPU']:g} CPU, {sums['GPU']:g} GPU"


def driver_job(run_id: str | None) -> Job | None:
    """In a driver that was submitted as this run: its job."""
    text = os.environ.get(JOB_VARIABLE)
    if not text or run_id is None:
        return None
    job = Job(**json.loads(text))
    return job if job.submission_id == run_id else None


def check_same_store(job: Job, store: Store) -> None:
    """In the driver: refuse a store that is not the one the submitter meant, such as a pod's own folder."""
    if job.same_machine and not (store.root / "runs" / job.submission_id / "job.json").is_file():
        raise UserError(
            f"--store {store.uri} is another folder on the cluster than on the machine that submitted the run:"
            " take an object store (--store s3://bucket/prefix), or say that all nodes share the folder: --shared-store"
        )


def read_job(store: Store, run_id: str) -> Job | None:
    """The job of a submitted run; None for a run that was started on its own machine."""
    try:
        text = (store.root / "runs" / run_id / "job.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Job(**json.loads(text))


def follow_job(job: Job, write: Callable[[str], None]) -> JobEnd:
    """Pass on the driver's log as it grows, until the job has ended. Raises UserError if the cluster stays silent."""
    import asyncio

    return asyncio.run(_follow(job, write))


def job_log(job: Job) -> str:
    """The whole log of the job's driver. Raises UserError if the cluster or the job is gone."""
    client = connect(job.address)
    with _explained(job.address):
        return client.get_job_logs(job.submission_id)


def job_end(job: Job) -> JobEnd | None:
    """How the job ended; None while it waits or runs. Raises UserError if the cluster or the job is gone."""
    client = connect(job.address)
    with _explained(job.address):
        return _end(client.get_job_info(job.submission_id))


def stop_job(job: Job) -> bool:
    """Ask the cluster to stop the job: its driver gets SIGTERM, and SIGKILL 45 s later. False if it had ended."""
    client = connect(job.address)
    with _explained(job.address):
        return client.stop_job(job.submission_id)


def connect(address: str) -> Any:
    """Ray's client for the jobs of a cluster, checked. Raises UserError saying what to set if it cannot be used."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--address {address}: give the address of the cluster's dashboard, http://HOST:8265")
    reason = why_unreachable(address)
    if reason:
        raise UserError(_unreachable(address, reason))
    with _explained(address), _explicit_address(), _quiet_ray():
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(address)


def _nodes(address: str) -> list[Any]:
    from ray.util.state import list_nodes

    with _explained(address), _explicit_address(), _quiet_ray():
        return list_nodes(address=address, limit=10_000, filters=[("state", "=", "ALIVE")])


async def _follow(job: Job, write: Callable[[str], None]) -> JobEnd:
    import asyncio

    import aiohttp
    import requests

    shown = 0
    client = connect(job.address)
    heard = time.monotonic()
    while True:
        try:
            async for text in _log_from(client, job.submission_id, shown):
                write(text)
                shown, heard = shown + len(text), time.monotonic()
            end = _end(client.get_job_info(job.submission_id))
            if end is not None:
                return end
            heard = time.monotonic()
        except (RuntimeError, OSError, aiohttp.ClientError, requests.RequestException) as error:
            if time.monotonic() - heard > PATIENCE_SECONDS:
                raise UserError(_unreachable(job.address, _first_line(error))) from None
        await asyncio.sleep(POLL_SECONDS)


async def _log_from(client: Any, submission_id: str, position: int) -> AsyncIterator[str]:
    """The log from a position (in characters) on; Ray sends it from the beginning with every connection."""
    async for text in client.tail_job_logs(submission_id):
        if text[position:]:
            yield text[position:]
        position = max(0, position - len(text))


def _end(details: Any) -> JobEnd | None:
    if not details.status.is_terminal():
        return None
    # One line about the job, and after it the last part of the driver's log, with its own complaint.
    lines = scrub_text(details.message or "").strip().split("\n")
    complaint = next((line for line in reversed(lines) if line.startswith("ropewalk: ")), lines[0])
    message = complaint.removeprefix("ropewalk: ")
    if details.status == "SUCCEEDED":
        return JobEnd("succeeded", message)
    cancelled = details.status == "STOPPED" or details.driver_exit_code == 130
    return JobEnd("cancelled" if cancelled else "failed", message)


@contextlib.contextmanager
def _announced(job: Job, store: Store | None) -> Iterator[None]:
    """Record the job in the store before it starts; take the record back if it was refused."""
    if store is None:
        yield
        return
    folder = store.root / "runs" / job.submission_id
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job.to_json(), indent=1) + "\n", encoding="utf-8")
    try:
        yield
    except BaseException:
        (folder / "job.json").unlink()
        folder.rmdir()
        raise


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turn the errors of Ray's client into one sentence that says what to do."""
    try:
        yield
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(_unreachable(address, _first_line(error))) from None
    except Exception as error:
        from ray.exceptions import AuthenticationError

        if isinstance(error, AuthenticationError):
            raise UserError(_refused(address, str(error))) from None
        if isinstance(error, RuntimeError):
            raise UserError(f"the cluster at {address} refuses: {_first_line(error)}") from None
        raise


def _refused(address: str, text: str) -> str:
    """What to set after a refused login. The places are those in which Ray looks for a token."""
    places = "RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token or the file that RAY_AUTH_TOKEN_PATH names"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return f"the cluster at {address} demands a token: set RAY_AUTH_MODE=token, and give its token in {places}"
    if "Authentication failed" in text:
        return f"the cluster at {address} refuses the token: it has another one; give its token in {places}"
    return f"RAY_AUTH_MODE=token, but there is no token: give the token of {address} in {places}"


def _unreachable(address: str, reason: str) -> str:
    return (
        f"no Ray dashboard answers at {address} ({reason}): check that the cluster is up and that its port"
        " is reachable from here"
    )


def _first_line(error: BaseException) -> str:
    text = scrub_text(str(error).strip().split("\n")[0])
    return re.sub(r"^Request failed with status code \d+: ", "", text) or type(error).__name__


def _is_this_machine(host: str) -> bool:
    """Whether a name or address is one of this machine's: only then can a socket be bound to it."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind((target[0], 0))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _explicit_address() -> Iterator[None]:
    """Without the variables that Ray prefers to the address the user has named."""
    hidden = {name: os.environ.pop(name) for name in OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Without the notes of Ray's client on uploads, which would be mixed with the driver's log."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray.dashboard.modules.dashboard_sdk  # noqa: F401 - sets the levels that are raised here

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    yield
