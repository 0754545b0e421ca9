"""A submitted run is killed on its cluster; submitted again it goes on and ends with the same digests."""

import json
import os
import signal

import pytest
from faults.invariants import processes_with
from ray_cluster import two_nodes
from submitting import Submitter, build_wheel, digests, statuses, wait_until

from ropewalk.infra.lease import look
from ropewalk.infra.record import read_events
from ropewalk.infra.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cluster, wheel):
    """Digests of a run that nobody kills."""
    user = Submitter.at(tmp_path_factory.mktemp("undisturbed") / "user", cluster, wheel)
    return digests(user.submit())


@pytest.fixture
def user(tmp_path, cluster, wheel):
    return Submitter.at(tmp_path / "user", cluster, wheel)


def stop_job(user, run_id):
    from ray.job_submission import JobSubmissionClient

    assert JobSubmissionClient(user.cluster.address).stop_job(run_id)


def kill_driver(user, run_id):
    os.kill(json.loads((user.run_folder(run_id) / "run.json").read_text())["pid"], signal.SIGKILL)


def cancel_from_outside(user, run_id):
    user.command("cancel", run_id)


KILLS = {
    # How, and how `status` and the job's own status tell it.
    stop_job: ("cancelled", "STOPPED"),
    kill_driver: ("killed", "FAILED"),
    cancel_from_outside: ("cancelled", "FAILED"),
}


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_killed_in_the_middle_and_submitted_again_it_ends_with_the_same_digests(user, undisturbed, tmp_path, kill):
    from ray.job_submission import JobSubmissionClient

    gate = tmp_path / "gate"
    gate.touch()
    run_id = user.submit("--env", f"GATE={gate}", "--no-wait")["run_id"]
    user.wait_for(run_id, ("step_started", "second"))
    wait_until(lambda: "greeting" in user.command("logs", run_id, "second").stdout, "the stage at its gate")
    kill(user, run_id)
    client = JobSubmissionClient(user.cluster.address)
    wait_until(lambda: client.get_job_status(run_id).is_terminal(), "the job's end")
    shown = json.loads(user.command("status", "--json").stdout.splitlines()[-1])["runs"][0]
    assert (shown["status"], str(client.get_job_status(run_id))) == KILLS[kill]
    # Nothing of the run is left, neither a process nor a lease.
    wait_until(lambda: not processes_with("GATE", str(gate)), "the end of the run's processes")
    assert look(Store(user.folder / "store").objects, key_of(user, run_id, "second")).is_free
    # What such a run wrote can still be read, and following it ends.
    assert "greeting" in user.command("logs", run_id, "second", "-f").stdout
    gate.unlink()
    again = user.submit()
    assert statuses(again) == {"first": "reused", "second": "ran"} and digests(again) == undisturbed


def key_of(user, run_id, step):
    """The key that a step of a run was started with."""
    events = read_events(Store(user.folder / "store"), run_id)
    return next(event["key"] for event in events if event["type"] == "step_started" and event["step"] == step)
