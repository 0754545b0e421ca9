"""The disk is full at a chosen point: the step fails with the file named, nothing is committed, and room is enough."""

import resource
from pathlib import Path

import pytest
from engine import run, statuses
from faults.namespaces import run_on_small_disk
from object_store_server import new_bucket, object_store_server
from toy_stages import diamond

from ropewalk.infra.record import RunRecord, read_events, run_ids
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store

DRIVER = Path(__file__).with_name("full_disk_driver.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return [step.commit.digest for step in run(diamond(), tmp_path_factory.mktemp("undisturbed")).steps]


@pytest.mark.parametrize("point", ["before the lease", "data half written", "before the manifest", "before the commit"])
def test_a_full_disk_fails_the_step_by_name_and_leaves_no_commit(tmp_path, point, undisturbed):
    told = run_on_small_disk(DRIVER, tmp_path / "disk", point)
    first = told["first"]
    reason = first["error"] if first["status"] == "raised" else first["steps"]["right"][1]
    assert first["status"] in ("failed", "raised") and "No space left on device" in reason
    # Where nothing can be written, the run's own record is what fails first.
    assert f"{tmp_path}/disk/store/" in reason
    assert told["between"] == {"first": [0], "left": [0], "right": []} | (
        {"last": []} if "last" in told["between"] else {}
    )
    assert told["second"]["status"] == "succeeded" and told["second"]["digests"] == undisturbed


@pytest.mark.parametrize("point", ["data half written", "before the manifest", "before the commit"])
def test_a_full_scratch_disk_beside_an_object_store_costs_no_commit(tmp_path, monkeypatch, point, undisturbed):
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "disk"))
    with object_store_server():
        told = run_on_small_disk(DRIVER, tmp_path / "disk", point, new_bucket())
    first, second = told["first"], told["second"]
    reason = first["error"] if first["status"] == "raised" else first["steps"]["right"][1]
    if first["status"] != "succeeded":
        assert "No space left on device" in reason and f"{tmp_path}/disk/" in reason
    assert told["between"]["first"] == told["between"]["left"] == [0]
    assert point != "data half written" or told["between"]["right"] == []
    assert second["status"] == "succeeded" and second["digests"] == undisturbed


@pytest.mark.parametrize("point", ["after the commit", "before the release", "before it is recorded"])
def test_a_disk_that_is_full_after_the_commit_loses_nothing(tmp_path, point, undisturbed):
    told = run_on_small_disk(DRIVER, tmp_path / "disk", point)
    assert told["between"]["right"] == [0]
    assert told["second"]["status"] == "succeeded" and told["second"]["digests"] == undisturbed
    assert told["second"]["steps"]["right"][0] == "reused"
    if told["first"]["status"] == "raised":
        assert told["first"]["type"] == "UserError" and "No space left on device" in told["first"]["error"]


@pytest.fixture
def no_more_events(monkeypatch):
    """The file of events cannot grow by a whole line once `left` has ended."""
    append = RunRecord.append
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, event):
        if event["type"] == "step_succeeded" and event["step"] == "left":
            size = (self.folder / "events.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        return append(self, event)

    monkeypatch.setattr(RunRecord, "append", limited)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_events_that_cannot_be_written_stop_the_run_by_name(tmp_path, no_more_events, monkeypatch, undisturbed):
    with pytest.raises((UserError, OSError), match=r"events\.jsonl"):
        run(diamond(), tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.undo()
    store = Store(tmp_path)
    (events,) = tmp_path.glob("runs/*/events.jsonl")
    assert events.read_text().endswith("}\n"), "no half of a line is left"
    assert [event["seq"] for event in read_events(store, run_ids(store)[0])]
    again = run(diamond(), tmp_path)
    assert statuses(again)["first"] == statuses(again)["left"] == "reused"
    assert [step.commit.digest for step in again.steps] == undisturbed
