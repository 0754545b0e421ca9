"""Runs the diamond pipeline in this process and kills it (SIGKILL) at a named point. Started by test_kill_driver."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages
from faults import points

from ropewalk.infra.store import Store


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    root, point, step = sys.argv[1:]
    points.arm(point, step, die, type(Store(root).objects))
    result = engine.run(toy_stages.diamond(), root)
    print(result.status)
