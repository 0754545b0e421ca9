"""The evaluate stage, end to end on tiny random models."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.episodes import EpisodeFormat
from ropewalk.stages.evaluation import evaluate
from ropewalk.stages.evaluation.evaluate import EvaluateConfig
from ropewalk.stages.evaluation.tasks import Task
from ropewalk.stages.schema import Artifact, read_artifact, read_table, write_artifact

CONFIG = EvaluateConfig(
    tasks=(Task(name="passkey"), Task(name="multikey", num_facts=4)),
    lengths_tokens=(48, 160),
    depths=(0.1, 0.9),
    samples_per_cell=2,
    loss_documents=2,
    loss_tokens=160,
    loss_bucket_edges=(0, 64, 128, 160),
    batch_rows=3,
    bootstrap_samples=100,
)


def copied(folder, target):
    return Path(shutil.copytree(folder, target))


def evaluate_into(folder, config, inputs, context_class=LocalContext, report=lambda event: None):
    for name in ("data", "observed", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    context = context_class(folder / "work", report)
    evaluate.run(config, inputs, Output(folder / "data", folder / "observed"), context)
    return {str(p.relative_to(folder / "data")): p.read_bytes() for p in (folder / "data").rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def inputs(heldout_folder, checkpoints):
    return {"heldout": heldout_folder, **checkpoints}


@pytest.fixture(scope="module")
def first(tmp_path_factory, inputs):
    folder, events = tmp_path_factory.mktemp("first"), []
    files = evaluate_into(folder, CONFIG, inputs, report=events.append)
    return folder, files, events


class Workers(LocalContext):
    """Two workers that each have their own copy of the function and finish out of order."""

    def map(self, function, items, *, resources=None):
        import pickle

        items = list(items)
        copies = [pickle.loads(pickle.dumps(function))() for _ in range(2)]
        order = list(enumerate(items))
        random.Random(1).shuffle(order)
        done = {index: copies[number % 2](item) for number, (index, item) in enumerate(order)}
        return iter([done[index] for index in range(len(items))])


def test_every_model_answers_every_sample_and_counts_add_up(first):
    folder, _, _ = first
    counts = read_artifact(folder / "data", "predictions").counts
    assert counts["samples"] == 2 * 2 * 2 * 2
    assert counts["predictions"] == 2 * counts["samples"]
    documents = ("loss_documents_used", "loss_documents_not_needed", "loss_documents_too_short")
    assert sum(counts[name] for name in documents) == counts["heldout_documents"] == 4
    tables = [read_table(folder / "data" / model, "predictions") for model in ("base", "extended")]
    assert tables[0]["prompt_sha256"] == tables[1]["prompt_sha256"]
    assert [n + 1 for n in tables[0]["num_prompt_tokens"].to_pylist()] == tables[0]["length_tokens"].to_pylist()


def test_output_does_not_depend_on_workers_or_on_their_order(first, tmp_path, inputs):
    assert evaluate_into(tmp_path, CONFIG, inputs, Workers) == first[1]


def test_a_new_attempt_keeps_finished_units_and_gives_the_same_bytes(first, tmp_path, inputs):
    class Dying(LocalContext):
        def map(self, function, items, *, resources=None):
            call = function()
            for number, item in enumerate(items):
                if number == 4:
                    raise RuntimeError("node lost")
                yield call(item)

    with pytest.raises(RuntimeError, match="node lost"):
        evaluate_into(tmp_path, CONFIG, inputs, Dying)
    progress = []
    assert evaluate_into(tmp_path, CONFIG, inputs, report=progress.append) == first[1]
    assert [e["done"] for e in progress if e["type"] == "progress"] == [5, 6, 7, 8, 9, 10]


def test_metrics_are_about_a_model_and_have_the_context_length_as_step(first):
    folder, _, events = first
    summary = json.loads((folder / "data" / "summary.json").read_text())
    logged = {
        (e["about"], e["step"], name): value
        for e in events
        if e["type"] == "metrics"
        for name, value in e["metrics"].items()
    }
    for row in summary["scores"]:
        assert logged[row["model"], row["length_tokens"], f"{row['task']}/score"] == row["mean"]
    for row in summary["losses"]:
        assert logged[row["model"], row["position_end"], "loss_by_position"] == row["mean"]


def test_a_model_is_asked_beyond_its_window_and_the_summary_says_so(first):
    models = json.loads(first[1]["summary.json"])["models"]
    assert models["base"]["trained_tokens"] == 64
    assert models["base"]["beyond_trained_window"] == [160]
    assert models["extended"]["beyond_trained_window"] == []


def test_losses_by_position_sum_to_the_loss_of_the_whole_document(first, inputs, haystack):
    import torch
    from transformers import AutoModelForCausalLM

    folder = first[0]
    rows = read_table(folder / "data" / "extended", "losses").to_pylist()
    model = AutoModelForCausalLM.from_pretrained(inputs["extended"])
    for doc_id in {row["doc_id"] for row in rows}:
        ids = torch.tensor([[0, *haystack.documents[int(doc_id[3:])][:159].tolist()]])
        mine = [row for row in rows if row["doc_id"] == doc_id]
        assert sum(row["num_tokens"] for row in mine) == 159
        with torch.no_grad():
            mean = model(ids, labels=ids).loss.item()
        assert sum(row["sum_nll"] for row in mine) / 159 == pytest.approx(mean, rel=1e-4)


def test_models_with_different_tokenizers_are_refused(tmp_path, inputs, checkpoints):
    other = copied(checkpoints["extended"], tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("w007", "TEMP").replace("w008", "w007").replace("TEMP", "w008"))
    with pytest.raises(ValueError, match="extended and heldout have different tokenizers"):
        evaluate_into(tmp_path, CONFIG, {**inputs, "extended": other})
    with pytest.raises(ValueError, match="none of the models has the tokenizer of heldout"):
        evaluate_into(tmp_path, CONFIG, {**inputs, "base": other, "extended": other})


def test_a_users_checkpoint_without_our_markers_is_asked_in_words(tmp_path, inputs, checkpoint_maker, info):
    """No artifact.json, and a tokenizer and embeddings that end before the markers that synthesis added."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(inputs["extended"] / "tokenizer.json"))
    added = {"<|new|>": info.vocab_size}
    plain.add_special_tokens(list(added))
    plain.save(str(tmp_path / "tokenizer.json"))
    digest = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    grown = info.model_copy(
        update={"digest": digest, "vocab_size": info.vocab_size + 1, "added_tokens": {**info.added_tokens, **added}}
    )
    checkpoint_maker(tmp_path / "grown", grown, seed=3, row_tokens=512)
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "grown" / "tokenizer.json")
    heldout = copied(inputs["heldout"], tmp_path / "heldout")
    write_artifact(heldout, Artifact(kind="tokens", tokenizer=grown))
    users = copied(inputs["base"], tmp_path / "users")
    (users / "artifact.json").unlink()
    slots = {"heldout": heldout, "base": users, "extended": tmp_path / "grown"}
    in_words = CONFIG.model_copy(update={"episode": EpisodeFormat(fact="w001 {key} {value}", question="w002 {key}")})
    output = evaluate_into(tmp_path, in_words, slots)
    assert json.loads(output["summary.json"])["models"]["base"]["trained_tokens"] == 64
    with_marker = CONFIG.model_copy(update={"episode": EpisodeFormat(fact="<|new|> {key} {value}", question="{key}")})
    with pytest.raises(ValueError, match=f"base has {info.vocab_size} embeddings, but episodes need token id"):
        evaluate_into(tmp_path / "again", with_marker, slots)


