"""Of a process that Ray has lost, one short sentence says what, where and why; its kind follows from Ray's error."""

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, WorkerCrashedError

from ropewalk.infra.failures import classify
from ropewalk.infra.on_ray.errors import died
from ropewalk.infra.task import sentence

LONG = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common root causes include: (1) the process "
    "was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, (3) ..."
)


def actor(message, **where):
    return ActorDiedError(ActorDiedErrorContext(error_message=message, actor_id=b"a" * 16, class_name="C", **where))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            actor(LONG, pid=7, node_ip_address="10.0.0.2"),
            "rank 1 died (process 7 on 10.0.0.2): ActorDiedError, Worker unexpectedly exits with a connection error "
            "code 2",
        ),
        (
            actor("The actor died because its node has died. Node Id: 0abc\n\tterminated", node_ip_address="10.0.0.2"),
            "rank 1 died (10.0.0.2): ActorDiedError, because its node has died",
        ),
        (actor(""), "rank 1 died: ActorDiedError"),
        (WorkerCrashedError(), "rank 1 died: WorkerCrashedError"),
        (
            NodeDiedError("Task failed because the node died.\n\nThe node IP: 10.0.0.3, node ID: 0abc"),
            "rank 1 died (10.0.0.3): NodeDiedError",
        ),
    ],
)
def test_a_death_is_told_in_one_sentence_and_is_the_machines_failure(error, told):
    found = died(error, "rank 1")
    assert sentence(found) == told
    assert classify(found) == "infrastructure" and found.__cause__ is error


def test_what_needs_too_much_memory_is_the_users_to_mend():
    assert classify(died(OutOfMemoryError("Task was killed due to the node running low on memory"), "x")) == "user"
