"""Runs the diamond pipeline on a machine whose clock is wrong: skewed_driver.py STORE SECONDS. Prints the statuses."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages

if __name__ == "__main__":
    root, seconds = sys.argv[1], float(sys.argv[2])
    right_time = time.time
    time.time = lambda: right_time() + seconds
    real = toy_stages.total.run

    def slow(*given: object) -> None:
        time.sleep(0.5)  # So that the other driver meets it at work.
        real(*given)

    toy_stages.total.run = staticmethod(slow)
    result = engine.run(toy_stages.diamond(), Path(root))
    digests = [step.commit and step.commit.digest for step in result.steps]
    print(json.dumps({"status": result.status, "statuses": engine.statuses(result), "digests": digests}))
