"""The stage on one rank, in this process: what it learns, resumes, writes and refuses."""

import json
import shutil

import pytest
from training_examples import (
    TINY_MODEL,
    VOCAB,
    InProcessContext,
    config,
    counting_rows,
    random_rows,
    run,
    train_by_hand,
    write_rows,
    write_tokenizer,
)

from ropewalk.stages.context import free_port
from ropewalk.stages.schema import read_artifact

SHORT, LONG = 32, 64


def alone(**changes):
    return config(**({"world_size": 1} | changes))


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group that outlives the runs, as under Ray Train."""
    import torch
    import torch.distributed as dist

    threads = torch.get_num_threads()
    environment = pytest.MonkeyPatch()
    environment.setenv("LOCAL_RANK", "0")
    environment.setenv("DS_ACCELERATOR", "cpu")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield
    assert dist.is_initialized(), "a run took down a process group that it had found"
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    environment.undo()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Inputs by slot, and a trained `checkpoint`."""
    folder = tmp_path_factory.mktemp("inputs")
    info = write_tokenizer(folder / "tokenizer")
    inputs = {
        "tokenizer": folder / "tokenizer",
        "rows": write_rows(folder / "rows", counting_rows(40, SHORT), info, shard_records=16),
        "long": write_rows(folder / "long", counting_rows(20, LONG), info),
        "documents": write_rows(folder / "documents", random_rows(8, SHORT, attention="document", masked=True), info),
    }
    settings = alone(phases=[{"rows": "rows", "num_steps": 60}], learning_rate=0.03, checkpoint_every_steps=999)
    base = run(folder / "base", settings, inputs, InProcessContext)
    return inputs | {"checkpoint": base.data, "base": base}


def inputs_of(given, *slots):
    return {slot: given[slot] for slot in slots}


def extension(**changes):
    settings = {"model": None, "rope": {"method": "yarn"}, "phases": [{"rows": "long", "num_steps": 4}]}
    return alone(**(settings | changes))


def test_loss_falls_on_a_task_that_can_be_learnt(given):
    losses = [entry["loss"] for entry in given["base"].history]
    assert losses[0] > 3.5
    assert losses[-1] < 0.5
    assert given["base"].logged("loss") == [(step + 1, loss) for step, loss in enumerate(losses)]


def test_losses_gradients_and_weights_are_those_of_plain_torch(given, tmp_path):
    rows = random_rows(8, SHORT, attention="document", masked=True)
    settings = alone(
        model=None,
        phases=[{"rows": "documents", "num_steps": 3}],
        micro_batch_tokens=3 * SHORT,
        inserted_loss_weight=0.5,
        min_learning_rate_fraction=1.0,
        max_grad_norm=0.3,
    )
    found = run(tmp_path, settings, inputs_of(given, "documents", "checkpoint"), InProcessContext)
    expected = train_by_hand(given["checkpoint"], rows, settings)
    assert [entry["loss"] for entry in found.history] == pytest.approx(expected.losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in found.history] == pytest.approx(expected.grad_norms, rel=1e-4)
    assert_weights(found.data, expected.weights)


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_weights(folder, expected):
    import torch

    weights = weights_of(folder)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"method": "none"},
        {"method": "linear"},
        {"method": "theta", "theta": 5e5},
        {"method": "ntk"},
        {"method": "yarn"},
    ],
    ids=lambda rope: rope["method"],
)
def test_stock_transformers_loads_the_export_and_continues_as_trained(given, tmp_path, rope):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = run(tmp_path, extension(rope=rope), inputs_of(given, "long", "checkpoint"), InProcessContext)
    model = AutoModelForCausalLM.from_pretrained(found.data)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.max_position_embeddings == LONG
    tokenizer = AutoTokenizer.from_pretrained(found.data)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(["<bos>", "w10", "w11", "w12"])])
    continued = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=1)
    assert tokenizer.convert_ids_to_tokens(continued[0, 4:]) == ["w13", "w14", "w15"]
    written = json.loads((found.data / "config.json").read_text())
    assert "ropewalk" not in json.dumps(written)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    if rope["method"] in ("linear", "yarn"):
        assert written["rope_scaling"]["rope_type"] == rope["method"]
        assert written["rope_scaling"]["factor"] == 2.0


