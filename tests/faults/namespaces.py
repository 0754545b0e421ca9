"""Runs a command with a small disk of its own, which needs no privileges where user namespaces are allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")


def run_on_small_disk(script: Path, disk: Path, *arguments: str, size: str = "2m") -> dict:
    """The JSON that a script prints last, run with a tmpfs of this size at `disk`."""
    disk.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={size} tmpfs '{disk}'"
    probe = subprocess.run([*UNSHARE, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"no mount namespaces on this machine: {probe.stderr.strip()}")
    command = f'{mount} && exec "$@"'
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", command, "sh", sys.executable, str(script), str(disk), *arguments],
        capture_output=True,
        text=True,
        check=False,
        # A lease that could not be released on the full disk is free after this time.
        env={**os.environ, "ROPEWALK_LEASE_SECONDS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
