"""`map` over shards on Ray: the same bytes for any number of workers and after kills, and no shard is done twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.mapping_driver import pipeline
from ray_nodes import disturbed, failures, nodes, undisturbed_digest

from ropewalk.infra.lease import look
from ropewalk.infra.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]
DRIVER = Path(__file__).with_name("mapping_driver.py")


@pytest.fixture(scope="module")
def cluster():
    with nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    return undisturbed_digest(tmp_path_factory.mktemp("undisturbed"), pipeline(1).steps[0])


def traces(root, name):
    (path,) = root.glob(f"work/{name}")
    return [int(line) for line in path.read_text().split()]


@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_any_number_of_workers_gives_the_same_bytes_and_each_is_built_once(cluster, tmp_path, digest, num_workers):
    root = tmp_path / "store"
    result, events = disturbed(cluster, root, pipeline(num_workers), lambda place, executor: None)
    assert result.status == "succeeded" and failures(events) == [], result
    assert result.steps[0].commit.digest == digest
    assert sorted(traces(root, "cubed")) == list(range(30))
    assert 1 <= len(traces(root, "built")) <= num_workers


@pytest.mark.parametrize("victim", ["worker", "step"])
def test_after_a_kill_in_the_middle_only_unfinished_shards_are_done(cluster, tmp_path, digest, victim):
    root = tmp_path / "store"

    def kill(place, executor):
        while not list(root.glob("work/cubed")) or len(traces(root, "cubed")) < 8:
            time.sleep(0.02)
        os.kill(traces(root, "built")[0] if victim == "worker" else place["pid"], signal.SIGKILL)

    result, events = disturbed(cluster, root, pipeline(2), kill)
    assert result.status == "succeeded" and result.steps[0].commit.digest == digest, result
    assert [kind for kind, _ in failures(events)] == ["infrastructure"]
    assert len(failures(events)[0][1]) < 160, "one short sentence"
    check_little_was_done_twice(root, num_workers=2)


def test_after_the_driver_was_killed_the_next_run_does_the_unfinished_shards(cluster, tmp_path, digest):
    root = tmp_path / "store"
    driver = subprocess.Popen([sys.executable, str(DRIVER), cluster.address, str(root)], env=os.environ)
    while not list(root.glob("work/cubed")) or len(traces(root, "cubed")) < 8:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    (key,) = Store(root).known_keys()
    holder = look(Store(root).objects, key).holder
    while not holder.is_gone:  # Ray ends the processes of a driver that is gone.
        time.sleep(0.1)
    result, _ = disturbed(cluster, root, pipeline(2), lambda place, executor: None)
    assert result.status == "succeeded" and result.steps[0].commit.digest == digest, result
    check_little_was_done_twice(root, num_workers=2)


def check_little_was_done_twice(root, num_workers):
    """All shards were done, and twice only those that were under way when the kill came."""
    done = traces(root, "cubed")
    assert set(done) == set(range(30)) and len(done) - 30 <= num_workers
