"""Submits runs from a user's folder to the test cluster, as a user does: through the command."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ray_cluster import Cluster

from ropewalk.infra.jobs.wheel import unpack_wheel

HERE = Path(__file__).parent


@dataclass
class Submitter:
    """A folder with the pipeline file, beside things that must not be shipped, and a store."""

    folder: Path
    cluster: Cluster
    wheel: Path
    """Of the code that runs here, built once: building takes seconds."""

    @staticmethod
    def at(folder: Path, cluster: Cluster, wheel: Path | None = None) -> Submitter:
        """Lay out the folder."""
        folder.mkdir(parents=True)
        shutil.copy(HERE / "submitted_pipeline.py", folder)
        shutil.copy(HERE / "submitted_library.py", folder)
        (folder / "kernels").mkdir()
        (folder / "kernels/__init__.py").write_text("raise ImportError('shadowed')\n")
        return Submitter(folder, cluster, wheel or build_wheel(folder))

    def command(self, *arguments: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
        """Run a command of ropewalk to its end."""
        done = subprocess.run(**self._process(arguments, variables), capture_output=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def submit(self, *options: str, code: int = 0, **variables: str) -> dict:
        """Submit a run, wait for its end, and return what the command says at the end."""
        done = self.command(*self.arguments("--wheel", str(self.wheel), *options), "--json", code=code, **variables)
        return last_json(done.stdout)

    def arguments(self, *options: str) -> list[str]:
        """Of `submit`."""
        return ["submit", "submitted_pipeline.py", "--address", self.cluster.address, *options]

    @contextlib.contextmanager
    def started(self, *arguments: str):
        """A command that goes on in the background; interrupted (Ctrl-C) at the end if it is still there."""
        process = subprocess.Popen(**self._process(arguments, {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)

    def run_folder(self, run_id: str) -> Path:
        """The record of a run."""
        return self.folder / "store/runs" / run_id

    def wait_for(self, run_id: str, *wanted: tuple[str, str]) -> None:
        """Wait until the run has recorded events of these types and steps."""

        def seen() -> set[tuple[str, str]]:
            path = self.run_folder(run_id) / "events.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("\n")]
            return {(event["type"], event.get("step", "")) for event in events}

        try:
            wait_until(lambda: set(wanted) <= seen() or ("run_finished", "") in seen(), f"{wanted} of {run_id}")
            assert set(wanted) <= seen(), f"the run ended without {wanted}"
        except AssertionError as error:
            raise AssertionError(f"{error}; its driver says:\n{self.driver_log(run_id)}") from None

    def driver_log(self, run_id: str) -> str:
        """What the driver of a run wrote, from the cluster."""
        job = f"Job({self.cluster.address!r}, {run_id!r})"
        code = f"from ropewalk.infra.jobs.submit import Job, job_log; print(job_log({job}))"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=self.cluster.environment, capture_output=True, text=True, check=False).stdout

    def _process(self, arguments, variables) -> dict:
        environment = {**self.cluster.environment, "ROPEWALK_STORE": str(self.folder / "store"), **variables}
        command = [sys.executable, "-m", "ropewalk.pipelines.cli", *arguments]
        return {"args": command, "env": environment, "cwd": self.folder, "text": True}


def build_wheel(folder: Path) -> Path:
    """The wheel of the code that runs here."""
    path = folder / "ropewalk-0-py3-none-any.whl"
    unpack_wheel(folder / "unpacked")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((folder / "unpacked").rglob("*")):
            archive.write(file, file.relative_to(folder / "unpacked"))
    return path


def last_json(text: str) -> dict:
    """The object that ends a command's output."""
    return json.loads(text.rstrip("\n").splitlines()[-1])


def wait_until(ready, what: str, seconds: float = 120) -> None:
    """Wait, and fail naming what was waited for."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def digests(result: dict) -> dict[str, str]:
    """Output digest of each step."""
    return {step["name"]: step["output"]["digest"] for step in result["steps"]}


def statuses(result: dict) -> dict[str, str]:
    """Status of each step."""
    return {step["name"]: step["status"] for step in result["steps"]}
