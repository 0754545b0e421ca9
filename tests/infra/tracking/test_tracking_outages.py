"""Outages of a real MLflow server lose and double nothing, fail no run, and cost neither memory nor processor time."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import boto3
import engine
import metric_stages
import psutil
import pytest
from faulty_proxy import Fault, FaultyProxy, faulty_mlflow
from object_store_server import object_store_server
from run_records import RecordBuilder, store_with_database
from shown_runs import client_of, recorded_points, shown_points, shown_runs

from ropewalk.infra.store import Store
from ropewalk.infra.tracking import sync as tracking
from ropewalk.infra.tracking.database import default_tracking_uri, open_client
from ropewalk.infra.tracking.ids import ids_path, read_ids
from ropewalk.infra.tracking.sync import Synced
from ropewalk.infra.tracking.tracker import TrackingError

FAULTS = [fault for fault in get_args(Fault) if fault != "none"]
BEGUN = {"slow request": "asked_late", "slow answer": "answered_late"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, FaultyProxy]]:
    """A store with a database, and a server on that database behind a proxy."""
    root = store_with_database(tmp_path_factory.mktemp("served"))
    with faulty_mlflow(root, delay_seconds=2.5) as proxy:
        yield root, proxy


@pytest.fixture
def proxy(served: tuple[Path, FaultyProxy], monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    proxy = served[1]
    proxy.fault = "none"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    return proxy


def await_that(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_run_through_every_kind_of_outage_is_in_mlflow_exactly_once(
    served: tuple[Path, FaultyProxy], proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RecordBuilder(tmp_path, "run", "outages")
    record.start(train={}, asked_late={}, answered_late={})
    child = tracking.start(Store(tmp_path), "run")
    try:
        record.begin("train")
        for number, fault in enumerate(FAULTS):
            met, proxy.fault = proxy.met[fault], fault
            # Runs that are made at this very moment: the server may make them when nobody waits for it any more.
            if fault in BEGUN:
                record.begin(BEGUN[fault])
            for at in range(20):
                record.metrics("train", {"loss": 1.0 / (at + 1), "rate": float(number)}, at=20 * number + at)
            await_that(lambda fault=fault, met=met: proxy.met[fault] > met)
            proxy.fault = "none"
            await_that(lambda: read_ids(ids_path(tmp_path, "run")).seq >= record.seq)
        record.succeed("train", "checkpoint")
        record.finish()
        assert child.wait(60) == 0, (tmp_path / "runs/run/logs/tracking.log").read_text()
    finally:
        child.kill()
        child.wait()
    assert set(proxy.met) == set(get_args(Fault))
    time.sleep(proxy.delay_seconds)  # Requests that nobody waits for any more are still served.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    tracking.sync(Store(tmp_path), "run")
    client = client_of(served[0])
    assert shown_points(client, "run") == recorded_points(tmp_path, "run")
    runs = shown_runs(client, "run")
    states = {name: run.info.status for name, run in runs.items()}
    assert states == {"run": "FINISHED", "train": "FINISHED", "asked_late": "KILLED", "answered_late": "KILLED"}
    assert len(client.search_logged_models([runs["run"].info.experiment_id])) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_sync_during_an_outage_fails_and_afterwards_brings_all_of_it(
    fault: Fault, served: tuple[Path, FaultyProxy], proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    proxy.fault = fault
    result = engine.run(metric_stages.pipeline(), tmp_path)
    assert result.status == "succeeded"
    with pytest.raises(TrackingError, match=f"MLflow at {proxy.url} does not take run {result.run_id}: "):
        tracking.sync(store, result.run_id)
    assert read_ids(ids_path(tmp_path, result.run_id)).trouble
    proxy.fault = "none"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    assert list(tracking.sync_all(store)) == [Synced(result.run_id, "written")]
    assert list(tracking.sync_all(store)) == []
    client = client_of(served[0])
    assert shown_points(client, result.run_id) == recorded_points(tmp_path, result.run_id)
    assert {run.info.status for run in shown_runs(client, result.run_id).values()} == {"FINISHED"}
    assert not read_ids(ids_path(tmp_path, result.run_id)).trouble


def test_memory_does_not_grow_while_mlflow_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    log = tmp_path / "runs/run/logs/tracking.log"
    record = RecordBuilder(tmp_path, "run", "spool")
    record.start(train={})
    record.begin("train")
    child = tracking.start(Store(tmp_path), "run")

    def await_tries(count: int) -> None:
        await_that(lambda: log.read_text().count("http://127.0.0.1:9 does not answer; trying again") >= count)

    try:
        await_tries(2)
        before = psutil.Process(child.pid).memory_info().rss
        with record.path.open("a") as file:
            for number in range(100_000):
                event = {"seq": record.seq + number, "time": 1.0 + number, "type": "metrics", "step": "train"}
                event |= {"metric_step": number, "metrics": {"loss": 0.5, "rate": 1e-4}, "about": None}
                file.write(json.dumps(event) + "\n")
        assert record.path.stat().st_size > 10 * 2**20
        await_tries(4)
        assert psutil.Process(child.pid).memory_info().rss - before < 5 * 2**20
    finally:
        child.kill()
        child.wait()


def test_a_database_that_others_lock_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(store_with_database(tmp_path))
    result = engine.run(metric_stages.pipeline(), tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as database:
        database.execute("begin exclusive")
        with ThreadPoolExecutor() as pool:
            syncing = pool.submit(tracking.sync, store, result.run_id)
            time.sleep(2)
            assert not syncing.done()
            database.execute("rollback")
            syncing.result(timeout=60)
    client = open_client(default_tracking_uri(tmp_path))
    assert shown_points(client, result.run_id) == recorded_points(tmp_path, result.run_id)


@pytest.fixture
def object_store() -> Iterator[None]:
    with object_store_server():
        yield


@pytest.mark.usefixtures("object_store")
def test_files_that_their_storage_does_not_take_wait_and_numbers_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the bucket is gone, or credentials or the library for it are missing."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(store_with_database(tmp_path))
    client = open_client(default_tracking_uri(tmp_path))
    client.create_experiment("curves", artifact_location="s3://late-bucket/mlflow")
    result = engine.run(metric_stages.pipeline(), tmp_path)
    with pytest.raises(TrackingError, match=f"MLflow has run {result.run_id}, but its artifact storage takes no files"):
        tracking.sync(store, result.run_id)
    assert shown_points(client, result.run_id) == recorded_points(tmp_path, result.run_id)
    assert {run.info.status for run in shown_runs(client, result.run_id).values()} == {"FINISHED"}
    assert [synced.status for synced in tracking.sync_all(store)] == ["failed"]
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket="late-bucket")
    tracking.sync(store, result.run_id)
    parent = shown_runs(client, result.run_id)[result.run_id].info.run_id
    assert {entry.path for entry in client.list_artifacts(parent)} == {"evaluate", "run.json"}
    assert list(tracking.sync_all(store)) == []
