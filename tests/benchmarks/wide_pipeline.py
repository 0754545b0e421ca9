"""A chain of steps that write many small files."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ropewalk.infra.step import Pipeline, Step

FILES_PER_FOLDER = 1000


class FilesConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    num_files: int


class files:  # noqa: N801
    """Writes its files, each of a few bytes of its own."""

    NAME, VERSION = "files", 1

    @staticmethod
    def run(config, inputs, output, context):
        for first in range(0, config.num_files, FILES_PER_FOLDER):
            folder = output.data / f"part-{first // FILES_PER_FOLDER:03d}"
            folder.mkdir()
            for file in range(first, min(first + FILES_PER_FOLDER, config.num_files)):
                (folder / f"rows-{file:06d}.txt").write_text(f"{config.number} {file}\n")


def pipeline(num_steps: int = 50, num_files: int = 10_000) -> Pipeline:
    """files -> files -> ..."""
    steps: list[Step] = []
    for number in range(num_steps):
        inputs = {"before": steps[-1]} if steps else {}
        steps.append(Step(f"s{number:02d}", files, FilesConfig(number=number, num_files=num_files), inputs))
    return Pipeline("wide", tuple(steps))
