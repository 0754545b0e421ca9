"""Runs the diamond pipeline in this process and kills it (SIGKILL) at a named point. Started by test_kill_driver."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages

from ropewalk.infra import store, task
from ropewalk.infra.record import RunRecord


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, step: str) -> None:
    """Make the process die when it comes to `point` of `step`."""
    seen = {"step": None}
    begin = store.Store.begin

    def watch(self, key, name):
        attempt = begin(self, key, name)
        if point == "attempt begun" and seen["step"] == step:
            die()
        return attempt

    run_task = task.run_task

    def watch_task(given, make_context, report):
        seen["step"] = given.step
        return run_task(given, make_context, report)

    def before(owner, name, wanted, after=False):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if point == wanted and not after and seen["step"] == step:
                die()
            result = real(*args, **kwargs)
            if point == wanted and after and seen["step"] == step:
                die()
            return result

        setattr(owner, name, wrapped)

    store.Store.begin = watch
    from ropewalk.infra import local

    local.run_task = watch_task
    before(store, "_describe", "data written")
    before(store, "_write_synced", "before the manifest")
    before(os, "link", "before the commit")
    before(os, "link", "after the commit", after=True)
    before(store.Store, "drop_work", "before the scratch is dropped")
    before(RunRecord, "append", "before it is recorded")


if __name__ == "__main__":
    root, point, step = sys.argv[1:]
    arm(point, step)
    result = engine.run(toy_stages.diamond(), Path(root))
    print(result.status)
