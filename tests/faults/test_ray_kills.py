"""A cluster of several nodes that loses processes and nodes: runs complete with the digests of undisturbed ones."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from engine import run, value_of
from ray_nodes import disturbed, failures, nodes, undisturbed_digest
from ray_stages import (
    Nothing,
    Number,
    deaf,
    gang_of_two,
    lazy_reader,
    reporting,
    sleepers,
    squares,
    waiting,
    waiting_gang,
)

from ropewalk.infra.lease import Holder
from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.record import read_events
from ropewalk.infra.step import Pipeline, Resources, Retries, Step, UserError
from ropewalk.infra.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]
QUICKLY = Retries(backoff_seconds=0.1)
WAITS = Resources(num_cpus=0)
SEAT = Resources(num_cpus=0, custom={"seat": 1})


@pytest.fixture(scope="module")
def cluster():
    with nodes() as cluster:
        yield cluster


@pytest.fixture
def spots(cluster):
    """Two nodes that can be lost; each holds one step that asks for `spot`."""
    found = [cluster.add_node(num_cpus=1, resources={"spot": 1}) for _ in range(2)]
    yield found
    for node in found:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)


def points(events):
    return [event["metrics"]["point"] for event in events if event["type"] == "metrics" and "point" in event["metrics"]]


def single(step):
    return Pipeline("p", (step,))


def test_a_step_whose_process_is_killed_runs_again(cluster, tmp_path):
    step = Step("s", waiting, Number(value=3), retries=QUICKLY)
    result, events = disturbed(
        cluster, tmp_path / "store", single(step), lambda place, executor: os.kill(place["pid"], signal.SIGKILL)
    )
    assert result.status == "succeeded", result
    assert [kind for kind, _ in failures(events)] == ["infrastructure"]
    assert "WorkerCrashedError" in failures(events)[0][1]
    assert result.steps[0].commit.digest == undisturbed_digest(tmp_path, step)
    assert points(events) == list(range(10)), "no gap, no point twice"


@pytest.mark.parametrize(("drained", "kind"), [(False, "infrastructure"), (True, "preempted")])
def test_a_step_whose_node_is_lost_runs_again_on_another(cluster, spots, tmp_path, drained, kind):
    step = Step("s", waiting, Number(value=4), resources=Resources(custom={"spot": 1}), retries=QUICKLY)

    lost = []

    def lose(place, executor):
        lost.append(place["node"])
        if drained:
            drain(cluster, place["node"])
        node = next(node for node in spots if node.node_id == place["node"])
        cluster.remove_node(node, allow_graceful=False)

    result, events = disturbed(cluster, tmp_path / "store", single(step), lose)
    assert result.status == "succeeded", result
    assert [found for found, _ in failures(events)] == [kind], failures(events)
    assert result.steps[0].commit.digest == undisturbed_digest(tmp_path, step)
    places = [event["node"] for event in events if event["type"] == "running"]
    assert lost and places[-1] not in lost
    assert points(events) == list(range(10))


@pytest.mark.parametrize("notice_seconds", [0, 10])
def test_a_gang_that_loses_a_preempted_node_runs_again_and_no_failure_is_counted(
    cluster, spots, tmp_path, notice_seconds
):
    seat = Resources(num_cpus=0, custom={"spot": 1})
    step = Step("s", waiting_gang, Nothing(), resources=WAITS, worker_resources=seat, retries=QUICKLY)
    spots.append(cluster.add_node(num_cpus=1, resources={"spot": 1}))

    def lose(place, executor):
        drain(cluster, place["node"])
        time.sleep(notice_seconds)
        node = next(node for node in spots if node.node_id == place["node"])
        cluster.remove_node(node, allow_graceful=False)

    result, events = disturbed(cluster, tmp_path / "store", single(step), lose)
    assert result.status == "succeeded" and value_of(result, "s") == [0, 1], result
    # Until Ray has noticed that the node is gone, it may place the next gang there: that attempt fails, too.
    failed = next(event for event in events if event["type"] == "attempt_failed")
    assert (failed["kind"], failed["num_failed"], failed["num_preempted"]) == ("preempted", 0, 1), failed
    assert len(failed["error"]) < 200, failed


def drain(cluster, node):
    """Tell Ray that a node is about to be taken away, as a cloud's autoscaler does."""
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int(time.time() * 1000) + 20_000
    accepted, why = ray._raylet.GcsClient(address=cluster.address).drain_node(node, reason, "spot", deadline)
    assert accepted, why
    time.sleep(1)


def test_the_death_of_the_event_bus_loses_no_event(cluster, tmp_path):
    import ray

    def kill_the_bus(place, executor):
        time.sleep(1.5)
        os.kill(ray.get(executor._bus.__ray_call__.remote(lambda bus: os.getpid())), signal.SIGKILL)

    result, events = disturbed(cluster, tmp_path / "store", single(Step("s", reporting, Nothing())), kill_the_bus)
    assert result.status == "succeeded", result
    assert points(events) == list(range(60))
    assert failures(events) == []


def test_a_bus_that_stays_dead_fails_nothing(cluster, tmp_path):
    import ray

    def remove_the_bus(place, executor):
        ray.kill(executor._bus, no_restart=True)

    result, events = disturbed(cluster, tmp_path / "store", single(Step("s", reporting, Nothing())), remove_the_bus)
    assert result.status == "succeeded", result
    assert points(events) == list(range(60)), "what the bus could not carry comes with the result"


