"""Objects on their way to other processes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ropewalk.infra.task import importable


@dataclass(frozen=True)
class Shipped:
    """Objects on their way to another process, unpacked there only after their modules can be imported."""

    import_paths: tuple[str, ...]
    payload: bytes

    @staticmethod
    def pack(import_paths: tuple[str, ...], *objects: Any) -> Shipped:
        """Pack objects whose classes and functions may live in the folders `import_paths`."""
        # Ray's own: it also pickles functions and classes that no other process can import.
        from ray.cloudpickle.cloudpickle import dumps

        return Shipped(import_paths, dumps(objects))

    def unpack(self) -> Any:
        """The objects, in order."""
        import pickle

        with importable(self.import_paths):
            return pickle.loads(self.payload)


def remote(function: Any, options: Mapping[str, Any]) -> Any:
    """A function or class as Ray's, with options."""
    import ray

    return ray.remote(**options)(function)
