"""Stock models on our attention against the same models on eager attention with an explicit mask."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ropewalk.kernels.attention import AttentionPlan, block_lists, causal, document
from ropewalk.kernels.attention.estimators import moba
from ropewalk.stages.training.attention import ATTENTION_NAME, plan_for_rows, register

ROW_TOKENS = 23
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral, windows": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
    "qwen3, windows in one layer": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}


def tiny_model(family="llama", attention=ATTENTION_NAME, **changes):
    register()
    make_config, make_model, sizes = FAMILIES[family]
    config = make_config(**(SIZES | sizes | changes), attn_implementation=attention)
    torch.manual_seed(0)
    return make_model(config).eval()


def token_ids(batch=3, num_tokens=ROW_TOKENS):
    return torch.randint(3, 64, (batch, num_tokens), generator=torch.Generator().manual_seed(1))


def segment(doc_id, row_start, num_tokens):
    return {"doc_id": doc_id, "start": 0, "num_tokens": num_tokens, "row_start": row_start}


def batch_plan():
    """One row of each policy."""
    packed = [segment("a", 1, 6), segment("b", 8, 1), segment("c", 9, 14)]
    return plan_for_rows(["causal", "document", "anchor"], [packed] * 3, ROW_TOKENS)


def additive_mask(plan, window_tokens=ROW_TOKENS):
    query, key = torch.arange(plan.q_tokens)[:, None], torch.arange(plan.k_tokens)
    visible = plan.visible() & (query - key < window_tokens)
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def eager_mask(model, plan):
    """What the model's layers take for a mask on eager attention."""
    window = getattr(model.config, "sliding_window", None) or ROW_TOKENS
    if len(set(getattr(model.config, "layer_types", None) or [])) > 1:
        return {"full_attention": additive_mask(plan), "sliding_attention": additive_mask(plan, window)}
    return additive_mask(plan, window)


