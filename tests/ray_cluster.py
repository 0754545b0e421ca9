"""A Ray cluster of two nodes on this machine, for tests: own ports, own folders, own token."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 120
PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "node-manager-port",
    "object-manager-port",
)


@dataclass
class Cluster:
    """Two nodes: the head with one CPU, and one more with one CPU and one `second`."""

    address: str
    environment: dict[str, str]
    """Of the cluster's processes; also good for its clients."""
    processes: list[subprocess.Popen] = field(default_factory=list)


@contextlib.contextmanager
def two_nodes(token: str | None = None) -> Iterator[Cluster]:
    """Start the cluster, wait until both nodes are there, stop it. With a token, it demands it."""
    # Short: the path of a socket in it may have 107 characters.
    home = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))
    # A folder for each node, as on machines of their own: two nodes that share one remove each other's packages.
    (home / "2").mkdir()
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    second = dict(zip(PORTS[3:], free_ports(len(PORTS) - 3), strict=True))
    cluster = Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", environment(home, token))
    log = (home / "start.log").open("wb")
    try:
        flags = [f"--{name}={port}" for name, port in ports.items()]
        _start(cluster, log, ["--head", "--num-cpus=1", f"--temp-dir={home}", "--dashboard-host=127.0.0.1", *flags])
        _wait(lambda: _answers(cluster.address), log)
        flags = [f"--{name}={port}" for name, port in second.items()]
        joins = [f"--address=127.0.0.1:{ports['port']}", "--num-cpus=1", '--resources={"second": 1}']
        _start(cluster, log, [*joins, f"--temp-dir={home / '2'}", *flags])
        _wait(lambda: _num_nodes(cluster) == 2, log)
        yield cluster
    finally:
        for process in reversed(cluster.processes):
            _stop(process)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def environment(home: Path, token: str | None) -> dict[str, str]:
    """An environment in which Ray finds neither another cluster nor another token; the own interpreter comes first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "ROPEWALK_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    return {**kept, **mode, "PATH": path, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _start(cluster: Cluster, log, arguments: list[str]) -> None:
    command = ["ray", "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *arguments]
    # A session of its own, so that all of it can be stopped and nothing else is.
    process = subprocess.Popen(
        command,
        env=cluster.environment,
        stdout=log,
        stderr=log,
        cwd=cluster.environment["HOME"],
        start_new_session=True,
    )
    cluster.processes.append(process)


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False
    return True


def _num_nodes(cluster: Cluster) -> int:
    code = f"from ray.util.state import list_nodes; print(len(list_nodes(address={cluster.address!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=cluster.environment, capture_output=True, text=True, check=False
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def _wait(ready, log) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"the cluster did not come up: {Path(log.name).read_text()[-2000:]}")
        time.sleep(0.5)
