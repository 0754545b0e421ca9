"""What MLflow calls the things of one run, kept beside its record in `mlflow.json`.

Nothing depends on the file: all of it can be found again in MLflow by tag.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Ids:
    """The content of `mlflow.json`."""

    database: str = ""
    """Which MLflow, without secrets; in another one nothing is known yet."""
    experiment_id: str | None = None
    parent_run_id: str | None = None
    children: dict[str, str] = field(default_factory=dict)
    """Run id by step, and by `<step>/<input>` for the runs that hold the metrics about one of several models."""
    models: dict[str, str] = field(default_factory=dict)
    """Logged model id by output digest."""
    seq: int = 0
    """The first event that MLflow may not have."""
    unsent_files: list[int] = field(default_factory=list)
    """Events whose files the artifact storage has not taken yet."""
    is_complete: bool = False
    """Whether MLflow has all of a run that has ended."""
    trouble: str = ""
    """Why MLflow did not take the latest events; empty while all is well."""


def ids_path(store_root: Path, run_id: str) -> Path:
    """Where the ids of a run are kept."""
    return store_root / "runs" / run_id / "mlflow.json"


def read_ids(path: Path) -> Ids:
    """The content of `mlflow.json`; empty if there is none yet or it cannot be read."""
    try:
        return Ids(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Ids()


def write_ids(path: Path, ids: Ids) -> None:
    """Replace the file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(asdict(ids), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