def test_older_rope_keys_alone_mean_the_same(given, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    found = run(tmp_path, extension(), inputs_of(given, "long", "checkpoint"), InProcessContext)
    older = tmp_path / "older"
    shutil.copytree(found.data, older)
    written = json.loads((older / "config.json").read_text())
    del written["rope_parameters"]
    (older / "config.json").write_text(json.dumps(written))
    ids = torch.arange(3, 43)[None]
    new, old = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (found.data, older))
    torch.testing.assert_close(new, old, rtol=0, atol=0)


def test_the_artifact_says_what_was_trained(given, tmp_path):
    phases = [{"rows": "rows", "num_steps": 2}, {"rows": "long", "num_steps": 3}]
    found = run(tmp_path, extension(phases=phases), inputs_of(given, "rows", "long", "checkpoint"), InProcessContext)
    artifact = read_artifact(found.data, "checkpoint")
    rows = read_artifact(given["rows"], "rows")
    assert (artifact.row_tokens, artifact.tokenizer) == (LONG, rows.tokenizer)
    assert artifact.counts == {"num_parameters": 3120, "num_steps": 5, "num_tokens": 5 * 256, "num_rows": 2 * 8 + 3 * 4}
    assert artifact.details["windows"] == [SHORT, LONG]
    assert [entry["row_tokens"] for entry in found.history] == [SHORT, SHORT, LONG, LONG, LONG]
    assert [entry["tokens"] for entry in found.history] == [256, 512, 768, 1024, 1280]
    assert sorted(path.name for path in found.data.iterdir()) == [
        "artifact.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.jsonl",
    ]
    observed = json.loads((found.observed / "throughput.json").read_text())
    assert len(observed["step_seconds"]) == 5
    assert len(found.logged("tokens_per_second")) == 5


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_cancelled_run_resumes_bit_for_bit(given, tmp_path, zero_stage):
    from ropewalk.stages.training.loop import TrainingCancelledError

    settings = extension(
        zero_stage=zero_stage, phases=[{"rows": "rows", "num_steps": 2}, {"rows": "long", "num_steps": 5}]
    )
    inputs = inputs_of(given, "rows", "long", "checkpoint")
    undisturbed = run(tmp_path / "undisturbed", settings, inputs, InProcessContext)

    with pytest.raises(TrainingCancelledError, match="after step 3"):
        run(tmp_path / "cancelled", settings, inputs, lambda **fields: InProcessContext(at_step=3, **fields))
    resumed = run(tmp_path / "cancelled", settings, inputs, InProcessContext)
    assert resumed.weights_sha256 == undisturbed.weights_sha256
    assert (resumed.data / "training.jsonl").read_bytes() == (undisturbed.data / "training.jsonl").read_bytes()
    assert resumed.logged("loss") == undisturbed.logged("loss")
    assert [step for step, _ in resumed.logged("tokens_per_second")] == [4, 5, 6, 7]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(given, tmp_path, capfd):
    from ropewalk.stages.training.loop import TrainingCancelledError

    settings = extension(phases=[{"rows": "long", "num_steps": 7}])
    inputs = inputs_of(given, "long", "checkpoint")
    undisturbed = run(tmp_path / "undisturbed", settings, inputs, InProcessContext)

    with pytest.raises(TrainingCancelledError):
        run(tmp_path / "run", settings, inputs, lambda **fields: InProcessContext(at_step=6, **fields))
    saved = sorted((tmp_path / "run" / "work" / "checkpoints").glob("step-*"))
    assert [path.name for path in saved] == ["step-000004", "step-000006"]
    victim = next(saved[-1].glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    resumed = run(tmp_path / "run", settings, inputs, InProcessContext)
    assert "step-000006 is damaged" in capfd.readouterr().err
    assert [step for step, _ in resumed.logged("tokens_per_second")] == [5, 6, 7]
    assert resumed.weights_sha256 == undisturbed.weights_sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"loss_chunk_tokens": 40},
        {"micro_batch_tokens": 64},
        {"zero_stage": 3, "gradient_checkpointing": True, "loss_chunk_tokens": 40, "micro_batch_tokens": 128},
    ],
    ids=str,
)
def test_saving_memory_changes_rounding_only(given, tmp_path, changes):
    inputs = inputs_of(given, "documents", "checkpoint")
    plain = {"phases": [{"rows": "documents", "num_steps": 4}], "rope": {"method": "none"}, "inserted_loss_weight": 0.5}
    histories = [
        run(tmp_path / str(index), extension(**settings), inputs, InProcessContext).history
        for index, settings in enumerate([plain, plain | changes])
    ]
    for whole, saved in zip(*histories, strict=True):
        assert saved == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_trains_with_float32_positions(given, tmp_path, zero_stage):
    settings = extension(dtype="bfloat16", zero_stage=zero_stage, micro_batch_tokens=128)
    inputs = inputs_of(given, "long", "checkpoint")
    found = run(tmp_path / "bfloat16", settings, inputs, InProcessContext)
    exact = run(tmp_path / "float32", extension(), inputs, InProcessContext)
    assert json.loads((found.data / "config.json").read_text())["dtype"] == "bfloat16"
    # The export compares the trained module's frequencies with the formula at 1e-5: bfloat16 ones would fail it.
    for low, high in zip(found.history, exact.history, strict=True):
        assert low["loss"] == pytest.approx(high["loss"], abs=0.03)


