"""A store that cannot be written, or not be read: one sentence with the path, and nothing is taken for missing."""

import stat
from pathlib import Path

import pytest
from engine import plan, run, statuses
from faults.namespaces import run_on_small_disk
from faults.permissions import permissions_that_bind
from toy_stages import diamond

DRIVER = Path(__file__).with_name("read_only_driver.py")


def test_a_read_only_store_can_be_planned_and_refuses_a_run_by_path(tmp_path):
    told = run_on_small_disk(DRIVER, tmp_path / "disk")
    assert {status for status, _ in told["planned"].values()} == {"reuse"}
    assert told["changed"]["first"][0] == "run"
    assert "Read-only file system" in told["error"] and f"{tmp_path}/disk/store/" in told["error"]
    assert set(told["again"].values()) == {"reused"} and told["digests"] == told["first"]


@pytest.fixture
def shared(tmp_path):
    """A store whose permissions are given back in the end."""
    yield tmp_path / "store"
    for path in tmp_path.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


def withdraw_permission(root, bits, pattern):
    for path in root.rglob(pattern):
        path.chmod(path.stat().st_mode & ~bits & 0o777)


WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
READ = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


def test_without_permission_to_write_plans_work_and_runs_are_refused_by_path(shared):
    run(diamond(), shared)
    withdraw_permission(shared.parent, WRITE, "*")
    with permissions_that_bind():
        assert {status for status, _ in plan(diamond(), shared).values()} == {"reuse"}
        with pytest.raises(OSError, match=r"Permission denied: '.*/store/runs/"):
            run(diamond(), shared)


def test_without_permission_to_write_objects_the_step_fails_by_path_and_can_be_run_later(shared):
    undisturbed = run(diamond(value=5), shared.parent / "undisturbed")
    run(diamond(), shared)
    (shared / "objects").chmod(0o555)
    with permissions_that_bind():
        failed = run(diamond(value=5), shared)
    step = failed.steps[0]
    assert (failed.status, step.status) == ("failed", "failed")
    assert "Permission denied" in step.reason and f"{shared}/objects/" in step.reason
    (shared / "objects").chmod(0o755)
    again = run(diamond(value=5), shared)
    assert [s.commit.digest for s in again.steps] == [s.commit.digest for s in undisturbed.steps]


def test_commits_that_may_not_be_read_are_not_taken_for_missing(shared):
    result = run(diamond(), shared)
    withdraw_permission(shared / "objects" / result.steps[2].key, READ, "000000.json")
    with permissions_that_bind(), pytest.raises(OSError, match=r"Permission denied: '.*/commits/000000\.json'"):
        plan(diamond(), shared)
    assert statuses(result)["right"] == "ran"