def logits_and_grads(model, ids, **options):
    logits = model(ids, use_cache=False, **options).logits
    (logits.log_softmax(-1)[..., 3].sum() / 10).backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_and_gradients_of_an_explicit_mask(family):
    plan, ids = batch_plan(), token_ids()
    model = tiny_model(family)
    logits, grads = logits_and_grads(model, ids, attention_plan=plan)
    model.set_attn_implementation("eager")
    expected_logits, expected_grads = logits_and_grads(model, ids, attention_mask=eager_mask(model, plan))
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(grads, expected_grads)
    # The plan matters: plain causal attention gives something else.
    assert not torch.allclose(logits[1:], model(ids).logits[1:], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(family):
    plan, ids = batch_plan(), token_ids()
    model = tiny_model(family).train()
    expected = logits_and_grads(model, ids, attention_plan=plan)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, grads = logits_and_grads(model, ids, attention_plan=plan)
    torch.testing.assert_close((logits, grads), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_continues_as_eager_attention_does(family):
    ids = token_ids(batch=2)
    model = tiny_model(family)
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours = model.generate(ids, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(ids, **options))


def test_without_a_plan_attention_is_causal_and_a_cache_changes_nothing():
    ids = token_ids()
    model = tiny_model()
    with torch.no_grad():
        whole = model(ids).logits
        torch.testing.assert_close(whole, model(ids, attention_plan=causal(3, ROW_TOKENS)).logits)
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole)


def test_jumping_position_ids_are_not_taken_for_documents():
    ids = token_ids(batch=1)
    jumping = torch.cat([torch.arange(10), torch.arange(10) + 50, torch.arange(3)]).unsqueeze(0)
    model = tiny_model()
    logits = model(ids, position_ids=jumping).logits
    model.set_attn_implementation("eager")
    expected = model(ids, position_ids=jumping, attention_mask=additive_mask(causal(1, ROW_TOKENS))).logits
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_brings_queries_keys_and_values_to_one_dtype(family):
    model, ids = tiny_model(family), token_ids()
    with torch.autocast("cpu", torch.bfloat16):
        # A cache would bring them to one dtype by itself.
        logits = model(ids, attention_plan=batch_plan(), use_cache=False).logits
    torch.testing.assert_close(logits.float(), model(ids, attention_plan=batch_plan()).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_may_estimate_a_plan_of_its_own(checkpointing):
    ids, starts, plans = token_ids(batch=1, num_tokens=120), [[0]], []

    def estimate(q, k):
        lists = moba(q, k, starts, chunk_tokens=16, top_k=2, block_tokens=16)
        plans.append(block_lists(lists, starts, 120))
        return plans[-1]

    model = tiny_model(initializer_range=0.1).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    logits, grads = logits_and_grads(model, ids, attention_plan=estimate)
    assert len(plans) == (4 if checkpointing else 2)
    assert not torch.equal(plans[0].visible(), plans[1].visible())
    model.gradient_checkpointing_disable()
    layers = iter(plans[:2])
    model.set_attn_implementation("eager")
    for layer in model.model.layers:
        mask = additive_mask(next(layers), 120)
        layer.self_attn.register_forward_pre_hook(
            lambda _module, args, given, mask=mask: (args, {**given, "attention_mask": mask}), with_kwargs=True
        )
    expected = logits_and_grads(model, ids)
    torch.testing.assert_close((logits, grads), expected, rtol=1e-4, atol=1e-5)


def test_padding_is_refused_and_a_full_mask_is_not():
    model, ids = tiny_model(), token_ids()
    mask = torch.ones_like(ids)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match=r"takes no padding: attention_mask \[3, 23\] has zeros"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="takes no padding"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)


def test_an_explicit_mask_is_refused():
    with pytest.raises(ValueError, match="cannot honour an attention_mask"):
        tiny_model()(token_ids(), attention_mask=additive_mask(batch_plan()))


def test_a_static_cache_is_refused():
    with pytest.raises(ValueError, match="needs a KV cache that grows"):
        tiny_model().generate(token_ids(), max_new_tokens=2, cache_implementation="static")


def test_attention_dropout_is_refused_in_training_only():
    model, ids = tiny_model(attention_dropout=0.1), token_ids()
    model(ids)
    with pytest.raises(ValueError, match=r"cannot honour attention dropout \(0.1\)"):
        model.train()(ids)


def test_a_sliding_window_narrows_the_plan_once_for_all_layers(monkeypatch):
    plan, model = batch_plan(), tiny_model("mistral", sliding_window=5)
    made = []
    monkeypatch.setattr(AttentionPlan, "__post_init__", lambda self: made.append(self))
    model(token_ids(), attention_plan=plan, use_cache=False)
    assert len(made) == 1


@pytest.mark.parametrize("sliding_window", [5, ROW_TOKENS, ROW_TOKENS + 3])
def test_a_sliding_cache_generates_as_eager_attention_does(sliding_window):
    ids = token_ids()
    model = tiny_model("mistral", sliding_window=sliding_window)
    options = {"max_new_tokens": 12, "do_sample": False}
    ours = model.generate(ids, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(ids, **options))


def test_a_plan_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the plan is for batch 3, 22 queries and 22 keys"):
        tiny_model()(token_ids(), attention_plan=causal(3, 22))


def test_registering_twice_is_registering_once():
    register()
    registered = dict(AttentionInterface())
    register()
    assert dict(AttentionInterface()) == registered


def test_a_saved_checkpoint_does_not_mention_our_attention(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert ATTENTION_NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_importing_the_module_imports_nothing_heavy():
    code = "import sys, ropewalk.stages.training.attention; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# Plans from rows


def owners(segments, row_tokens):
    """The document of each position, by the rule for positions in no segment: walk backwards, else the first."""

    def owner(position):
        before = [s for s in segments if s["row_start"] <= position]
        return (before[-1] if before else segments[0])["doc_id"]

    return [owner(position) for position in range(row_tokens)]


@st.composite
def rows_with_gaps(draw):
    """(segments, row_tokens) with gaps anywhere after position 0 and documents cut into consecutive pieces."""
    position, segments = draw(st.integers(1, 3)), []
    for number in range(draw(st.integers(1, 5))):
        is_same = number > 0 and draw(st.booleans())
        doc_id = segments[-1]["doc_id"] if is_same else f"doc-{number}"
        length = draw(st.integers(1, 4))
        segments.append(segment(doc_id, position, length))
        position += length + draw(st.integers(0, 2))
    return segments, position


@given(rows_with_gaps())
@settings(max_examples=60, deadline=None)
def test_documents_of_a_row_are_runs_of_one_doc_id_with_the_gaps_after_them(row):
    segments, row_tokens = row
    mask = plan_for_rows(["document"], [segments], row_tokens).visible()[0, 0]
    owner = owners(segments, row_tokens)
    for i in range(row_tokens):
        for j in range(row_tokens):
            assert bool(mask[i, j]) == (j <= i and owner[i] == owner[j])


@given(rows_with_gaps())
@settings(max_examples=60, deadline=None)
def test_position_zero_of_an_anchor_row_is_seen_by_all(row):
    segments, row_tokens = row
    mask = plan_for_rows(["anchor"], [segments], row_tokens).visible()[0, 0]
    owner = ["the anchor", *owners(segments, row_tokens)[1:]]
    for i in range(row_tokens):
        for j in range(row_tokens):
            assert bool(mask[i, j]) == (j <= i and (owner[i] == owner[j] or j == 0))


def test_each_row_of_a_batch_follows_its_own_policy():
    segments = [segment("a", 0, 3), segment("b", 3, 5)]
    plan = plan_for_rows(["document", "causal"], [segments, segments], 8)
    expected = AttentionPlan.stack([document([[0, 3]], 8), causal(1, 8)])
    assert torch.equal(plan.visible(), expected.visible())


def test_split_documents_need_policy_causal():
    utk = [segment("a", 1, 2), segment("b", 3, 2), segment("a", 5, 2)]
    assert plan_for_rows(["causal"], [utk], 8).density() == 1.0
    for policy in ("document", "anchor"):
        with pytest.raises(ValueError, match=rf"row 1 .*'a' returns after another one; .* causal, not {policy}"):
            plan_for_rows(["causal", policy], [utk, utk], 8)


@pytest.mark.parametrize(
    ("policy", "segments", "message"),
    [
        ("anchor", [segment("a", 0, 8)], "row 0 .*: policy anchor needs position 0 for the anchor token"),
        ("document", [], "row 0 .*: policy document needs at least one segment"),
        ("full", [segment("a", 0, 8)], "row 0 .*: attention must be causal, document or anchor, got 'full'"),
        ("document", [segment("a", 0, 4), segment("b", 3, 2)], "disjoint .* got 2 tokens at 3 .* ends at 4"),
        ("document", [segment("a", 4, 5)], "inside 8 tokens, got 5 tokens at 4"),
        ("document", [segment("a", 0, 0)], "got 0 tokens at 0"),
    ],
)
def test_rows_that_contradict_their_policy_are_named(policy, segments, message):
    with pytest.raises(ValueError, match=message):
        plan_for_rows([policy], [segments], 8)


def test_one_policy_a_row():
    with pytest.raises(ValueError, match="one entry a row, got 1 and 2"):
        plan_for_rows(["causal"], [[], []], 8)