def learned_positions(given, folder, num_positions):
    """A GPT-2 checkpoint: no rotary embedding, and dropout outside of attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=num_positions, attn_pdrop=0.0, resid_pdrop=0.3
    )
    GPT2LMHeadModel(settings).save_pretrained(folder)
    shutil.copytree(given["tokenizer"] / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def sliding_windows(given, folder):
    """A Mistral checkpoint whose layers see eight tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    settings = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MistralForCausalLM(settings).save_pretrained(folder)
    shutil.copytree(given["tokenizer"] / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def interleaved_rotation(given, folder):
    """A GLM checkpoint, which turns neighbouring dims of a head, not its halves."""
    from transformers import GlmConfig, GlmForCausalLM

    settings = GlmConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=LONG, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GlmForCausalLM(settings).save_pretrained(folder)
    shutil.copytree(given["tokenizer"] / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_dropout_resumes_bit_for_bit(given, tmp_path):
    from ropewalk.stages.training.loop import TrainingCancelledError

    inputs = inputs_of(given, "long") | {"checkpoint": learned_positions(given, tmp_path / "gpt2", LONG)}
    settings = extension(rope={"method": "none"})
    undisturbed = run(tmp_path / "undisturbed", settings, inputs, InProcessContext)
    with pytest.raises(TrainingCancelledError):
        run(tmp_path / "cancelled", settings, inputs, lambda **fields: InProcessContext(at_step=2, **fields))
    resumed = run(tmp_path / "cancelled", settings, inputs, InProcessContext)
    assert resumed.weights_sha256 == undisturbed.weights_sha256


def test_learned_positions_cannot_be_outrun(given, tmp_path):
    inputs = inputs_of(given, "long") | {"checkpoint": learned_positions(given, tmp_path / "gpt2", SHORT)}
    with pytest.raises(ValueError, match="learned positions for 32 tokens; the rows have 64"):
        run(tmp_path / "none", extension(rope={"method": "none"}), inputs, InProcessContext)
    with pytest.raises(ValueError, match=r"rope.method 'yarn' needs one rotary embedding"):
        run(tmp_path / "yarn", extension(), inputs, InProcessContext)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_new_tokens_get_embeddings(given, tmp_path, zero_stage):
    from transformers import AutoModelForCausalLM

    info = write_tokenizer(tmp_path / "tokenizer", VOCAB + 5)
    rows = write_rows(tmp_path / "rows", counting_rows(20, LONG, VOCAB + 5), info)
    inputs = {"long": rows, "checkpoint": given["checkpoint"], "tokenizer": tmp_path / "tokenizer"}
    found = [
        run(tmp_path / str(attempt), extension(zero_stage=zero_stage), inputs, InProcessContext) for attempt in range(2)
    ]
    assert found[0].weights_sha256 == found[1].weights_sha256
    assert AutoModelForCausalLM.from_pretrained(found[0].data).get_input_embeddings().weight.shape[0] == VOCAB + 5
    tokenizers = [folder / "tokenizer.json" for folder in (found[0].data, tmp_path / "tokenizer" / "tokenizer")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(given, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(given["checkpoint"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 1, rows \["):
        run(tmp_path, extension(), inputs_of(given, "long") | {"checkpoint": broken}, InProcessContext)


def test_a_gradient_that_is_not_finite_stops_the_run_unsaved(given, tmp_path):
    # The two means are finite; their weighted sum is not.
    settings = extension(
        phases=[{"rows": "documents", "num_steps": 2}],
        rope={"method": "none"},
        inserted_loss_weight=1e39,
        checkpoint_every_steps=1,
    )
    with pytest.raises(RuntimeError, match=r"the gradient norm is inf at step 1, rows \["):
        run(tmp_path, settings, inputs_of(given, "documents", "checkpoint"), InProcessContext)
    assert not list((tmp_path / "work").glob("checkpoints/step-*"))


def test_attention_that_contradicts_the_rows_needs_a_reason(given, tmp_path):
    inputs = inputs_of(given, "documents", "checkpoint")
    settings = {"phases": [{"rows": "documents", "num_steps": 1}], "rope": {"method": "none"}}
    with pytest.raises(ValueError, match="'causal' contradicts the rows of input 'documents', which need document"):
        run(tmp_path / "refused", extension(attention="causal", **settings), inputs, InProcessContext)
    losses = {
        attention: run(
            tmp_path / attention, extension(attention=attention, **changes, **settings), inputs, InProcessContext
        )
        for attention, changes in {
            "rows": {},
            "document": {},
            "causal": {"override_attention_reason": "to measure what masking brings"},
        }.items()
    }
    first = {name: finished.history[0]["loss"] for name, finished in losses.items()}
    assert first["rows"] == first["document"]
    assert abs(first["causal"] - first["rows"]) > 1e-4
    details = read_artifact(losses["causal"].data).details
    assert details["override_attention_reason"] == "to measure what masking brings"


def losses_of(finished):
    return [entry["loss"] for entry in finished.history]


@pytest.mark.parametrize(("slot", "rope"), [("long", "yarn"), ("documents", "none")])
def test_losses_and_weights_are_those_of_torchs_own_attention(given, tmp_path, slot, rope):
    inputs = inputs_of(given, slot, "checkpoint")
    settings = {"phases": [{"rows": slot, "num_steps": 3}], "rope": {"method": rope}}
    found = {
        name: run(tmp_path / name, extension(attention_implementation=name, **settings), inputs, InProcessContext)
        for name in ("ropewalk", "sdpa", "eager")
    }
    for name in ("sdpa", "eager"):
        assert losses_of(found["ropewalk"]) == pytest.approx(losses_of(found[name]), rel=1e-5)
        assert_weights(found["ropewalk"].data, weights_of(found[name].data))
        assert read_artifact(found[name].data).details["attention_implementation"] == name


def test_torchs_own_attention_does_not_forget_sliding_windows(given, tmp_path):
    inputs = inputs_of(given, "documents") | {"checkpoint": sliding_windows(given, tmp_path / "mistral")}
    settings = {"phases": [{"rows": "documents", "num_steps": 2}], "rope": {"method": "none"}}
    with pytest.raises(ValueError, match="'sdpa' would forget the model's sliding window in rows of policy document"):
        run(tmp_path / "sdpa", extension(attention_implementation="sdpa", **settings), inputs, InProcessContext)
    run(tmp_path / "ropewalk", extension(**settings), inputs, InProcessContext)


def test_exact_angles_can_be_left_out_and_cannot_where_the_model_turns_otherwise(given, tmp_path):
    inputs = inputs_of(given, "long", "checkpoint")
    losses = {
        enabled: run(tmp_path / str(enabled), extension(enable_exact_rope=enabled), inputs, InProcessContext).history[
            -1
        ]["loss"]
        for enabled in (True, False)
    }
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    inputs["checkpoint"] = interleaved_rotation(given, tmp_path / "glm")
    with pytest.raises(ValueError, match=r"in halves.* set enable_exact_rope to false"):
        run(tmp_path / "refused", extension(rope={"method": "none"}), inputs, InProcessContext)
    run(tmp_path / "left", extension(rope={"method": "none"}, enable_exact_rope=False), inputs, InProcessContext)


@pytest.mark.parametrize(
    ("changes", "slots", "message"),
    [
        ({"batch_tokens": 250}, ["long", "checkpoint"], "batch_tokens 250 .* input 'long' has row_tokens 64"),
        ({"world_size": 3}, ["long", "checkpoint"], "batch_tokens 256 .* world_size is 3"),
        ({}, ["long"], "input 'checkpoint' because model is not set"),
        ({"model": TINY_MODEL, "rope": {}}, ["long"], "input 'tokenizer' because model is set"),
        ({}, ["checkpoint"], "input 'long' because phases name it"),
        ({"rope": {"method": "yarn", "factor": 1.5}}, ["long", "checkpoint"], "rope.factor 1.5 stretches 32 tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(given, tmp_path, changes, slots, message):
    settings = extension(**changes)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, settings, inputs_of(given, *slots), InProcessContext)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": {"method": "yarn"}}, "model.rope_theta"),
        ({"warmup_steps": 5}, "warmup_steps is 5, but the phases have 4 steps"),
        ({"model": TINY_MODEL | {"num_kv_heads": 3}}, "model.num_kv_heads"),
        ({"model": TINY_MODEL | {"hidden_size": 18}}, "model.hidden_size"),
        ({"override_attention_reason": "none"}, "override_attention_reason"),
        ({"zero_stage": 0, "dtype": "bfloat16"}, "zero_stage 0"),
        ({"phases": []}, "phases"),
        ({"learning_rte": 1}, "learning_rte"),
    ],
)
def test_contradicting_configs_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_rows_of_another_tokenizer_are_refused(given, tmp_path):
    other = write_tokenizer(tmp_path / "tokenizer", VOCAB - 4)
    rows = write_rows(tmp_path / "rows", counting_rows(8, LONG, VOCAB - 4), other)
    with pytest.raises(ValueError, match="'rows' and 'long' were made with different tokenizers"):
        phases = [{"rows": "rows", "num_steps": 1}, {"rows": "long", "num_steps": 1}]
        run(
            tmp_path,
            extension(phases=phases),
            inputs_of(given, "rows", "checkpoint") | {"long": rows},
            InProcessContext,
        )
    with pytest.raises(ValueError, match="made with another tokenizer than that of the checkpoint"):
        run(tmp_path, extension(), {"long": rows, "checkpoint": given["checkpoint"]}, InProcessContext)
    with pytest.raises(ValueError, match="another meaning"):
        inputs = {"long": rows, "checkpoint": given["checkpoint"], "tokenizer": tmp_path / "tokenizer"}
        run(tmp_path, extension(), inputs, InProcessContext)


def test_importing_the_stage_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, ropewalk.stages.training.train as t; "
        "heavy = {'torch', 'transformers', 'deepspeed', 'numpy', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy; assert (t.NAME, t.VERSION) == ('train', 2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
