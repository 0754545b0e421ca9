"""The shared tasks in Ropewalk, from JSON Lines: TASK INPUT OUTPUT TOKENIZER."""

from __future__ import annotations

from process_report import report  # isort: skip  (starts the clock)

import time
from pathlib import Path
from typing import Any

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.data import encode, ingest
from ropewalk.stages.data.cleaning import deduplicate


def _run(stage: Any, config: Any, inputs: dict[str, Path], folder: Path) -> Path:
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    stage.run(config, inputs, output, LocalContext(folder / "work"))
    return output.data


def _read(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    config = ingest.IngestConfig(sources=(ingest.SourceConfig(name="corpus", format="jsonl", id_field="id"),))
    began = time.perf_counter()
    _run(ingest, config, {"corpus": source}, output / "ingest")
    return {"ingest": time.perf_counter() - began}


def _near(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    spent = _read(source, output, tokenizer)
    began = time.perf_counter()
    _run(deduplicate, deduplicate.DeduplicateConfig(), {"documents": output / "ingest/data"}, output / "deduplicate")
    return {**spent, "deduplicate": time.perf_counter() - began}


def _tokenise(source: Path, output: Path, tokenizer: Path) -> dict[str, float]:
    spent = _read(source, output, tokenizer)
    began = time.perf_counter()
    inputs = {"documents": output / "ingest/data", "tokenizer": tokenizer}
    _run(encode, encode.EncodeConfig(), inputs, output / "encode")
    return {**spent, "encode": time.perf_counter() - began}


if __name__ == "__main__":
    report({"exact": _read, "near": _near, "tokenise": _tokenise})
