"""Runs the diamond pipeline on a small disk that is filled at a named point, then again once there is room.

Started by test_full_disk in a mount namespace of its own, where the folder is a tmpfs. Prints what happened as JSON.
"""

import contextlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages
from faults import points

from ropewalk.infra.plan import Planner
from ropewalk.infra.store import Store


def fill(disk: Path) -> None:
    """Leave not one byte free."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def write_much(disk: Path) -> None:
    """As a stage that writes until the disk is full."""
    fill(disk)
    (disk / "much").write_bytes(bytes(65536))


def attempt(store: str) -> dict:
    try:
        result = engine.run(toy_stages.diamond(), store)
    except Exception as error:  # noqa: BLE001 - told to the test, which judges it
        return {"status": "raised", "type": type(error).__name__, "error": str(error)}
    steps = {step.name: [step.status, step.reason] for step in result.steps}
    return {"status": result.status, "steps": steps, "digests": [s.commit and s.commit.digest for s in result.steps]}


def committed(store: Store) -> dict:
    """The commits that are there, of the steps whose inputs are."""
    plans = Planner(toy_stages.diamond(), store).plan()
    return {plan.name: store.numbers(plan.key) for plan in plans if plan.key}


if __name__ == "__main__":
    disk, point = Path(sys.argv[1]), sys.argv[2]
    store = sys.argv[3] if len(sys.argv) > 3 else str(disk / "store")
    act = write_much if point == "data half written" else fill
    points.arm(point, "right", lambda: act(disk), type(Store(store).objects))
    first = attempt(store)
    for name in ("filler", "much"):
        (disk / name).unlink(missing_ok=True)
    between = committed(Store(store))
    print(json.dumps({"first": first, "between": between, "second": attempt(store)}))
