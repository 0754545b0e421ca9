"""What is written to MLflow is there exactly once, whatever is killed, deleted or refused in between."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from faulty_client import Faulty, Interrupted, Killed
from run_records import RecordBuilder, small_record, store_with_database
from shown_runs import client_of, content, runs_of

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking import tracker
from ropewalk.infra.tracking.database import default_tracking_uri, open_client

pytestmark = pytest.mark.usefixtures("no_server")


def sync(root: Path, run_id: str, **how: Any) -> None:
    tracking.sync(Store(root), run_id, **how)


def test_syncing_again_changes_nothing(shown_store: Path) -> None:
    before = content(shown_store, "run-1")
    sync(shown_store, "run-1")
    (shown_store / "runs/run-1/mlflow.json").unlink()
    sync(shown_store, "run-1")
    assert content(shown_store, "run-1") == before


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_being_killed_at_any_call_loses_and_doubles_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    counting = Faulty(client_of(store), None)
    monkeypatch.setattr(tracker, "open_client", lambda uri: counting)
    small_record(store, "undisturbed")
    sync(store, "undisturbed")
    expected = content(store, "undisturbed")
    killed = []
    # Both sides of a call matter: before it nothing is there, after it the id is not yet written down.
    for number, at in enumerate(range(1, counting.calls, stride)):
        run_id = f"killed-{at}"
        small_record(store, run_id)
        faulty = Faulty(client_of(store), Killed(), at, after=bool(number % 3))
        monkeypatch.setattr(tracker, "open_client", lambda uri, faulty=faulty: faulty)
        with contextlib.suppress(Killed):
            sync(store, run_id)
            pytest.fail("the fault was not met")
        monkeypatch.setattr(tracker, "open_client", open_client)
        sync(store, run_id)
        assert content(store, run_id) == expected, at
        killed.append(at)
    assert len(killed) >= 7


def test_a_run_deleted_in_mlflow_is_rebuilt(store: Path) -> None:
    small_record(store, "run")
    sync(store, "run")
    before = content(store, "run")
    client = client_of(store)
    for run in runs_of(store, "run").values():
        client.delete_run(run.info.run_id)
    sync(store, "run")
    assert content(store, "run")["runs"] == before["runs"]


@pytest.mark.parametrize("deleted", ["run", "train", "evaluate"])
@pytest.mark.parametrize("at", [33, 42], ids=["before the evaluation's numbers", "before the look at the end"])
def test_what_is_deleted_in_mlflow_while_it_is_written_is_written_again(
    store: Path, monkeypatch: pytest.MonkeyPatch, deleted: str, at: int
) -> None:
    small_record(store, "undisturbed")
    sync(store, "undisturbed")
    small_record(store, "run")

    def delete() -> None:
        client_of(store).delete_run(runs_of(store, "run")[deleted].info.run_id)

    interrupted = Interrupted(client_of(store), delete, at)
    monkeypatch.setattr(tracker, "open_client", lambda uri: interrupted)
    monkeypatch.setattr(tracker, "FIRST_BACKOFF_SECONDS", 0.01)
    sync(store, "run", follow=True)
    assert interrupted.calls > at
    assert content(store, "run")["runs"] == content(store, "undisturbed")["runs"]


def test_another_mlflow_gets_the_whole_run(store: Path, tmp_path: Path) -> None:
    small_record(store, "run")
    sync(store, "run")
    other = f"sqlite:///{store_with_database(tmp_path / 'other') / 'mlflow.db'}"
    sync(store, "run", tracking_uri=other)
    assert content(tmp_path / "other", "run")["runs"].keys() == content(store, "run")["runs"].keys()


def test_a_line_that_is_still_being_written_waits_for_its_end(store: Path) -> None:
    record = RecordBuilder(store, "run", "torn")
    record.start(train={})
    record.begin("train")
    whole = json.dumps({"seq": 2, "time": 1.0, "type": "run_finished", "status": "succeeded", "seconds": 1.0}) + "\n"
    with record.path.open("a") as file:
        file.write(whole[:30])
        file.flush()
        sync(store, "run")
        assert runs_of(store, "run")["run"].info.status == "RUNNING"
        file.write(whole[30:])
    sync(store, "run")
    assert runs_of(store, "run")["run"].info.status == "FINISHED"


def test_an_event_that_mlflow_refuses_is_marked_and_does_not_block_the_rest(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class Refusing(Faulty):
        def log_batch(self, run_id: str, metrics: Any = (), **rest: Any) -> None:
            if any(metric.key == "loss" for metric in metrics):
                raise MlflowException("bad metric", INVALID_PARAMETER_VALUE)
            self._client.log_batch(run_id, metrics=metrics, **rest)

    small_record(store, "run")
    monkeypatch.setattr(tracker, "open_client", lambda uri: Refusing(open_client(uri), None))
    sync(store, "run")
    runs = runs_of(store, "run")
    assert runs["run"].info.status == "FINISHED"
    refused = {key: value for key, value in runs["run"].data.tags.items() if key.startswith("ropewalk.refused.")}
    assert refused == {f"ropewalk.refused.{seq}": "metrics: bad metric" for seq in (2, 3, 4)}


@pytest.mark.parametrize("after", [False, True])
def test_an_outage_during_the_run_is_ridden_out(store: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    from mlflow.exceptions import MlflowException

    small_record(store, "run")
    sync(store, "run")
    expected = content(store, "run")
    small_record(store, "flaky")
    fault = MlflowException("connection refused")
    flaky = Faulty(open_client(default_tracking_uri(store)), fault, 4, 9, 20, 40, after=after)
    monkeypatch.setattr(tracker, "open_client", lambda uri: flaky)
    monkeypatch.setattr(tracker, "FIRST_BACKOFF_SECONDS", 0.01)
    sync(store, "flaky", follow=True)
    assert flaky.calls > 40
    assert content(store, "flaky") == expected
