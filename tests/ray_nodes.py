"""A Ray cluster whose nodes a test can add and lose, and runs on it that are disturbed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine import run
from ray_stages import BEGUN

from ropewalk.infra.on_ray.executor import RayExecutor
from ropewalk.infra.record import read_events
from ropewalk.infra.results import RunResult
from ropewalk.infra.step import Pipeline, Step
from ropewalk.infra.store import Store
from ropewalk.infra.task import Output
from ropewalk.stages.context import LocalContext

NOTICE_LOSSES_SOON = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
"""Ray's settings. By its own it places work on a lost node for most of a minute."""


@contextlib.contextmanager
def nodes() -> Iterator[Any]:
    """A head with the driver's things, and two seats: room for a gang of two."""
    from ray.cluster_utils import Cluster

    saved = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    head = {"num_cpus": 2, "include_dashboard": False, "resources": {"seat": 2}, "_system_config": NOTICE_LOSSES_SOON}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()
    for name, value in saved.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def disturbed(
    cluster: Any, root: Path, pipeline: Pipeline, disturb: Callable[[dict[str, Any], RayExecutor], None]
) -> tuple[RunResult, list[dict[str, Any]]]:
    """A run during which `disturb(place, executor)` is called once a stage has said where it is; its events."""
    executor, ended = RayExecutor(pipeline, cluster.address), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for path in root.glob(f"work/*/*/{BEGUN}"):
                text = path.read_text()
                if text:
                    disturb(json.loads(text), executor)
                    return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        result = run(pipeline, root, executor=executor)
    finally:
        ended.set()
        watcher.join()
    return result, list(read_events(Store(root), result.run_id))


def undisturbed_digest(tmp_path: Path, step: Step) -> str:
    """The digest of the step's output when nothing happens."""
    store = Store(tmp_path / "undisturbed")
    attempt = store.begin("k", "a")
    work = store.work("k", 0)
    (work / BEGUN).write_text("{}")
    step.stage.run(step.config, {}, Output(attempt.data, attempt.observed), LocalContext(work))
    return store.commit(attempt, {}, number=0).digest


def failures(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Kind and error of each failed attempt that was followed by another."""
    return [(event["kind"], event["error"]) for event in events if event["type"] == "attempt_failed"]
