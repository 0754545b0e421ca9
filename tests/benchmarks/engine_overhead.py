"""What the engine adds to a step: a chain of trivial steps through it, against calling the same functions by hand.

Through the engine every step takes a lease, runs, has its output digested, synced and committed, and is recorded. By
hand the functions are called one after another with folders to read and write. Numbers are per step.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chain_pipeline
import engine
from ray_cluster import START_SECONDS, environment, free_ports
from timings import Sample, progress, summary, timed_call

from ropewalk.infra.task import Output
from ropewalk.stages.context import LocalContext

NUM_STEPS = 20
LOCAL_TARGET, RAY_TARGET = 0.3, 1.0


def by_hand(folder: Path) -> None:
    """Call the stages of the chain in order."""
    made: dict[str, Path] = {}
    for step in chain_pipeline.pipeline(NUM_STEPS):
        output = Output(folder / step.name / "data", folder / step.name / "observed")
        output.data.mkdir(parents=True)
        output.observed.mkdir()
        inputs = {slot: made[name] for slot, name in step.upstream.items()}
        step.stage.run(step.config, inputs, output, LocalContext(folder, lambda event: None))
        made[step.name] = output.data


def through_engine(folder: Path, make_executor: Callable[[], Any] = lambda: None) -> None:
    """Run the chain in a new store."""
    result = engine.run(chain_pipeline.pipeline(NUM_STEPS), folder, executor=make_executor())
    assert set(engine.statuses(result).values()) == {"ran"}


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    """Seconds per step, the calls by hand subtracted; all sides in turns."""
    from ropewalk.infra.on_ray.executor import RayExecutor

    with warm_cluster() as address:
        steps = tuple(chain_pipeline.pipeline(NUM_STEPS))
        sides: dict[str, Callable[[Path], None]] = {
            "by hand": by_hand,
            "local": through_engine,
            "ray": lambda where: through_engine(where, lambda: RayExecutor(steps, address)),
        }
        through_engine(folder / "first", lambda: RayExecutor(steps, address))
        samples: dict[str, list[Sample]] = {side: [] for side in sides}
        for repetition in range(repetitions):
            for side, run in sides.items():
                where = folder / f"{side} {repetition}"
                samples[side].append(timed_call(lambda run=run, where=where: run(where)))
                shutil.rmtree(where)
                progress(f"  round {repetition + 1} of {repetitions}, {side}: {samples[side][-1].wall:.2f} s")
    hand = samples["by hand"]
    return {
        "by hand, per step": summary([_per_step(each) for each in hand]),
        "local executor, overhead per step": summary(_overheads(samples["local"], hand), LOCAL_TARGET),
        "Ray on a warm cluster, overhead per step": summary(_overheads(samples["ray"], hand), RAY_TARGET),
    }


def _per_step(sample: Sample) -> Sample:
    return Sample(sample.wall / NUM_STEPS, sample.cpu / NUM_STEPS)


def _overheads(samples: list[Sample], hand: list[Sample]) -> list[Sample]:
    pairs = zip(samples, hand, strict=True)
    return [_per_step(Sample(each.wall - bare.wall, each.cpu - bare.cpu)) for each, bare in pairs]


@contextlib.contextmanager
def warm_cluster() -> Iterator[str]:
    """The address of a Ray cluster of one node, started in processes of its own and stopped at the end."""
    home = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))
    port, agent, agent_grpc, metrics, client = free_ports(5)
    ports = [f"--port={port}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    ports += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}"]
    node = ["--head", "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={home}", *ports]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *node]
    with (home / "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(home, None), stdout=log, stderr=log, start_new_session=True)
        os.environ["RAY_AUTH_MODE"] = "disabled"
        try:
            _await_cluster(f"127.0.0.1:{port}", home)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            shutil.rmtree(home, ignore_errors=True)


def _await_cluster(address: str, home: Path) -> None:
    code = f"import ray; ray.init({address!r}, log_to_driver=False)"
    subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep(3); {code}"],
        env=environment(home, None),
        check=True,
        timeout=START_SECONDS,
        capture_output=True,
    )
