"""The stage on two ranks in two processes: gradients at every ZeRO stage, and a rank that dies."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_examples import (
    TINY_MODEL,
    VOCAB,
    InterruptingContext,
    config,
    counting_rows,
    random_rows,
    run,
    train_all,
    train_by_hand,
    write_rows,
    write_tokenizer,
)

from ropewalk.stages.context import LocalContext, Output
from ropewalk.stages.training import train
from ropewalk.stages.training.checkpoints import read_history

pytestmark = pytest.mark.slow
TOKENS = 32
KILLED = config(zero_stage=3, phases=[{"rows": "rows", "num_steps": 6}])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Inputs by slot."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    info = write_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {key: TINY_MODEL[key] for key in ("hidden_size", "intermediate_size")}
    llama = LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(llama).save_pretrained(folder / "checkpoint")
    shutil.copytree(folder / "tokenizer" / "tokenizer", folder / "checkpoint", dirs_exist_ok=True)
    return {
        "tokenizer": folder / "tokenizer",
        "checkpoint": folder / "checkpoint",
        "documents": write_rows(folder / "documents", random_rows(8, TOKENS, attention="document", masked=True), info),
        "rows": write_rows(folder / "rows", counting_rows(40, TOKENS), info),
    }


@pytest.fixture(scope="module")
def trained(given, tmp_path_factory):
    """Jobs by name, done: one for each ZeRO stage, and `KILLED` undisturbed. One gang trains them all."""
    folder = tmp_path_factory.mktemp("trained")

    def prepare(name, settings):
        output, work = Output(folder / name / "data", folder / name / "observed"), folder / name / "work"
        for path in (output.data, output.observed, work):
            path.mkdir(parents=True)
        return train.prepare(settings, given, output, LocalContext(work))

    # Uneven targets on the two ranks, two micro-batches of unequal size, a second loss: the mean is still global.
    jobs = {
        f"zero{stage}": prepare(
            f"zero{stage}",
            config(
                model=None,
                zero_stage=stage,
                phases=[{"rows": "documents", "num_steps": 3}],
                micro_batch_tokens=3 * TOKENS,
                inserted_loss_weight=0.5,
                min_learning_rate_fraction=1.0,
                max_grad_norm=0.3,
            ),
        )
        for stage in range(4)
    }
    jobs["undisturbed"] = prepare("undisturbed", KILLED)
    LocalContext(folder).gang(train_all, list(jobs.values()), num_workers=2)
    return jobs


def test_every_zero_stage_has_the_gradients_of_one_process(given, trained):
    rows = random_rows(8, TOKENS, attention="document", masked=True)
    expected = train_by_hand(given["checkpoint"], rows, trained["zero0"].config)
    for stage in range(4):
        folder = trained[f"zero{stage}"].output
        history = read_history(folder / "training.jsonl")
        assert [entry["loss"] for entry in history] == pytest.approx(expected.losses, rel=1e-5)
        assert [entry["grad_norm"] for entry in history] == pytest.approx(expected.grad_norms, rel=1e-4)
        weights = load_file(folder / "model.safetensors")
        assert weights.keys() == expected.weights.keys()
        for name, value in expected.weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_a_run_whose_rank_dies_resumes_bit_for_bit(given, trained, tmp_path):
    inputs = {slot: given[slot] for slot in ("rows", "tokenizer")}

    def dying(**fields):
        return InterruptingContext(at_step=3, **fields)

    with pytest.raises(RuntimeError, match=r"rank 1 died with exit code 9|rank 0 failed"):
        run(tmp_path, KILLED, inputs, dying)
    saved = sorted(path.name for path in (tmp_path / "work" / "checkpoints").glob("step-*"))
    assert saved == ["step-000002"]
    resumed = run(tmp_path, KILLED, inputs)
    undisturbed = trained["undisturbed"].output
    assert resumed.weights_sha256 == hashlib.sha256((undisturbed / "model.safetensors").read_bytes()).hexdigest()
    assert (resumed.data / "training.jsonl").read_bytes() == (undisturbed / "training.jsonl").read_bytes()
    assert [step for step, _ in resumed.logged("loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in resumed.logged("tokens_per_second")] == [3, 4, 5, 6]