def test_a_checkpoint_whose_config_is_behind_its_training_is_refused(tmp_path, inputs, checkpoints, info):
    other = copied(checkpoints["extended"], tmp_path / "other")
    write_artifact(other, Artifact(kind="checkpoint", tokenizer=info, row_tokens=1024))
    with pytest.raises(ValueError, match="max_position_embeddings 512"):
        evaluate_into(tmp_path, CONFIG, {**inputs, "extended": other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths_tokens": (6,)}, "lengths_tokens holds 6"),
        ({"lengths_tokens": (48, 4000)}, "lengths_tokens asks for texts of 39"),
        ({"loss_tokens": 800, "loss_bucket_edges": (0, 800)}, "loss_tokens is 800 and 1 of heldout's 4"),
        ({"tasks": (Task(name="many", num_facts=60),)}, "lower num_facts"),
        ({"models": ("base", "other")}, "no input 'other'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_into(tmp_path, CONFIG.model_copy(update=change), inputs)


@pytest.mark.parametrize(
    "change",
    [{"depths": (1.5,)}, {"depths": (0.5, 0.5)}, {"loss_bucket_edges": (0, 9999)}, {"models": ("samples",)}],
)
def test_the_config_refuses_what_makes_no_sense(change):
    with pytest.raises(ValueError):
        EvaluateConfig.model_validate({**CONFIG.model_dump(), **change})
