"""Several machines that use one store and one MLflow write each run once between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from faulty_client import Interrupted
from faulty_proxy import faulty_mlflow
from object_store_server import new_bucket, object_store_server
from run_records import RecordBuilder, small_record, store_with_database
from shown_runs import content, recorded_points, shown_points, shown_runs

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking import tracker
from ropewalk.infra.tracking.database import open_client
from ropewalk.infra.tracking.sync import Synced

pytestmark = pytest.mark.usefixtures("no_server")


@pytest.mark.parametrize("at", [3, 4, 5, 7, 8, 14, 20, 27, 33, 40, 42, 44])
def test_two_machines_that_write_a_run_at_the_same_time_leave_it_there_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The other one writes all of it before call number `at` of the first one, which knows nothing of it."""
    uri = f"sqlite:///{store}/mlflow.db"
    for run_id in ("undisturbed", "run"):
        small_record(store, run_id)
    other = tmp_path / "other"
    shutil.copytree(store / "runs", other / "runs")
    tracking.sync(Store(store), "undisturbed", tracking_uri=uri)

    def both_at_once() -> None:
        monkeypatch.setattr(tracker, "open_client", open_client)
        tracking.sync(Store(other), "run", tracking_uri=uri)

    interrupted = Interrupted(open_client(uri), both_at_once, at)
    monkeypatch.setattr(tracker, "open_client", lambda uri: interrupted)
    monkeypatch.setattr(tracker, "FIRST_BACKOFF_SECONDS", 0.01)
    tracking.sync(Store(store), "run", tracking_uri=uri, follow=True)
    assert interrupted.calls >= at
    for root in (other, store):
        assert content(store, "run")["runs"] == content(store, "undisturbed")["runs"]
        tracking.sync(Store(root), "run", tracking_uri=uri)


def test_a_run_that_goes_on_elsewhere_is_left_to_its_own_process(store: Path) -> None:
    for run_id, driver in (("here", {}), ("elsewhere", {"host": "another-machine"})):
        record = RecordBuilder(store, run_id, "growing", driver=driver)
        record.start(train={})
    assert list(tracking.sync_all(Store(store), only_ended=True)) == []
    record.finish()
    assert list(tracking.sync_all(Store(store), only_ended=True)) == [Synced("elsewhere", "written")]


def test_what_one_machine_has_brought_to_a_server_no_other_brings_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store_server(), faulty_mlflow(store_with_database(tmp_path / "served")) as proxy:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
        uri = f"{new_bucket()}/store"
        done = []
        for machine in ("one", "other"):
            monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / machine))
            store = Store(uri)
            if machine == "one":
                record = small_record(store.root, "run")
                for name in ("run.json", "events.jsonl"):
                    store.objects.write(f"runs/run/{name}", (record.folder / name).read_bytes())
            asked = proxy.met["none"]
            done.append([synced.status for synced in tracking.sync_all(store)])
            assert (proxy.met["none"] > asked) == (machine == "one")
        assert done == [["written"], []]
        assert tracking.mlflow_run_id(store, "run") == shown_runs(open_client(proxy.url), "run")["run"].info.run_id
        # Into an MLflow of its own the other machine does write it.
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        store_with_database(store.root)
        assert list(tracking.sync_all(store)) == [Synced("run", "written")]
        own = open_client(f"sqlite:///{store.root}/mlflow.db")
        assert shown_points(own, "run") == recorded_points(store.root, "run")
        assert json.loads((store.root / "runs/run/mlflow.json").read_text())["is_complete"]
