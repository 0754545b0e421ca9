"""The notebooks run on a finished run as they stand, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from run_records import RecordBuilder, store_with_database, write_quickstart_run

from ropewalk.infra.store import Store
from ropewalk.infra.tracking.sync import sync

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quickstart run, and a later one that reused its training and evaluation."""
    root = store_with_database(tmp_path_factory.mktemp("notebooks"))
    first = write_quickstart_run(root, "run-1")
    second = RecordBuilder(root, "run-2", "quickstart", clock=1_800_000_000.0)
    second.start(**{name: {"stage": "stage"} for name in ("documents", "base", "extend", "evaluate", "report")})
    second.reuse("documents", first)
    second.reuse("base", first)
    second.reuse("extend", first, checkpoint="base")
    second.reuse("evaluate", first, base="base", extended="extend", heldout="documents")
    second.reuse("report", first, evaluation="evaluate")
    second.finish()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for run_id in ("run-1", "run-2"):
            sync(Store(str(root)), run_id)
    return root


def execute(path: Path, folder: Path) -> tuple[str, int]:
    """Run a notebook in a folder; what it printed, and how many figures it drew."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    outputs: list[Any] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    return "".join(output.get("text", "") for output in outputs), len(figures)


def test_exploring_a_run_shows_steps_curves_scores_and_report(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROPEWALK_STORE", str(store))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("ROPEWALK_PIPELINE", raising=False)
    printed, num_figures = execute(NOTEBOOKS[0], tmp_path)
    assert num_figures == 2
    assert "run run-2 of quickstart" in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    # The newest run reused everything: seconds and scores come from the run that made them.
    assert lines["base"][2:4] == ["reused", "2.5"]
    assert "passkey         extend          512: 0.90  1024: 0.90  2048: 0.90  4096: 0.90" in printed
    assert "passkey         base            512: 0.90  1024: 0.90  2048: 0.10  4096: 0.10" in printed
    assert lines["report:"][1].endswith("data/report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 25 for cell in code)
