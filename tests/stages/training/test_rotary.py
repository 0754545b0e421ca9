"""Stock models turned by exact angles: the same in float32, better in bfloat16, refused where models turn otherwise."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from ropewalk.kernels.rope import apply_rope
from ropewalk.stages.training.rotary import _hand_on, rotate_exactly

TOKENS = 24
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, yarn": (LlamaConfig, LlamaForCausalLM, {"max_position_embeddings": 256, "rope_parameters": YARN}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gpt-neox, a quarter of the head": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
}


def tiny_model(make_config, make_model, changes):
    torch.manual_seed(0)
    return make_model(make_config(**(SIZES | changes))).eval()


def token_ids():
    return torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def logits_and_grads(model, positions):
    model.zero_grad()
    logits = model(token_ids(), position_ids=positions, attention_mask=torch.ones_like(token_ids())).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_exact_angles_change_nothing_in_float32(name):
    model = tiny_model(*MODELS[name])
    positions = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS) * 3])
    expected = logits_and_grads(model, positions)
    rotate_exactly(model)
    torch.testing.assert_close(logits_and_grads(model, positions), expected, rtol=1e-4, atol=1e-5)


def test_scores_in_bfloat16_err_less_and_no_more_at_a_million_tokens():
    """Root mean square errors of scores against fp64: bfloat16 cos and sin cost 1.6 times, fp32 angles at 1M more."""
    model = tiny_model(LlamaConfig, LlamaForCausalLM, {"hidden_size": 512, "rope_parameters": {"rope_theta": 5e5}})
    embedding = model.model.rotary_emb
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, 128, 128, generator=generator).bfloat16() for _ in range(2))
    error = {}
    for offset in (0, 2**20):
        positions = torch.arange(128)[None] + offset
        right = apply_rope(q.double(), k.double(), positions, embedding.inv_freq, implementation="reference")
        for name in ("stock", "exact"):
            given = type(embedding).forward if name == "stock" else _hand_on
            turned = modeling_llama.apply_rotary_pos_emb(q, k, *given(embedding, q, positions))
            assert turned[0].dtype == torch.bfloat16
            scores = [(a.double() @ b.double().mT) / 128**0.5 for a, b in (turned, right)]
            error[name, offset] = (scores[0] - scores[1]).square().mean().sqrt().item()
        rotate_exactly(model)
    assert error["exact", 0] < error["stock", 0] / 1.4
    assert error["exact", 2**20] < error["stock", 2**20] / 2.5
    assert error["exact", 2**20] < error["exact", 0] * 1.2


def test_gradient_checkpointing_changes_nothing():
    model = tiny_model(*MODELS["llama, yarn"]).train()
    rotate_exactly(model)
    positions = torch.arange(TOKENS).expand(2, -1)
    expected = logits_and_grads(model, positions)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(logits_and_grads(model, positions), expected, rtol=0, atol=0)


def test_another_model_of_the_same_class_is_turned_as_before():
    model = tiny_model(*MODELS["llama"])
    positions = torch.arange(TOKENS).expand(2, -1)
    expected = logits_and_grads(model, positions)
    rotate_exactly(tiny_model(*MODELS["llama"]))
    torch.testing.assert_close(logits_and_grads(model, positions), expected, rtol=0, atol=0)


def test_a_model_without_rotary_embedding_stays_as_it_is():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    rotate_exactly(model)
    assert model(token_ids()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("make_config", "make_model", "changes", "message"),
    [
        (GlmConfig, GlmForCausalLM, {"head_dim": 8}, "GlmForCausalLM does not turn its heads in halves"),
        (CohereConfig, CohereForCausalLM, {}, "CohereForCausalLM does not turn its heads in halves"),
        (
            Gemma3TextConfig,
            Gemma3ForCausalLM,
            {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "Gemma3ForCausalLM has several rotary embeddings",
        ),
        (
            LlamaConfig,
            LlamaForCausalLM,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic', whose frequencies change with the length",
        ),
    ],
)
def test_models_that_turn_otherwise_are_refused_and_left_alone(make_config, make_model, changes, message):
    model = tiny_model(make_config, make_model, changes)
    with pytest.raises(ValueError, match=message + ".*: set enable_exact_rope to false"):
        rotate_exactly(model)
    assert model(token_ids()).logits.isfinite().all()
