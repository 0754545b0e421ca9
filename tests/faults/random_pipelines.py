"""Random pipelines of small stages, the same for the same seed, that can be slow and can fail for a while.

What a stage writes depends on its config and inputs alone. How it behaves meanwhile (`SOAK_UNREST`: how often it fails
with an error of the machines, how long it sleeps) depends on luck. Every execution leaves a line, with key and
attempt, in the journal `SOAK_JOURNAL`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ropewalk.infra.step import Pipeline, Retries, Step

FEW_SECONDS = Retries(max_attempts=12, backoff_seconds=0.05, backoff_cap_seconds=0.3)


class BlendConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    salt: str
    num_files: int = 3
    coarse: bool = False
    """The output tells only whether the blend is even: an input may change without it."""


def _unrest() -> float:
    return float(os.environ.get("SOAK_UNREST", "0"))


def journal(output: Path, what: str, **facts: object) -> None:
    """One line for an execution that begins, keeps a part, or ends. Single small appends are not torn."""
    path = os.environ.get("SOAK_JOURNAL")
    if path:
        attempt = output.parent
        entry = {"what": what, "time": time.time(), "pid": os.getpid(), "attempt": attempt.name, **facts}
        line = json.dumps({**entry, "key": attempt.parent.parent.name}) + "\n"
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, line.encode())
        os.close(handle)


def _part(seed: bytes, number: int, coarse: bool) -> bytes:
    digest = hashlib.sha256(seed + number.to_bytes(2, "big")).digest()
    return b"even" if coarse and seed[0] % 2 == 0 else b"odd" if coarse else digest * 64


class blend:  # noqa: N801
    """Writes files that depend on the salt and on every byte of its inputs; parts survive in the work folder."""

    NAME, VERSION = "blend", 1

    @staticmethod
    def run(config, inputs, output, context):
        looked_at = time.time()
        found = [n for n in range(config.num_files) if (context.work / f"part-{n}").exists()]
        journal(output.data, "began", time=looked_at, found=found)
        hasher = hashlib.sha256(config.salt.encode())
        for slot, folder in sorted(inputs.items()):
            for path in sorted(folder.iterdir()):
                hasher.update(f"{slot}/{path.name}".encode() + path.read_bytes())
        for number in range(config.num_files):
            if context.cancelled():
                raise RuntimeError("asked to stop")
            time.sleep(random.random() * 0.3 * _unrest())
            if random.random() < 0.06 * _unrest():
                raise ConnectionResetError("the network is down for a moment")
            part = _part(hasher.digest(), number, config.coarse)
            kept = context.work / f"part-{number}"
            if kept.exists() and kept.read_bytes() != part:
                raise AssertionError(f"{kept} is of another key or torn")
            unfinished = kept.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(part)
            unfinished.replace(kept)
            journal(output.data, "kept", part=number)
            with (output.data / f"part-{number}").open("wb") as file:
                file.write(part[: len(part) // 2])
                file.flush()
                file.write(part[len(part) // 2 :])
            context.log({"number": number}, step=number)
            context.progress(number + 1, config.num_files, "parts")
        (output.observed / "luck.json").write_text(json.dumps([os.getpid(), time.time()]))
        journal(output.data, "wrote")

    @staticmethod
    def check(config, output):
        names = sorted(path.name for path in output.iterdir())
        if names != [f"part-{number}" for number in range(config.num_files)]:
            raise ValueError(f"{output}: holds {names}")


def random_pipeline(seed: int, variant: int = 0) -> Pipeline:
    """A graph of 5 to 12 steps. Variants of one seed differ in one config, so that they share keys upstream of it."""
    draw = random.Random(seed)
    steps: list[Step] = []
    num_steps = draw.randint(5, 12)
    changed = draw.randrange(num_steps)
    for number in range(num_steps):
        sources = draw.sample(steps, min(len(steps), draw.choice([0, 1, 1, 2, 3])))
        salt = f"{seed}/{number}" + (f"/{variant}" if variant and number == changed else "")
        config = BlendConfig(salt=salt, num_files=draw.randint(1, 4), coarse=draw.random() < 0.2)
        inputs = {f"slot{place}": source for place, source in enumerate(sources)}
        steps.append(Step(f"step{number}", blend, config, inputs=inputs, retries=FEW_SECONDS))
    return Pipeline(f"soak{seed}", tuple(steps))
