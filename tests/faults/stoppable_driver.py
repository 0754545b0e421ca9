"""Runs the diamond and stops itself (SIGSTOP) at a named point of a step. Started by test_zombie."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages
from faults import points

from ropewalk.infra.store import Store

if __name__ == "__main__":
    root, point, step = sys.argv[1:]
    points.arm(point, step, lambda: os.kill(os.getpid(), signal.SIGSTOP), type(Store(root).objects))
    result = engine.run(toy_stages.diamond(), root)
    outcome = next(each for each in result.steps if each.name == step)
    print(result.status, outcome.status, outcome.reason)