def test_when_a_worker_of_map_dies_finished_shards_are_not_done_again(cluster, tmp_path):
    step = Step("s", squares, Nothing(), resources=WAITS, retries=QUICKLY)
    result, events = disturbed(cluster, tmp_path / "store", single(step), lambda place, executor: None)
    assert result.status == "succeeded", result
    assert [kind for kind, _ in failures(events)] == ["infrastructure"]
    assert result.steps[0].commit.digest == undisturbed_digest(tmp_path, step)
    squared = (tmp_path / "store" / "squared").read_text().split()
    assert set(map(int, squared)) == set(range(12))
    # Two workers: what the other one was at when the attempt ended may not have been finished.
    assert len(squared) <= 12 + 1, "what was finished is not done again"


def test_a_slow_reader_of_map_gets_results_in_order_and_holds_the_workers_back(cluster, tmp_path):
    pipeline = single(Step("s", lazy_reader, Nothing(), resources=WAITS, worker_resources=SEAT))
    result = run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline, cluster.address))
    assert value_of(result, "s") == list(range(40))
    ahead = json.loads((result.steps[0].commit.attempt.observed / "ahead.json").read_text())
    assert 0 < ahead <= 2 * 2, "the cluster has two seats"


def test_a_cancelled_map_ends_without_waiting_for_its_items_and_frees_its_actors(cluster, tmp_path):
    step = Step("s", sleepers, Nothing(), resources=WAITS)
    result, _ = disturbed(cluster, tmp_path / "store", single(step), lambda place, executor: executor.cancel("s"))
    assert result.status == "failed" and "cancelled" in result.steps[0].reason, result
    assert "process died" not in result.steps[0].reason, "it ended by itself"
    workers = [int(path.name[4:]) for path in (tmp_path / "store" / "work").glob("*/*/pid-*")]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_two_gangs_on_a_cluster_that_holds_one_run_one_after_the_other(cluster, tmp_path):
    # One of them waits for its workers for longer than it may be silent while it works.
    execution = {"resources": WAITS, "worker_resources": SEAT, "stall_seconds": 10.0}
    steps = [Step(f"g{n}", gang_of_two, Number(value=n), **execution) for n in range(2)]
    pipeline = Pipeline("p", tuple(steps))
    result = run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline, cluster.address))
    assert result.status == "succeeded", result
    first, second = sorted(
        json.loads((step.commit.attempt.observed / "times.json").read_text()) for step in result.steps
    )
    assert max(end for _, end in first) <= min(start for start, _ in second)
    events = list(read_events(Store(tmp_path / "store"), result.run_id))
    queue = [(event["step"], event["type"]) for event in events if event["type"].startswith("workers_")]
    for name in ("g0", "g1"):
        assert [kind for step, kind in queue if step == name] == ["workers_queued", "workers_started"]
    assert next(e for e in events if e["type"] == "workers_queued")["workers"] == "2 workers with 1 seat each"


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (Resources(num_gpus=2), r"step s needs 2 GPU; the cluster has 0 GPU on its largest node: .*wait-for-resources"),
        (Resources(memory_gib=10**6), r"step s needs 1e\+06 GiB of memory; the cluster has .* GiB of memory on"),
        (Resources(custom={"tpu": 1}), r"step s needs 1 tpu; the cluster has 0 tpu on its largest node"),
        (Resources(num_cpus=3), r"step s needs 3 CPU; the cluster has 2 CPU on its largest node"),
    ],
)
def test_what_no_node_can_hold_is_refused_before_anything_runs(cluster, tmp_path, resources, message):
    pipeline = single(Step("s", waiting, Nothing(), resources=resources))
    with pytest.raises(UserError, match=message):
        run(pipeline, tmp_path / "store", executor=RayExecutor(pipeline, cluster.address))


def test_a_step_waits_for_a_cluster_that_grows(cluster, tmp_path):
    pipeline = single(Step("s", reporting, Nothing(), resources=Resources(custom={"late": 1})))
    executor = RayExecutor(pipeline, cluster.address, wait_seconds=120)
    results = []
    running = threading.Thread(target=lambda: results.append(run(pipeline, tmp_path / "store", executor=executor)))
    running.start()
    time.sleep(3)
    late = cluster.add_node(num_cpus=1, resources={"late": 1})
    running.join()
    cluster.remove_node(late)
    assert [result.status for result in results] == ["succeeded"]


def test_a_lost_lease_ends_the_process_of_a_stage_that_does_not_listen(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_LEASE_SECONDS", "2")
    monkeypatch.setenv("ROPEWALK_GRACE_SECONDS", "1")
    store, ended = Store(tmp_path / "store"), []

    def take_over(place, executor):
        executor.cancel = lambda *arguments, **options: None  # The process is to end by itself.
        (key,) = store.known_keys()
        taken = Holder("b", "other", "far", "another", 1, None, 0.0, 60.0)
        assert store.objects.create(f"objects/{key}/leases/000001.json", json.dumps(asdict(taken)).encode())
        while Path(f"/proc/{place['pid']}").exists():
            time.sleep(0.05)
        ended.append(place["pid"])
        attempt = store.begin(key, "b")
        (attempt.data / "value.json").write_text("1")
        store.commit(attempt, {"run_id": "other", "code": {}}, number=0)
        store.objects.write(f"objects/{key}/leases/000001.beat", b'{"count": 0, "released": true}')

    result, events = disturbed(cluster, tmp_path / "store", single(Step("s", deaf, Nothing())), take_over)
    assert ended and result.steps[0].status == "reused", result
    assert result.steps[0].reason == "committed by run other meanwhile"
    assert [kind for kind, _ in failures(events)] == ["lease lost"]
    assert store.next_number(result.steps[0].key) == 1
