"""Runs a pipeline on a disk, makes the disk read-only, plans and runs again, and once more when it can be written.

Started by test_unwritable_store in a mount namespace of its own, where the folder is a tmpfs.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages

if __name__ == "__main__":
    disk = Path(sys.argv[1])
    store = disk / "store"
    first = [step.commit.digest for step in engine.run(toy_stages.diamond(), store).steps]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    planned = engine.plan(toy_stages.diamond(), store)
    changed = engine.plan(toy_stages.diamond(value=5), store)
    try:
        engine.run(toy_stages.diamond(value=5), store)
        error = "none"
    except Exception as failure:  # noqa: BLE001 - told to the test, which judges it
        error = str(failure)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    again = engine.run(toy_stages.diamond(), store)
    told = {"planned": planned, "changed": changed, "error": error, "again": engine.statuses(again)}
    print(json.dumps({**told, "first": first, "digests": [step.commit.digest for step in again.steps]}))
