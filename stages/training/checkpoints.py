"""Step checkpoints: complete or absent, verified before use, the last two kept.

Layout of the folder: `step-000100/` holds DeepSpeed's files, `history.jsonl` (one line a step done) and
`complete.json`, which lists each file's size and sha256. A checkpoint is written under a name with a leading dot and
renamed by rank 0 after every rank has finished, so a crash leaves no half-written one. Weights, optimiser state and
step resume exactly; nothing else is state, for order, learning rate and seeds are functions of the step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEPT = 2
MANIFEST, HISTORY = "complete.json", "history.jsonl"
History = list[dict[str, float]]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run. All ranks call all methods, in step."""

    folder: Path
    rank: int
    world_size: int

    def save(self, engine: Any, step: int, history: History) -> None:
        """Save the state after `step` steps, with the history so far."""
        import torch.distributed as dist

        name = f"step-{step:06d}"
        partial, final = self.folder / f".{name}", self.folder / name
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        engine.save_checkpoint(str(self.folder), tag=partial.name, save_latest=False)
        if self.rank == 0:
            write_history(partial / HISTORY, history)
        dist.barrier()
        digests = self._digests(partial, sorted(path.name for path in partial.iterdir()))
        if self.rank == 0:
            (partial / MANIFEST).write_text(json.dumps({"step": step, "files": digests}, indent=1, sort_keys=True))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            for old in self._saved()[:-KEPT]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self, engine: Any) -> tuple[int, History]:
        """Load the newest sound checkpoint; returns steps done and their history, or (0, []).

        A damaged one is passed over for the one before, with a line on standard error.
        """
        import torch.distributed as dist

        dist.barrier()
        saved = self._saved()
        for folder in reversed(saved):
            manifest = self._verified(folder)
            if manifest is None:
                if self.rank == 0:
                    print(f"ropewalk: checkpoint {folder.name} is damaged; using the one before", file=sys.stderr)  # noqa: T201
                continue
            engine.load_checkpoint(str(self.folder), tag=folder.name, load_lr_scheduler_states=False)
            if self.rank == 0:
                print(f"ropewalk: resuming after step {manifest['step']}", file=sys.stderr)  # noqa: T201
            return manifest["step"], read_history(folder / HISTORY)
        if saved and self.rank == 0:
            print("ropewalk: no checkpoint is sound; training starts again", file=sys.stderr)  # noqa: T201
        return 0, []

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def _verified(self, folder: Path) -> dict[str, Any] | None:
        """The manifest, if it is readable and every file has its digest; all ranks agree."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            expected = manifest["files"]
        except (OSError, ValueError, KeyError):
            expected, manifest = {}, None
        return manifest if self._digests(folder, sorted(expected)) == expected else None

    def _digests(self, folder: Path, names: Sequence[str]) -> dict[str, list[Any]]:
        """Size and sha256 of each file, each rank reading its part; the same result on all ranks."""
        import torch.distributed as dist

        mine = {name: _size_and_sha256(folder / name) for name in names[self.rank :: self.world_size]}
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        return {name: value for part in parts for name, value in part.items()}


def write_history(path: Path, history: History) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history), encoding="utf-8")


def read_history(path: Path) -> History:
    """What `write_history` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _size_and_sha256(path: Path) -> list[Any]:
    if not path.is_file():
        return [0, "missing"]
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
