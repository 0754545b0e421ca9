"""The benchmark of the kernels runs, here on the CPU, and its numbers agree with each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernels_speed.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "kernels.json"
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--device", "cpu", "--lengths", "256"]
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8"))


def test_every_pattern_is_timed_forward_and_backward_without_a_failure(measured):
    rows = [row for row in measured["times"] if row["is_ours"]]
    patterns = {"causal", "document", "anchor", "sliding_window", "shifted_groups", "shared_prefix", "block_lists"}
    assert {row["pattern"] for row in rows} == patterns
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 and "failed" not in row for row in measured["times"])
    assert measured["left_out"] == []


def test_eta_is_dense_time_by_the_peer_times_density_over_time(measured):
    dense = next(row for row in measured["times"] if row["implementation"] == "sdpa")
    row = next(row for row in measured["times"] if row["pattern"] == "anchor")
    assert row["total_eta"] == pytest.approx(dense["total_ms"] * row["density"] / row["total_ms"])
    assert row["plan_share"] == pytest.approx(row["plan_ms"] / row["total_ms"])


def test_errors_against_fp64_are_those_of_single_precision(measured):
    for row in measured["errors"]:
        for errors in (row["plain"], row["tiled"]):
            assert all(0 < error < 1e-5 for error in errors.values()), row
