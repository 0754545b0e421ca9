"""Builds run records as the engine writes them: events, artifacts with their manifest, in a store folder."""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ropewalk.infra.process import process_start

PIXEL_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class RecordBuilder:
    """Appends events of one run; its clock stands still unless `clock` is moved."""

    def __init__(
        self,
        store_root: Path,
        run_id: str,
        pipeline: str,
        clock: float = 1_700_000_000.0,
        driver: Mapping[str, object] | None = None,
    ) -> None:
        """`driver` says which process runs it; default: this one."""
        self.store_root = store_root
        self.run_id = run_id
        self.pipeline = pipeline
        self.clock = clock
        self.folder = store_root / "runs" / run_id
        self.folder.mkdir(parents=True)
        here = {"host": socket.gethostname(), "pid": os.getpid(), "process_started": process_start(os.getpid())}
        asked = {"pipeline": pipeline, "request": {}, "started_at": clock, **here, **(driver or {})}
        (self.folder / "run.json").write_text(json.dumps(asked))
        self.seq = 0
        self.outputs: dict[str, dict] = {}

    @property
    def path(self) -> Path:
        return self.folder / "events.jsonl"

    def add(self, type: str, **fields: object) -> None:
        event = {"seq": self.seq, "time": self.clock, "type": type, **fields}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self.seq += 1
        self.clock += 0.25

    def start(self, **steps: dict) -> None:
        """Each step: `{"stage", "config", "inputs"}`."""
        specs = [
            {"name": name, "stage": step.get("stage", name), "version": 1, "config": step.get("config", {})}
            | {"inputs": step.get("inputs", {})}
            for name, step in steps.items()
        ]
        self.add(
            "run_started",
            run_id=self.run_id,
            pipeline=self.pipeline,
            store_uri=str(self.store_root),
            git={"commit": "c0ffee" * 6, "dirty": False},
            versions={"ropewalk": "0.1.0"},
            steps=specs,
        )

    def inputs(self, **slots: str) -> dict:
        """Inputs by slot: the name of a step that has an output, or a path."""
        found = {}
        for slot, source in slots.items():
            if source in self.outputs:
                found[slot] = {**self.outputs[source], "step": source}
            else:
                found[slot] = {"uri": source, "digest": sha256(source), "step": None}
        return found

    def begin(self, step: str, attempt: int | str = 1, **slots: str) -> None:
        self.add("step_started", step=step, key=sha256(step), attempt=attempt, inputs=self.inputs(**slots))

    def metrics(self, step: str, values: dict, at: int | None = None, about: str | None = None) -> None:
        self.add("metrics", step=step, attempt=1, metrics=values, metric_step=at, about=about)

    def artifact(self, step: str, kind: str, files: dict[str, bytes | str] | None = None, **fields: object) -> dict:
        """Write an artifact's folders and return its output record."""
        attempt = self.store_root / "objects" / sha256(step) / "attempts" / "a1"
        content = {"artifact.json": json.dumps({"kind": kind, **fields}), **(files or {})}
        for name, data in content.items():
            path = attempt / (name if name.startswith("observed/") else f"data/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        folders = {name: name if name.startswith("observed/") else f"data/{name}" for name in content}
        entries = [{"path": folders[name], "size": len(content[name])} for name in sorted(content)]
        (attempt / "manifest.json").write_text(json.dumps({"files": entries}), encoding="utf-8")
        digest = sha256(json.dumps([step, kind, fields]))
        self.outputs[step] = {"uri": str(attempt / "data"), "digest": digest}
        sizes = {"num_bytes": sum(len(data) for data in content.values()), "num_files": len(content)}
        return {**self.outputs[step], **sizes}

    def succeed(self, step: str, kind: str, files: dict[str, bytes | str] | None = None, **fields: object) -> None:
        output = self.artifact(step, kind, files, **fields)
        self.add("step_succeeded", step=step, key=sha256(step), attempt=1, output=output, seconds=2.5, reason="new")

    def reuse(self, step: str, other: RecordBuilder, **slots: str) -> None:
        """Reuse what the step made in another run."""
        self.outputs[step] = other.outputs[step]
        inputs = self.inputs(**slots)
        output = self.outputs[step]
        self.add("step_reused", step=step, key=sha256(step), inputs=inputs, output=output, reason="unchanged")

    def finish(self, status: str = "succeeded") -> None:
        self.add("run_finished", status=status, seconds=20.0)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


QUICKSTART_STEPS = {
    "documents": {
        "stage": "ingest",
        "config": {"min_bytes": 100},
        "inputs": {"files": {"external": "/in"}},
    },
    "rows": {
        "stage": "pack",
        "config": {"row_tokens": 4096, "mix": {"long_fraction": 0.5, "sources": ["a", "b"]}, "cap": None},
        "inputs": {"documents": {"step": "documents"}},
    },
    "base": {"stage": "train", "config": {"learning_rate": 1e-3}, "inputs": {"rows": {"step": "rows"}}},
    "extend": {
        "stage": "train",
        "config": {"learning_rate": 1e-4, "hub_token": "hf_abcdefghijklmnopqrstuvwxyz"},
        "inputs": {"rows": {"step": "rows"}, "checkpoint": {"step": "base"}},
    },
    "evaluate": {
        "stage": "evaluate",
        "config": {"lengths_tokens": [512, 1024, 2048, 4096]},
        "inputs": {"base": {"step": "base"}, "extended": {"step": "extend"}, "heldout": {"step": "documents"}},
    },
    "report": {"stage": "report", "inputs": {"evaluation": {"step": "evaluate"}}},
}


def write_quickstart_run(store_root: Path, run_id: str, pipeline: str = "quickstart", steps: int = 30) -> RecordBuilder:
    """A finished run of a whole chain: data, base training, extension, both evaluations, report."""
    record = RecordBuilder(store_root, run_id, pipeline)
    record.start(**QUICKSTART_STEPS)
    record.begin("documents", files="/in")
    record.metrics("documents", {"num_documents": 12, "odd@name": 1.0})
    record.succeed(
        "documents", "documents", {"sample.jsonl": '{"text": "x"}\n'}, counts={"in": 12, "kept": 10, "short": 2}
    )
    record.begin("rows", documents="documents")
    record.succeed("rows", "rows", row_tokens=4096, counts={"rows": 64})
    _train(record, "base", steps, {"rows": "rows"}, start=6.0, window=1024)
    _train(record, "extend", steps, {"rows": "rows", "checkpoint": "base"}, start=4.0, window=4096)
    record.begin("evaluate", heldout="documents", base="base", extended="extend")
    for model, window in (("base", 1024), ("extended", 4096)):
        for length in (512, 1024, 2048, 4096):
            score = 0.9 if length <= window else 0.1
            values = {"passkey/score": score, "multikey/score": score / 2, "loss_by_position": 4.0 - score}
            record.metrics("evaluate", values, at=length, about=model)
        record.metrics("evaluate", {"passkey/effective_length_tokens": float(window)}, about=model)
    record.succeed("evaluate", "predictions", {"summary.json": "{}"}, counts={"predictions": 80})
    record.begin("report", evaluation="evaluate")
    files = {"report.html": "<h1>Report</h1>", "plots/scores.png": PIXEL_PNG, "observed/latency.json": "{}"}
    record.succeed("report", "report", files)
    record.finish()
    return record


def _train(record: RecordBuilder, step: str, steps: int, slots: dict, *, start: float, window: int) -> None:
    record.begin(step, **slots)
    for at in range(1, steps + 1):
        loss = 2.0 + (start - 2.0) * math.exp(-at / 10)
        record.metrics(step, {"loss": loss, "learning_rate": 1e-3 / at, "tokens": at * 4096}, at=at)
    record.succeed(step, "checkpoint", {"config.json": '{"model_type": "llama"}'}, row_tokens=window)


def small_record(root: Path, run_id: str) -> RecordBuilder:
    """A training step and an evaluation of its checkpoint, finished."""
    record = RecordBuilder(root, run_id, f"pipeline of {run_id}")
    record.start(train={"config": {"lr": 0.1}}, evaluate={"inputs": {"model": {"step": "train"}}})
    record.begin("train", rows="/rows")
    for at in range(3):
        record.metrics("train", {"loss": 3.0 - at}, at=at)
    record.succeed("train", "checkpoint")
    record.begin("evaluate", model="train", heldout="/heldout")
    record.metrics("evaluate", {"score": 0.5}, at=1024, about="model")
    record.add("something_of_a_later_version", step="evaluate")
    record.succeed("evaluate", "predictions")
    record.finish()
    return record


@functools.cache
def empty_database() -> Path:
    """A fresh MLflow database, made once a process: MLflow takes several seconds for it."""
    from ropewalk.infra.tracking.database import prepare

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


def store_with_database(folder: Path) -> Path:
    """A store's folder with its own copy of an empty MLflow database."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_database(), folder / "mlflow.db")
    return folder
