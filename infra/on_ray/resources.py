"""What processes need, and what a Ray cluster has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ropewalk.infra.step import Resources, UserError

LOOK_AGAIN_SECONDS = 1.0


def ray_needs(resources: Resources) -> dict[str, float]:
    """Resources by the names under which Ray's nodes list them; memory in bytes."""
    found = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    if resources.memory_gib is not None:
        found["memory"] = int(resources.memory_gib * 2**30)
    return {name: amount for name, amount in found.items() if amount}


def ray_options(resources: Resources) -> dict[str, Any]:
    """Resources as the options of a Ray task or actor."""
    found = ray_needs(resources)
    options: dict[str, Any] = {"num_cpus": found.pop("CPU", 0), "num_gpus": found.pop("GPU", 0)}
    if "memory" in found:
        options["memory"] = found.pop("memory")
    return {**options, "resources": found}


def places(resources: Resources) -> int:
    """How many processes with these needs the cluster holds at once when it is idle, counted node by node."""
    wanted = ray_needs(resources) or {"CPU": 1}
    return sum(int(min(node.get(name, 0) / amount for name, amount in wanted.items()) + 1e-9) for node in _nodes())


def require_room(
    who: str,
    resources: Resources,
    num_processes: int = 1,
    wait_seconds: float = 0.0,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until the cluster is large enough for processes that run at once; an autoscaler is asked for the room.

    Raises UserError saying what is missing if it is not, `wait_seconds` later.
    """
    wanted = ray_needs(resources)
    if not wanted or places(resources) >= num_processes:
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[wanted] * num_processes)
    deadline = time.monotonic() + wait_seconds
    try:
        while places(resources) < num_processes:
            if time.monotonic() >= deadline or cancelled():
                raise UserError(f"{who} needs {_missing(wanted, num_processes, places(resources))}")
            time.sleep(LOOK_AGAIN_SECONDS)
    finally:
        request_resources(bundles=[])


def _missing(wanted: Mapping[str, float], num_processes: int, have: int) -> str:
    """What the cluster lacks, in words."""
    advice = "ask for less in the step's resources, or wait for more nodes with --wait-for-resources SECONDS"
    largest = {name: max((node.get(name, 0) for node in _nodes()), default=0) for name in wanted}
    lacking = [name for name, amount in wanted.items() if amount > largest[name]]
    if lacking:
        name = lacking[0]
        found = f"the cluster has {_in_words(name, largest[name])} on its largest node"
        return f"{_in_words(name, wanted[name])}; {found}: {advice}"
    each = _all_in_words(wanted)
    if have == 0:
        return f"{each} on one node; no node of the cluster has all of it: {advice}"
    return f"{num_processes} workers at once, each with {each}; the cluster has room for {have}: {advice}"


def in_words(resources: Resources, num_processes: int) -> str:
    """Processes and what each needs, as people say it."""
    each = _all_in_words(ray_needs(resources))
    if num_processes == 1:
        return "1 worker" + (f" with {each}" if each else "")
    return f"{num_processes} workers" + (f" with {each} each" if each else "")


def _all_in_words(needs: Mapping[str, float]) -> str:
    return ", ".join(_in_words(name, amount) for name, amount in needs.items())


def _in_words(name: str, amount: float) -> str:
    return f"{amount / 2**30:.3g} GiB of memory" if name == "memory" else f"{amount:g} {name}"


def draining_nodes() -> set[str]:
    """Ray's ids of the nodes that are about to be taken away.

    Ray has no public way to ask. Where a version of it lacks this one, a node that is taken away counts as lost.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except (ImportError, AttributeError):
        return set()


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
