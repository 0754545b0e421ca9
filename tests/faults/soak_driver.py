"""One driver of a soak: runs a random pipeline to its end and prints how it went. Started, and killed, by soak.py."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
from faults.random_pipelines import random_pipeline

from ropewalk.infra.plan import Selection

if __name__ == "__main__":
    store, seed, variant, *force = sys.argv[1:]
    result = engine.run(random_pipeline(int(seed), int(variant)), store, Selection(force=tuple(force)))
    digests = {step.name: step.commit.digest if step.commit else None for step in result.steps}
    reasons = {step.name: step.reason for step in result.steps if step.status in ("failed", "skipped")}
    print(json.dumps({"status": result.status, "digests": digests, "reasons": reasons}))
    sys.exit(0 if result.status == "succeeded" else 1)
