"""The real chain at a small size: every stage, Ray, DeepSpeed on gloo, MLflow on sqlite. Nothing is replaced."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WINDOWS = (32, 64, 128, 256, 512)
LONG = 1024
SETTINGS = {
    **{f"lesson-{window}.num_rows": 2 * 1024 // window for window in WINDOWS},
    "base.batch_tokens": 1024,
    "base.warmup_steps": 2,
    "base.phases": [{"rows": f"rows-{window}", "num_steps": 2} for window in WINDOWS],
    **{f"{subset}-set.min_heldout_tokens": LONG for subset in ("train", "heldout")},
    **{f"{subset}-set.heldout_fraction": 0.3 for subset in ("train", "heldout")},
    **{f"{step}.row_tokens": LONG for step in ("splice", "knots", "pack", "plant")},
    **{f"{step}.num_rows": 16 for step in ("splice", "knots", "pack", "plant", "synthesise")},
    "extend.batch_tokens": 2 * LONG,
    "extend.phases": [{"rows": "rows", "num_steps": 8}],
    "extend.checkpoint_every_steps": 2,
    "extend.warmup_steps": 1,
    "evaluate.lengths_tokens": [256, LONG],
    "evaluate.samples_per_cell": 1,
    "evaluate.loss_documents": 3,
    "evaluate.loss_tokens": LONG,
    "evaluate.loss_bucket_edges": [0, 256, 512, LONG],
}
DATA_STEPS = ["ingest", "encode", "train-set", "heldout-set", *(f"lesson-{w}" for w in WINDOWS), "base"]
DATA_STEPS += ["neighbours", "splice", "knots", "pack", "plant", "synthesise"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a corpus of real files: some packages of the standard library."""
    folder = tmp_path_factory.mktemp("quickstart")
    for package in ("email", "json", "logging", "unittest", "http", "xml"):
        source = Path(sysconfig.get_paths()["stdlib"], package)
        shutil.copytree(source, folder / "corpus" / package, ignore=shutil.ignore_patterns("__pycache__", "test*"))
    return folder


def arguments(*words, **changes):
    settings = {**SETTINGS, **{name.replace("__", "."): value for name, value in changes.items()}}
    sets = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [sys.executable, "-m", "ropewalk.pipelines.cli", words[0], "quickstart", *words[1:]]
    return [*command, "--param", "corpus=corpus", *sets, "--json"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def ropewalk(home, *words, code=0, **changes):
    done = subprocess.run(
        arguments(*words, **changes), cwd=home, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.rstrip("\n").splitlines()[-1])


def statuses(result):
    return {step["name"]: step["status"] for step in result["steps"]}


def digests(result):
    return {step["name"]: step["output"]["digest"] for step in result["steps"]}


def folder_of(result, name):
    return Path(next(step for step in result["steps"] if step["name"] == name)["output"]["uri"])


@pytest.fixture(scope="module")
def first(home):
    return ropewalk(home, "run")


def test_the_whole_chain_runs(first):
    assert first["status"] == "succeeded"
    assert set(statuses(first).values()) == {"ran"}
    assert {"ingest", "encode", "base", "synthesise", "extend", "evaluate", "report"} <= set(statuses(first))
    assert first["mlflow_run_id"]


def test_a_second_run_reuses_everything(home, first):
    second = ropewalk(home, "run")
    assert set(statuses(second).values()) == {"reused"}
    assert digests(second) == digests(first)


def test_one_changed_field_of_extend_reruns_extend_evaluate_and_report_only(home, first):
    plan = ropewalk(home, "plan", **{"extend.learning_rate": 0.002})
    status = {step["name"]: step["status"] for step in plan["steps"]}
    assert [name for name, value in status.items() if value != "reuse"] == ["extend", "evaluate", "report"]
    assert status["extend"] == "run"
    reason = next(step["reason"] for step in plan["steps"] if step["name"] == "extend")
    assert reason == "config learning_rate 0.001 -> 0.002"
    for step in ("base", "extend"):
        seeded = ropewalk(home, "plan", **{f"{step}.seed": 5})
        assert next(s["status"] for s in seeded["steps"] if s["name"] == step) == "run"


def test_the_extended_checkpoint_loads_in_plain_transformers_and_generates(first):
    folder = folder_of(first, "extend")
    assert len(list(folder.rglob("config.json"))) == 1
    code = (
        "import sys\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('import os', return_tensors='pt')\n"
        "out = model.generate(**ids, max_new_tokens=5, do_sample=False)\n"
        "assert out.shape[1] == ids['input_ids'].shape[1] + 5\n"
        "assert not any(name.startswith('ropewalk') for name in sys.modules)\n"
        "print(model.config.max_position_embeddings, model.config.rope_parameters['rope_type'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(LONG), "yarn"]


def test_the_report_is_one_self_contained_page_with_plots_beside_it(first):
    folder = folder_of(first, "report")
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="/' not in page
    assert len(list(folder.glob("*.png"))) >= 4


def test_mlflow_has_parent_and_child_runs_with_curves_and_models(home, first):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/.ropewalk/mlflow.db")
    parent = client.get_run(first["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=100
    )
    by_name = {run.info.run_name: run for run in children}
    assert set(by_name) == set(statuses(first))
    curve = client.get_metric_history(by_name["extend"].info.run_id, "loss")
    assert [point.step for point in curve] == list(range(1, 9))
    assert by_name["extend"].data.params["rope.method"] == "yarn"
    scores = client.search_logged_models([parent.info.experiment_id])
    assert {"base", "extend"} <= {model.name for model in scores}


def test_killed_in_the_middle_of_training_it_resumes_and_ends_with_equal_digests(home, first):
    step = next(s for s in first["steps"] if s["name"] == "extend")
    store = home / ".ropewalk"
    shutil.rmtree(store / "objects" / step["key"])
    driver = subprocess.Popen(
        arguments("run"), cwd=home, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        checkpoints = store / "work" / step["key"] / "000000" / "checkpoints"
        deadline = time.monotonic() + 300
        while not list(checkpoints.glob("step-*")):
            assert driver.poll() is None and time.monotonic() < deadline, "training never came to a checkpoint"
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert not (store / "objects" / step["key"] / "commits").exists()
    again = ropewalk(home, "run")
    assert digests(again) == digests(first)
    expected = {**dict.fromkeys(DATA_STEPS, "reused"), "extend": "ran", "evaluate": "reused", "report": "reused"}
    assert statuses(again) == expected
    logs = store / "runs" / again["run_id"] / "logs" / "extend"
    assert any("resuming after step" in path.read_text() for path in logs.glob("*.rank0.log"))
    lines = (store / "runs" / again["run_id"] / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    steps = [e["metric_step"] for e in events if e["type"] == "metrics" and "loss" in e["metrics"]]
    assert steps == list(range(1, 9)), "no gap, no doubled step"
