"""The benchmarks of the kernels run, here on the CPU, and their numbers agree with each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script, output, *arguments):
    command = [sys.executable, str(FOLDER / script), *arguments, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text(encoding="utf-8")), done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "kernels.json"
    return run("kernels_speed.py", output, "--preset", "tiny", "--device", "cpu", "--lengths", "256")[0]


def test_every_pattern_is_timed_forward_and_backward_without_a_failure(measured):
    rows = [row for row in measured["times"] if row["is_ours"]]
    patterns = {"causal", "document", "anchor", "sliding_window", "shifted_groups", "shared_prefix", "block_lists"}
    assert {row["pattern"] for row in rows} == patterns
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 and "failed" not in row for row in measured["times"])
    assert measured["left_out"] == [] and measured["running"] is None


def test_eta_is_dense_time_by_the_peer_times_density_over_time(measured):
    dense = next(row for row in measured["times"] if row["implementation"] == "sdpa")
    row = next(row for row in measured["times"] if row["pattern"] == "anchor")
    assert row["total_eta"] == pytest.approx(dense["total_ms"] * row["density"] / row["total_ms"])
    assert row["times_as_fast_as"] == {"dense": pytest.approx(dense["total_ms"] / row["total_ms"])}
    assert row["plan_share"] == pytest.approx(row["plan_ms"] / row["total_ms"])


def test_errors_against_fp64_are_those_of_single_precision(measured):
    assert {row["implementation"] for row in measured["errors"]} == {"plain", "tiled"}
    for row in measured["errors"]:
        assert all(0 < row[part] < 1e-5 for part in ("out", "dq", "dk", "dv")), row


def test_a_resumed_benchmark_keeps_what_is_there_names_what_died_and_measures_the_rest(measured, tmp_path):
    output = tmp_path / "kernels.json"
    *kept, died, rest = measured["times"]
    attempted = [
        key for key in measured["attempted"] if " 10% listed" not in key and " 5% listed, 256, tiled" not in key
    ]
    names = {name: died[name] for name in ("pattern", "setting", "tokens", "implementation", "is_ours")}
    earlier = measured | {
        "times": [row | {"forward_ms": 12345.0} for row in kept],
        "attempted": attempted,
        "running": {"part": "times", "names": names},
    }
    assert (died["setting"], rest["setting"]) == ("10% listed", "5% listed")
    output.write_text(json.dumps(earlier), encoding="utf-8")
    arguments = ("--preset", "tiny", "--device", "cpu", "--lengths", "256", "--resume")
    resumed, _ = run("kernels_speed.py", output, *arguments)
    by_setting = {row["setting"]: row for row in resumed["times"] if row["pattern"] == "block_lists"}
    assert by_setting["25% listed"]["forward_ms"] == 12345.0
    assert "ended in the middle" in by_setting["10% listed"]["failed"]
    assert 0 < by_setting["5% listed"]["forward_ms"] < 12345.0


BROKEN_AFTER_A_FAILURE = """
import sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
import kernels_speed
kernels_speed._is_broken = lambda device: True
kernels_speed.main()
"""


def test_after_a_failure_that_breaks_the_gpu_the_rest_is_measured_in_a_new_process(tmp_path):
    output = tmp_path / "kernels.json"
    script = [sys.executable, "-c", BROKEN_AFTER_A_FAILURE, str(FOLDER / "kernels_speed.py")]
    asked = ["--preset", "tiny", "--device", "cpu", "--lengths", "256", "--patterns", "block_lists", "causal"]
    command = [*script, *asked, "--implementations", "segmented", "tiled", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(output.read_text(encoding="utf-8"))
    assert "--resume" in measured["command"]
    assert measured["errors"][1]["failed"].startswith("ValueError: a plan with block lists has no pieces")
    tiled = {row["setting"] for row in measured["times"] if row["implementation"] == "tiled" and "failed" not in row}
    assert tiled == {"all", "75% listed", "50% listed", "25% listed", "10% listed", "5% listed"}


def test_a_benchmark_out_of_time_names_what_it_left_out(tmp_path):
    arguments = ("--preset", "tiny", "--device", "cpu", "--lengths", "256", "--minutes", "0")
    measured, shown = run("kernels_speed.py", tmp_path / "kernels.json", *arguments)
    assert measured["times"] == [] and "times, anchor, 4 documents, 256, tiled" in measured["left_out"]
    assert "left out, no time: times, anchor, 4 documents, 256, tiled" in shown


def test_core_measures_dense_anchor_and_document_first_and_compiles_most_of_flex_last(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import kernels_speed
    import torch

    shape = kernels_speed.Shape(32, 8, 128, torch.bfloat16, "cpu")
    core = kernels_speed.PRESETS["core"]
    found = kernels_speed.jobs(core, list(kernels_speed.PATTERNS), ["triton"], shape, is_core=True)
    order = [(job.case.tokens, job.case.pattern, job.implementation) for job in found]
    assert order[:2] == [(65536, "causal", "triton"), (65536, "causal", "sdpa_cudnn")]
    first = {name: order.index((65536, *name)) for name in (("anchor", "flex"), ("block_lists", "triton"))}
    assert first["anchor", "flex"] < first["block_lists", "triton"]
    last_ours = max(place for place, (_, _, name) in enumerate(order) if name == "triton")
    assert order.index((65536, "causal", "flex")) > last_ours


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "stack.json"
    return run("layer_stack_speed.py", output, "--preset", "tiny", "--device", "cpu", "--steps", "1")


def test_a_stack_of_layers_is_timed_under_every_attention(stack):
    measured, shown = stack
    rows = {row["name"]: row for row in measured["steps"]}
    assert set(rows) == {
        "sdpa", "causal", "no attention", *(f"{policy} {n}" for policy in ("anchor", "document") for n in (16, 64))
    }  # fmt: skip
    assert all(row["step_s"] > 0 and "failed" not in row and row["name"] in shown for row in rows.values())
    assert measured["left_out"] == []


def test_a_steps_share_of_attention_is_what_no_attention_spares(stack):
    rows = {row["name"]: row for row in stack[0]["steps"]}
    full = min(rows["sdpa"]["step_s"], rows["causal"]["step_s"])
    assert rows["anchor 16"]["of_full"] == pytest.approx(rows["anchor 16"]["step_s"] / full)
    share = 1 - rows["no attention"]["step_s"] / rows["anchor 16"]["step_s"]
    assert rows["anchor 16"]["attention_share"] == pytest.approx(share)


def test_a_stack_out_of_time_names_what_it_left_out(tmp_path):
    output = tmp_path / "stack.json"
    arguments = ("--preset", "tiny", "--device", "cpu", "--minutes", "0", "--variants", "causal", "anchor 16")
    measured, shown = run("layer_stack_speed.py", output, *arguments)
    assert measured["steps"] == [] and measured["left_out"] == ["anchor 16", "causal"]
    assert "left out, no time: anchor 16" in shown


def test_a_stack_of_layers_needs_nothing_that_a_bare_gpu_machine_lacks():
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import layer_stack_speed; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    imported = {name.split(".")[0] for name in done.stdout.split()}
    assert "ropewalk" in imported
    assert not imported & {"pydantic", "ray", "mlflow", "deepspeed", "accelerate", "datasets", "pyarrow"}


def test_the_cost_of_plans_is_measured_for_every_pattern(tmp_path):
    measured, _ = run("kernels_plan_cost.py", tmp_path / "cost.json", "--lengths", "4096", "--repeats", "1")
    rows = measured["numbers"]["costs"]
    assert [row["pattern"] for row in rows] == ["causal", "document", "anchor", "sliding_window", "block_lists"]
    assert all(row["plan_ms"] > 0 and row["tiles_ms"] > 0 for row in rows)
