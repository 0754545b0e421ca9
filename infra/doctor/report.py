"""Checks what a run needs, of this machine and of what it talks to. Nothing heavy is imported into this process."""

from __future__ import annotations

from collections.abc import Callable

from ropewalk.infra.doctor import machine, services
from ropewalk.infra.doctor.machine import Check
from ropewalk.infra.step import UserError
from ropewalk.infra.store import Store
from ropewalk.infra.tracking.database import default_tracking_uri


def diagnose(store_uri: str, address: str | None = None) -> list[Check]:
    """All checks, in the order in which a user would fix things; of a cluster, if its address is given.

    The store's folder is made if it is not there.
    """
    try:
        root = Store(store_uri).root
    except (UserError, OSError) as error:
        # What is wrong with the store is told once; without it there is no folder to look at.
        return [*_all(machine.check_python, machine.check_packages), Check("store", False, str(error))]
    checks = _all(
        machine.check_python,
        machine.check_packages,
        machine.check_import_names,
        lambda: services.check_store(store_uri),
        lambda: machine.check_disk(root),
        machine.check_shared_memory,
        machine.check_memory,
        services.check_ray_authentication,
    )
    checks += [services.check_cluster(address)] if address else []
    checks += [services.check_mlflow(root), services.check_clock(default_tracking_uri(root))]
    return [*checks, *machine.check_training()]


def _all(*checks: Callable[[], Check]) -> list[Check]:
    return [check() for check in checks]
