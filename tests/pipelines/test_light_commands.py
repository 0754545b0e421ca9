"""What has nothing to do starts nothing: no heavy import, no tracking process, no Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chain_pipeline
import command_probe
import pytest

from ropewalk.infra import record
from ropewalk.infra.store import Store

HEAVY = {
    *("torch", "ray", "mlflow", "obstore", "transformers", "tokenizers", "datasets", "deepspeed", "accelerate"),
    *(
        "pandas",
        "pyarrow",
        "numpy",
        "scipy",
        "sklearn",
        "matplotlib",
        "sqlalchemy",
        "boto3",
        "faiss",
        "bm25s",
        "jinja2",
    ),
    *("requests", "aiohttp", "yaml", "jsonschema"),
}


def probe(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a command imported and started."""
    result = folder / "probe.json"
    command = [sys.executable, command_probe.__file__, str(result), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(result.read_text())


def heavy_imports(probed: dict[str, Any]) -> set[str]:
    return HEAVY & {name.partition(".")[0] for name in probed["modules"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has all outputs of the chain."""
    folder = tmp_path_factory.mktemp("made")
    made = probe(folder, "run", chain_pipeline.__file__, "--executor", "local", "--store", str(folder / "store"))
    # The probe sees what it is to see: this run did start the tracking process.
    assert any("ropewalk.infra.tracking.sync" in words for words in made["programs"])
    return folder / "store"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", chain_pipeline.__file__, "--executor", "ray"],
        ["run", chain_pipeline.__file__, "--executor", "local", "--json"],
        ["plan", chain_pipeline.__file__],
        ["status"],
        ["--help"],
        ["run", "--help"],
    ],
    ids=["run", "run --executor local", "plan", "status", "--help", "run --help"],
)
def test_where_nothing_has_to_run_nothing_heavy_is_imported_and_nothing_is_started(
    store: Path, tmp_path: Path, arguments: list[str]
) -> None:
    where = [] if "--help" in arguments else ["--store", str(store)]
    probed = probe(tmp_path, *arguments, *where)
    assert heavy_imports(probed) == set()
    assert {words[0] for words in probed["programs"]} <= {"git"}


def test_a_run_that_reuses_everything_says_so_and_leaves_no_trace_of_ray_or_a_tracking_process(
    store: Path, tmp_path: Path
) -> None:
    probe(tmp_path, "run", chain_pipeline.__file__, "--store", str(store))
    run_id = record.run_ids(Store(store))[0]
    kinds = [event["type"] for event in record.read_events(Store(store), run_id)]
    assert kinds == ["run_started", *["step_reused"] * 20, "run_finished"]
    left = {path.relative_to(store / "runs" / run_id).as_posix() for path in (store / "runs" / run_id).rglob("*")}
    assert not left & {"ray.json", "logs/tracking.log", "mlflow.json"}


def test_planning_the_quickstart_imports_nothing_heavy(tmp_path: Path) -> None:
    probed = probe(tmp_path, "plan", "quickstart", "--store", str(tmp_path / "empty"))
    assert heavy_imports(probed) == set()
