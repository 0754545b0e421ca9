"""Artifacts that stages write pass their checks; every kind of damage is refused by file and field."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from row_invariants import VOCABULARY, numbered_documents, run_stage, tokenizer_info, write_documents, write_tokens
from safetensors.torch import save_file

from ropewalk.stages import checks
from ropewalk.stages.data import ingest, mix, pack, plant, split
from ropewalk.stages.data.reading.readers import SourceConfig
from ropewalk.stages.schema import Artifact, predictions_schema, read_artifact, write_artifact, write_table

ROW_TOKENS = 32
EXTENDED = SimpleNamespace(rope=SimpleNamespace(method="yarn"))
TWO_MODELS = SimpleNamespace(models=("base", "extended"))


@pytest.fixture
def rows(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", numbered_documents([40, 13, 30, 25, 64]))
    config = pack.PackConfig(row_tokens=ROW_TOKENS)
    return run_stage(pack, config, {"tokens": tokens}, tmp_path / "pack")


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"embed": torch.ones(4, 3), "head": torch.zeros(2, dtype=torch.bfloat16)}, folder / "model.safetensors")
    model = {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn"}, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "tokenizer.json").write_text("{}")
    history = [{"step": step, "loss": 2.0 / step, "grad_norm": 1.0} for step in (1, 2, 3)]
    (folder / "training.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    info = tokenizer_info(digest=checks.tokenizer_digest(folder))
    counts = {"num_parameters": 14, "num_steps": 3}
    write_artifact(folder, Artifact(kind="checkpoint", tokenizer=info, row_tokens=64, counts=counts))
    return folder


def prediction(number, score):
    strings = {"task": "passkey", "prompt_sha256": "0", "prediction": "a", "finish_reason": "length"}
    numbers = {"length_tokens": 8, "depth_fraction": 0.5, "seed": 0, "num_prompt_tokens": 7}
    return {"sample_id": f"s{number}", "references": ["a"], "score": score, **strings, **numbers}


def write_predictions(folder, scores, samples=3):
    for model in TWO_MODELS.models:
        records = [prediction(number, score) for number, score in enumerate(scores)]
        write_table(folder / model, "predictions", predictions_schema(), records)
        losses = pa.schema([("doc_id", pa.string()), ("sum_nll", pa.float64())])
        write_table(folder / model, "losses", losses, [{"doc_id": "d", "sum_nll": 3.5}])
    names = pa.schema([("sample_id", pa.string())])
    write_table(folder, "samples", names, [{"sample_id": f"s{number}"} for number in range(samples)])
    (folder / "summary.json").write_text("{}")
    counts = {"samples": samples, "predictions": 2 * samples}
    write_artifact(folder, Artifact(kind="predictions", tokenizer=tokenizer_info(), counts=counts))
    return folder


def change_rows(folder, change):
    """Rewrite the first shard with `change(record)` applied to its first record."""
    path = folder / "rows-00000.parquet"
    table = pq.read_table(path)
    records = table.to_pylist()
    change(records[0])
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), path)


def change_artifact(folder, **changes):
    artifact = read_artifact(folder)
    write_artifact(folder, artifact.model_copy(update=changes))


def all_stages():
    """Every module of the package that is a stage, by its name."""
    folder = Path(checks.__file__).parent
    names = [".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")]
    modules = [importlib.import_module(f"ropewalk.stages.{name}") for name in sorted(names)]
    return {module.NAME: module for module in modules if hasattr(module, "NAME") and hasattr(module, "run")}


def test_every_stage_names_the_check_of_its_kind():
    checked = {name: stage.check.__name__ for name, stage in all_stages().items()}
    kinds = {
        "check_documents": ["ingest", "deduplicate", "filter_documents", "chunk", "chat_texts"],
        "check_tokens": ["encode", "split", "upsample"],
        "check_vectors": ["embed"],
        "check_neighbours": ["neighbours"],
        "check_rows": ["pack", "mix", "plant", "splice", "utk", "document_walk", "nextlong", "quest"],
        "check_scores": ["deita", "gateau", "ifd", "ladm", "long_attn", "perplexity_gap"],
        "check_samples": ["diversify", "mark_context", "represent", "smart"],
        "check_chats": ["agent_write", "chats", "long_questions", "mosaic", "p_mix", "retrieval_augmented"],
        "check_preferences": ["short_to_long"],
        "check_checkpoint": ["train"],
        "check_predictions": ["evaluate"],
        "check_report": ["report"],
        # Of their own: several kinds, or a kind that only they write.
        "check": [
            "chat_tokens",
            "compare_rows",
            "context_dependency",
            "decontaminate",
            "describe",
            "export",
            "information_gain",
            "select",
        ],
    }
    assert checked == {stage: check for check, stages in kinds.items() for stage in stages}


def test_outputs_of_the_data_stages_pass(tmp_path, rows):
    pack.check(None, rows)
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text")
    source = SourceConfig(name="texts", format="text", include=("*.txt",))
    documents = run_stage(ingest, ingest.IngestConfig(sources=(source,)), {"texts": texts}, tmp_path / "ingest")
    ingest.check(None, documents)
    config = split.SplitConfig(subset="train", heldout_fraction=0.01)
    split.check(None, run_stage(split, config, {"tokens": tmp_path / "tokens"}, tmp_path / "split"))
    config = plant.PlantConfig(row_tokens=ROW_TOKENS, num_rows=6, episode_fraction=0.0, repeat_fraction=0.5)
    planted = run_stage(plant, config, {"tokens": tmp_path / "tokens"}, tmp_path / "plant")
    plant.check(None, planted)
    config = mix.MixConfig(fractions={"a": 0.5, "b": 0.5}, num_rows=4)
    mix.check(None, run_stage(mix, config, {"a": rows, "b": planted}, tmp_path / "mix"))


def shorten(record):
    record["input_ids"] = record["input_ids"][:-1]


def shorten_mask(record):
    record["loss_mask"] = record["loss_mask"][:-1]


def unknown_token(record):
    record["input_ids"][3] = VOCABULARY


def negative_token(record):
    record["input_ids"][3] = -1


def unknown_policy(record):
    record["attention"] = "windowed"


def beyond_the_row(record):
    record["segments"][-1]["num_tokens"] = ROW_TOKENS


def overlapping(record):
    record["segments"] = [record["segments"][0], dict(record["segments"][0])]


def empty_segment(record):
    record["segments"][0]["num_tokens"] = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, r"rows-00000\.parquet: input_ids has 31 entries in a row, row_tokens is 32"),
        (shorten_mask, r"rows-00000\.parquet: loss_mask has 31 entries"),
        (unknown_token, r"rows-00000\.parquet: input_ids holds 1000, outside the tokenizer's vocab_size 1000"),
        (negative_token, r"rows-00000\.parquet: input_ids holds -1"),
        (unknown_policy, r"rows-00000\.parquet: attention 'windowed' is none of causal, document, anchor"),
        (beyond_the_row, r"rows-00000\.parquet: a segment leaves its row of 32 tokens"),
        (overlapping, r"rows-00000\.parquet: segments of a row overlap or are out of order"),
        (empty_segment, r"rows-00000\.parquet: .*num_tokens is not positive"),
    ],
)
def test_a_broken_row_is_refused(rows, change, message):
    change_rows(rows, change)
    with pytest.raises(ValueError, match=message):
        checks.check_rows(None, rows)


@pytest.mark.parametrize("count", ["num_rows", "num_tokens_kept"])
def test_counts_that_the_shards_do_not_hold_are_refused(rows, count):
    counts = read_artifact(rows).counts
    change_artifact(rows, counts={**counts, count: counts[count] + 1})
    with pytest.raises(ValueError, match=rf"artifact\.json: counts\.{count} is {counts[count] + 1}, but there are"):
        checks.check_rows(None, rows)


def test_a_missing_or_foreign_column_is_refused(rows):
    path = rows / "rows-00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("attention"), path)
    with pytest.raises(ValueError, match=r"rows-00000\.parquet: column attention is missing"):
        checks.check_rows(None, rows)
    pq.write_table(table.append_column("notes", pa.array([""] * len(table))), path)
    with pytest.raises(ValueError, match=r"rows-00000\.parquet: column notes is not part of the schema"):
        checks.check_rows(None, rows)
    wide = table.set_column(1, "input_ids", table.column("input_ids").cast(pa.list_(pa.int64())))
    pq.write_table(wide, path)
    with pytest.raises(ValueError, match=r"column input_ids is list<.*int64>, the schema says list<.*int32>"):
        checks.check_rows(None, rows)


def test_a_cut_off_shard_is_refused(rows):
    path = rows / "rows-00000.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"rows-00000\.parquet is no Parquet file"):
        checks.check_rows(None, rows)


def test_an_artifact_of_another_kind_or_without_its_facts_is_refused(rows):
    with pytest.raises(ValueError, match="holds rows, not tokens"):
        checks.check_tokens(None, rows)
    change_artifact(rows, tokenizer=None)
    with pytest.raises(ValueError, match=r"artifact\.json: tokenizer is missing"):
        checks.check_rows(None, rows)
    change_artifact(rows, row_tokens=None)
    with pytest.raises(ValueError, match=r"artifact\.json: Rows need row_tokens"):
        checks.check_rows(None, rows)


def test_empty_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match="documents is empty: num_kept is 0"):
        checks.check_documents(None, write_documents(tmp_path / "documents", {}))
    with pytest.raises(ValueError, match="tokens is empty: num_kept is 0"):
        checks.check_tokens(None, write_tokens(tmp_path / "tokens", {}))


def test_lost_bytes_of_documents_are_refused(tmp_path):
    folder = write_documents(tmp_path / "documents", {"a": "text"})
    change_artifact(folder, counts={"num_kept": 1, "num_kept_bytes": 5})
    with pytest.raises(ValueError, match=r"counts\.num_kept_bytes is 5, but there are 4"):
        checks.check_documents(None, folder)


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path / "tokens", numbered_documents([5, 7]))


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_a_token_outside_the_vocabulary_is_refused(tokens, wrong):
    (path,) = tokens.glob("tokens-*.parquet")
    table = pq.read_table(path)
    records = table.to_pylist()
    records[1]["input_ids"][2] = wrong
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), path)
    with pytest.raises(ValueError, match=rf"tokens-00000\.parquet: input_ids holds {wrong}, outside the tokenizer's"):
        checks.check_tokens(None, tokens)


@pytest.mark.parametrize("count", ["num_kept", "num_tokens"])
def test_counts_of_tokens_that_the_shards_do_not_hold_are_refused(tokens, count):
    counts = {"num_kept": 2, "num_tokens": 12}
    change_artifact(tokens, counts=counts)
    checks.check_tokens(None, tokens)
    change_artifact(tokens, counts={**counts, count: counts[count] - 1})
    with pytest.raises(ValueError, match=rf"artifact\.json: counts\.{count} is {counts[count] - 1}, but there are"):
        checks.check_tokens(None, tokens)


def test_a_shard_that_is_gone_is_noticed_by_its_counts(tmp_path):
    folder = write_documents(tmp_path / "documents", {"a": "text", "b": "more"})
    artifact = read_artifact(folder)
    change_artifact(folder, counts={**artifact.counts, "num_kept": 3})
    with pytest.raises(ValueError, match=r"artifact\.json: counts\.num_kept is 3, but there are 2"):
        checks.check_documents(None, folder)


def test_a_null_is_refused_with_its_column(tokens):
    (path,) = tokens.glob("tokens-*.parquet")
    table = pq.read_table(path)
    records = table.to_pylist()
    records[0]["input_ids"][1] = None
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), path)
    with pytest.raises(ValueError, match=r"tokens-00000\.parquet: column input_ids holds a null"):
        checks.check_tokens(None, tokens)


def test_a_sound_checkpoint_passes(checkpoint):
    checks.check_checkpoint(EXTENDED, checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(checkpoint, value):
    weights = {"embed": torch.ones(4, 3), "head": torch.tensor([0.0, value], dtype=torch.bfloat16)}
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: head holds NaN or infinity"):
        checks.check_checkpoint(EXTENDED, checkpoint)


def test_missing_or_cut_off_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    save_file({"embed": torch.ones(4, 3)}, path)
    with pytest.raises(ValueError, match="the safetensors hold 12 weights, the model has 14"):
        checks.check_checkpoint(EXTENDED, checkpoint)
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        checks.check_checkpoint(EXTENDED, checkpoint)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors"):
        checks.check_checkpoint(EXTENDED, checkpoint)


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("config.json", '{"rope_type": "yarn"}', "null", r"config\.json: rope_parameters are missing"),
        ("config.json", "64", "32", r"config\.json: max_position_embeddings is 32, trained were 64"),
        ("config.json", str(VOCABULARY), "999", r"config\.json: vocab_size 999 is below the tokenizer's"),
        ("config.json", "{", "", r"config\.json cannot be read"),
        ("tokenizer.json", "{}", "[]", r"tokenizer\.json: its digest is not tokenizer\.digest"),
        ("training.jsonl", '"loss": 1.0', '"loss": NaN', r"training\.jsonl: loss of step 2 is nan"),
        ("training.jsonl", '"step": 2', '"step": 3', r"training\.jsonl: line 2 is step 3"),
        ("training.jsonl", '{"step": 1, "loss": 2.0, "grad_norm": 1.0}\n', "", r"has 2 steps, num_steps is 3"),
    ],
)
def test_a_broken_file_of_a_checkpoint_is_refused(checkpoint, name, before, after, message):
    text = (checkpoint / name).read_text()
    assert before in text
    (checkpoint / name).write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        checks.check_checkpoint(EXTENDED, checkpoint)


def test_complete_predictions_pass(tmp_path):
    checks.check_predictions(TWO_MODELS, write_predictions(tmp_path, [0.0, 1.0, 0.5]))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, 1.0], r"base: predictions and samples differ in sample_id 's2'"),
        ([0.0, 1.0, 1.5], r"predictions-00000\.parquet: score is 1\.5, not a number in 0 to 1"),
        ([0.0, 1.0, float("nan")], r"score is nan"),
        ([0.0, 1.0, None], r"predictions-00000\.parquet: column score holds a null"),
    ],
)
def test_incomplete_or_impossible_predictions_are_refused(tmp_path, scores, message):
    with pytest.raises(ValueError, match=message):
        checks.check_predictions(TWO_MODELS, write_predictions(tmp_path, scores))


def test_a_sample_asked_twice_is_refused(tmp_path):
    folder = write_predictions(tmp_path, [0.0, 1.0, 0.5])
    records = [prediction(0, 1.0), prediction(1, 1.0), prediction(1, 0.0), prediction(2, 0.0)]
    write_table(folder / "extended", "predictions", predictions_schema(), records)
    with pytest.raises(ValueError, match="extended: sample_id 's1' occurs twice in predictions"):
        checks.check_predictions(TWO_MODELS, folder)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(tmp_path, loss):
    folder = write_predictions(tmp_path, [0.0, 1.0, 0.5])
    losses = pa.schema([("doc_id", pa.string()), ("sum_nll", pa.float64())])
    write_table(folder / "base", "losses", losses, [{"doc_id": "d", "sum_nll": loss}])
    with pytest.raises(ValueError, match=rf"losses-00000\.parquet: sum_nll is {loss}, not a number"):
        checks.check_predictions(TWO_MODELS, folder)


def test_predictions_without_their_summary_are_refused(tmp_path):
    folder = write_predictions(tmp_path, [0.0, 1.0, 0.5])
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json cannot be read"):
        checks.check_predictions(TWO_MODELS, folder)


def test_a_report_without_its_page_is_refused(tmp_path):
    write_artifact(tmp_path, Artifact(kind="report", counts={"pictures": 1}))
    for name in ("summary.json", "report.html", "a.png", "a-dark.png"):
        (tmp_path / name).write_text("{}")
    checks.check_report(None, tmp_path)
    (tmp_path / "report.html").write_text("")
    with pytest.raises(ValueError, match=r"report\.html is missing or empty"):
        checks.check_report(None, tmp_path)
