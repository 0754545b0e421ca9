"""Runs on a real cluster of two nodes through Ray Jobs, submitted and watched from outside."""

import json
from pathlib import Path

import pytest
from ray_cluster import two_nodes
from submitting import Submitter, digests, last_json, statuses

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[3]
SECRET = "s3cr3t-value-of-mine"


@pytest.fixture(scope="module")
def cluster():
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def user(tmp_path_factory, cluster):
    folder = tmp_path_factory.mktemp("submit")
    return Submitter.at(folder / "user", cluster)


@pytest.fixture(scope="module")
def result(user):
    """The run that most tests look at; the only one for which the command builds the wheel itself."""
    options = user.arguments("--env", "GREETING=hello", "--env", "HF_TOKEN", "--json")
    return last_json(user.command(*options, HF_TOKEN=SECRET).stdout)


@pytest.fixture
def gate(tmp_path):
    """A file at which the second step waits while it exists; gone after the test, whatever happens in it."""
    path = tmp_path / "gate"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


def observed(result, step):
    output = next(s["output"] for s in result["steps"] if s["name"] == step)
    return json.loads((Path(output["uri"]).parent / "observed/world.json").read_text())


def test_a_submitted_run_ends_as_a_run_does(result, user):
    assert result["status"] == "succeeded" and statuses(result) == {"first": "ran", "second": "ran"}
    assert result["submission_id"] == result["run_id"] and result["address"] == user.cluster.address
    last = Path(next(s["output"]["uri"] for s in result["steps"] if s["name"] == "second"))
    assert json.loads((last / "value.json").read_text()) == 15


def test_workers_run_the_wheel_and_the_modules_that_travelled_with_the_file(result, user):
    worlds = {step: observed(result, step) for step in ("first", "second")}
    for world in worlds.values():
        assert "py_modules_files" in world["ropewalk"] and str(REPOSITORY) not in world["ropewalk"]
        assert "working_dir_files" in world["library"] and str(user.folder) not in world["library"]
        assert not any(str(user.folder) in str(place) for place in world["kernels"] or ()), "kernels is not shadowed"
    assert worlds["first"]["node"] != worlds["second"]["node"], "the second step needs the second node"


def test_submitted_again_everything_is_reused(result, user):
    # The address that is given wins over those in the environment, which Ray's own client prefers.
    again = user.submit(RAY_ADDRESS="http://127.0.0.1:1", RAY_API_SERVER_ADDRESS="http://127.0.0.1:1")
    assert statuses(again) == {"first": "reused", "second": "reused"} and digests(again) == digests(result)
    assert again["run_id"] != result["run_id"]


def test_the_record_tells_the_job_and_what_was_asked_for_but_no_secret(result, user):
    folder = user.run_folder(result["run_id"])
    job = json.loads((folder / "job.json").read_text())
    assert job["address"] == user.cluster.address and job["submission_id"] == result["run_id"]
    assert job["variables"] == ["GREETING", "HF_TOKEN"]
    asked = json.loads((folder / "run.json").read_text())["request"]
    assert asked["pipeline"] == str(user.folder / "submitted_pipeline.py")
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_logs_of_a_finished_run_come_from_the_store_and_the_drivers_from_the_cluster(result, user):
    printed = user.command("logs", result["run_id"]).stdout
    assert "==> first, attempt 1 <==\ngreeting: hello\n" in printed
    assert "==> second, attempt 1 <==\ngreeting: hello\n" in printed
    shown = last_json(user.command("logs", result["run_id"], "second", "--json").stdout)
    assert [(log["step"], log["attempt"]) for log in shown["logs"]] == [("second", 1)]
    driver = user.command("logs", result["run_id"], "--driver").stdout
    assert "ropewalk.pipelines.cli run submitted_pipeline.py" in driver and SECRET not in driver


def test_a_run_is_followed_from_outside_while_it_goes_on(user, gate):
    options = ["--force", "second", "--env", f"GATE={gate}", "--env", "GREETING=followed", "--no-wait"]
    submitted = user.submit(*options)
    run_id = submitted["run_id"]
    assert submitted["status"] == "submitted"
    user.wait_for(run_id, ("running", "second"))
    assert last_json(user.command("status", "--json").stdout)["runs"][0]["running"] == ["second"]
    with user.started("logs", run_id, "second", "--follow") as following:
        assert following.stdout.readline() == "==> second, attempt 1 <==\n"
        assert following.stdout.readline() == "greeting: followed\n"
        assert following.poll() is None
        gate.unlink()
        assert following.wait(timeout=60) == 0, "it ends with the run"
    user.wait_for(run_id, ("run_finished", ""))


