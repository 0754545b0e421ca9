"""Garbage is collected all the time while drivers run, with hardly any grace: no driver ever misses an input."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine import run
from faults.random_pipelines import random_pipeline

from ropewalk.infra.store import Store
from ropewalk.infra.upkeep import garbage

pytestmark = [pytest.mark.faults, pytest.mark.slow]
DRIVER = Path(__file__).with_name("soak_driver.py")
SEED = 11
VARIANTS = (0, 1, 2)


@pytest.mark.parametrize("grace_seconds", [0.0, 0.3])
def test_collecting_garbage_never_takes_what_a_driver_relies_on(tmp_path, grace_seconds):
    expected = {
        variant: {
            step.name: step.commit.digest for step in run(random_pipeline(SEED, variant), tmp_path / "calm").steps
        }
        for variant in VARIANTS
    }
    store = Store(tmp_path / "store")
    environment = {**os.environ, "SOAK_UNREST": "0.3"}
    removed, drivers, finished, until = 0, {}, 0, time.monotonic() + 15
    while drivers or time.monotonic() < until:
        for variant in VARIANTS if time.monotonic() < until else ():
            if variant not in drivers:
                # Pipelines of one name, of which one run is kept: what one variant uses, the next run gives up.
                command = [sys.executable, str(DRIVER), store.uri, str(SEED), str(variant)]
                drivers[variant] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        policy = garbage.Policy(keep_runs=1, grace_seconds=grace_seconds)
        removed += collected(store, policy)
        for variant, driver in list(drivers.items()):
            if driver.poll() is not None:
                told = json.loads(driver.communicate()[0].splitlines()[-1])
                assert (told["status"], told["digests"]) == ("succeeded", expected[variant]), told
                finished += 1
                del drivers[variant]
    assert finished > 6
    assert removed > 0, "there was garbage"


def collected(store, policy):
    """Collect; returns how many commits were removed."""
    found = garbage.collect(store, policy, act=True)
    return sum(item.state == "removed" and item.number is not None for item in found)
