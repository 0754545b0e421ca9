"""How often an object store is asked: each request is paid for, and takes as long as a step that is reused."""

import pytest
from engine import run, statuses
from faults.unreliable_server import unreliable_server
from object_store_server import new_bucket
from toy_stages import NumberConfig, number, total

from ropewalk.infra.record import run_ids
from ropewalk.infra.step import Pipeline, Step
from ropewalk.infra.store import Store

NUM_STEPS = 20


@pytest.fixture(scope="module")
def server():
    with unreliable_server() as proxy:
        yield proxy


def chain():
    steps = [Step("step0", number, NumberConfig(value=1))]
    for index in range(1, NUM_STEPS):
        steps.append(Step(f"step{index}", total, NumberConfig(value=index), inputs={"before": steps[-1]}))
    return Pipeline("chain", tuple(steps))


def test_a_reused_step_costs_six_requests_and_a_record_that_is_brought_one_for_each_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "here"))
    uri = new_bucket()
    run(chain(), uri)
    server.met.clear()
    assert set(statuses(run(chain(), uri)).values()) == {"reused"}
    assert server.met.total() <= 6 * NUM_STEPS + 8
    monkeypatch.setenv("ROPEWALK_SCRATCH", str(tmp_path / "elsewhere"))
    server.met.clear()
    assert len(run_ids(Store(uri))) == 2
    assert server.met.total() <= 2 * (NUM_STEPS + 4)