def test_ctrl_c_ends_the_waiting_and_not_the_run_which_cancel_ends(user, gate):
    arguments = user.arguments("--wheel", str(user.wheel), "--force", "second", "--env", f"GATE={gate}")
    with user.started(*arguments) as waiting:
        for line in waiting.stdout:
            if "second: started" in line:
                break
    rest = waiting.stdout.read()
    run_id = max(path.name for path in (user.folder / "store/runs").iterdir())
    assert waiting.returncode == 130 and f"run {run_id} goes on" in rest
    assert f"ropewalk logs {run_id} --store {user.folder}/store -f  follows it" in rest
    assert f"ropewalk cancel {run_id} --address {user.cluster.address}  stops it" in rest
    # Without the store, the cluster is asked.
    address = ["--address", user.cluster.address]
    assert f"--run-id {run_id}" in user.command("logs", run_id, *address).stdout
    user.command("cancel", run_id, *address)
    followed = user.command("logs", run_id, *address, "--follow").stdout
    assert "run cancelled" in followed, "it ends with the job"
    assert last_json(user.command("status", "--json").stdout)["runs"][0]["status"] == "cancelled"
    assert "there is nothing to cancel" in user.command("cancel", run_id, *address, code=1).stderr


def test_a_failed_run_fails_the_command_with_the_reason(user):
    result = user.submit("--param", "fails=true", code=1)
    assert result["status"] == "failed" and statuses(result) == {"first": "reused", "second": "failed"}
    assert "this step fails" in result["steps"][1]["reason"]


def test_the_choice_of_steps_reaches_the_cluster_and_the_record(result, user):
    chosen = user.submit("--only", "second", "--with-upstream", "--force", "first", "--rerun-drifted")
    assert statuses(chosen) == {"first": "ran", "second": "reused"}
    again = json.loads((user.run_folder(chosen["run_id"]) / "run.json").read_text())["request"]["selection"]
    assert again["only"] == ["second"] and again["force"] == ["first"]
    assert again["with_upstream"] is again["rerun_drifted"] is True


def test_a_run_that_has_not_begun_is_listed_and_its_cluster_is_asked(result, user):
    """As right after `submit --no-wait`, or when the driver failed before it could write a record."""
    from ropewalk.infra.jobs.submit import Job
    from ropewalk.infra.record import new_run_id

    run_id = new_run_id()
    folder = user.run_folder(run_id)
    folder.mkdir()
    asked = {"pipeline": "submitted_pipeline.py", "set": [], "param": []}
    (folder / "job.json").write_text(json.dumps(Job(user.cluster.address, run_id, asked).to_json()))
    row = last_json(user.command("status", "--json").stdout)["runs"][0]
    assert (row["run_id"], row["pipeline"], row["status"]) == (run_id, "submitted_pipeline", "not begun")
    assert "was submitted to a cluster and has not begun" in user.command("show", run_id, code=1).stderr
    # The cluster does not know this job, and all of them say so instead of waiting for ever.
    for words in (("cancel", run_id), ("logs", run_id, "--driver")):
        assert f"the cluster at {user.cluster.address} refuses" in user.command(*words, code=1).stderr
    (folder / "job.json").unlink()
    folder.rmdir()


def test_a_driver_that_cannot_begin_is_quoted(user):
    wrong = user.folder / "file"
    wrong.write_text("no folder")
    result = user.submit("--store", str(wrong / "store"), "--shared-store", code=1)
    assert result["status"] == "failed" and "Not a directory" in result["error"]


def test_what_is_wrong_with_the_request_is_said_before_anything_is_sent(user):
    done = user.command(*user.arguments("--set", "first.valu=3"), code=1)
    assert "did you mean 'value'?" in done.stderr
    done = user.command(*user.arguments("--only", "frist"), code=1)
    assert "did you mean 'first'?" in done.stderr
    done = user.command(*user.arguments("--env", "NOT_SET_HERE"), code=1)
    assert "--env NOT_SET_HERE: the variable is not set here" in done.stderr


def test_a_cluster_that_is_not_there_is_one_sentence(user):
    for address in ("http://127.0.0.1:1", "127.0.0.1:8265", "auto"):
        done = user.command("submit", "submitted_pipeline.py", "--address", address, code=1)
        assert len(done.stderr.strip().splitlines()) == 1
        assert "no Ray dashboard answers" in done.stderr or "give the address of the cluster's dashboard" in done.stderr


def test_a_folder_that_is_another_one_on_the_cluster_is_refused_by_the_driver(user, tmp_path):
    """As behind a forwarded port: the address is this machine's, the cluster is elsewhere."""
    from ropewalk.infra.jobs.submit import Job, check_same_store
    from ropewalk.infra.step import UserError
    from ropewalk.infra.store import Store

    job = Job(user.cluster.address, "20260101-000000-abcd", same_machine=True)
    with pytest.raises(UserError, match="is another folder on the cluster"):
        check_same_store(job, Store(tmp_path))
