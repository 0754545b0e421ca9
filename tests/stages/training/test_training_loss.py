"""The loss module: chunks change nothing, documents see only themselves, models that bend their logits are refused."""

import pytest
import torch
from training_examples import TINY_MODEL, VOCAB

from ropewalk.kernels.loss import chunked
from ropewalk.stages.schema import TokenizerInfo
from ropewalk.stages.training import attention
from ropewalk.stages.training.loss import MicroBatch, WeightedLoss
from ropewalk.stages.training.model import ModelConfig, build_model

INFO = TokenizerInfo(digest="0" * 64, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1)
TOKENS = 24


def model(implementation="ropewalk"):
    attention.register()
    return build_model(ModelConfig(**TINY_MODEL), INFO, TOKENS, seed=1, attention=implementation)


def batch(num_rows=3):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (num_rows, TOKENS), generator=generator)
    targets = torch.rand((num_rows, TOKENS), generator=generator) < 0.6
    return MicroBatch(ids, torch.arange(TOKENS).expand(num_rows, -1), targets, targets & (ids % 3 == 0))


def causal_rows(num_rows=3, **options):
    return attention.visibility(["causal"] * num_rows, [[]] * num_rows, TOKENS, **options)


def value_and_gradients(module, visibility, target_weight=0.7, inserted_weight=0.2):
    module.zero_grad()
    objective, sums = module(batch(), visibility, target_weight, inserted_weight)
    objective.backward()
    return objective.item(), sums.tolist(), [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("chunk", [1, 7, 24, 71])
def test_chunks_give_the_same_loss_and_gradients(chunk):
    whole = value_and_gradients(WeightedLoss(model(), 3 * TOKENS), causal_rows())
    parts = value_and_gradients(WeightedLoss(model(), chunk), causal_rows())
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    for part, expected in zip(parts[2], whole[2], strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-7)


def test_no_more_logits_than_a_chunk_exist_at_once_and_none_of_what_is_no_target(monkeypatch):
    module, made = WeightedLoss(model(), 8), []
    module(batch(), causal_rows(), 1.0, 0.0)
    module.model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head made logits itself"))
    make = chunked._exponentials
    monkeypatch.setattr(chunked, "_exponentials", lambda hidden, *rest: made.append(len(hidden)) or make(hidden, *rest))
    module(batch(), causal_rows(), 1.0, 0.0)
    assert max(made) == 8
    assert sum(made) == int(batch().targets[:, 1:].sum())


def test_a_micro_batch_without_targets_has_no_loss_and_zero_gradients():
    module, empty = WeightedLoss(model(), 8), torch.zeros(3, TOKENS, dtype=torch.bool)
    objective, sums = module(MicroBatch(batch().input_ids, batch().position_ids, empty, empty), causal_rows(), 1.0, 1.0)
    objective.backward()
    assert objective.item() == 0
    assert sums.tolist() == [0, 0]
    assert all(not parameter.grad.any() for parameter in module.parameters())


def test_the_loss_is_a_weighted_sum_over_targets():
    whole = WeightedLoss(model(), 999)
    logits = whole.model(input_ids=batch().input_ids, **causal_rows(), use_cache=False).logits
    expected, inserted = 0.0, 0.0
    for row in range(3):
        for position in range(1, TOKENS):
            nats = -torch.log_softmax(logits[row, position - 1], -1)[batch().input_ids[row, position]].item()
            expected += nats * batch().targets[row, position].item()
            inserted += nats * batch().inserted[row, position].item()
    objective, sums, _ = value_and_gradients(whole, causal_rows())
    assert sums == pytest.approx([expected, inserted], rel=1e-5)
    assert objective == pytest.approx(0.7 * expected + 0.2 * inserted, rel=1e-5)


def test_a_packed_document_has_the_loss_it_has_alone():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCAB, (1, TOKENS), generator=generator)
    cut, everything = 10, torch.ones(1, TOKENS, dtype=torch.bool)
    segments = [
        {"doc_id": "a", "start": 0, "num_tokens": cut, "row_start": 0},
        {"doc_id": "b", "start": 0, "num_tokens": TOKENS - cut, "row_start": cut},
    ]
    module = WeightedLoss(model(), 999)

    def loss(policy, start, stop, parts):
        length = stop - start
        targets = everything[:, :length].clone()
        if start == 0 and stop == TOKENS:
            targets[0, cut] = False  # predicted across the boundary: no such target where documents are alone
        # Positions run on within the row: relative distances alone matter.
        piece = MicroBatch(ids[:, start:stop], torch.arange(start, stop)[None], targets, targets & False)
        return module(piece, attention.visibility([policy], [parts], length), 1.0, 0.0)[0].item()

    alone = loss("causal", 0, cut, []) + loss("causal", cut, TOKENS, [])
    assert loss("document", 0, TOKENS, segments) == pytest.approx(alone, rel=1e-6)
    assert abs(loss("causal", 0, TOKENS, segments) - alone) > 1e-4


@pytest.mark.parametrize("implementation", ["ropewalk", "sdpa", "eager"])
def test_jumps_in_position_ids_hide_nothing(implementation):
    module, ids = WeightedLoss(model(implementation), 999), batch(1).input_ids
    causal = causal_rows(1, implementation=implementation)
    positions = torch.cat([torch.arange(12), torch.arange(500, 512)])[None]
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1 - 3) % (VOCAB - 3) + 3
    late = torch.zeros(1, TOKENS, dtype=torch.bool)
    late[0, 14:] = True
    losses = [
        module(MicroBatch(tokens, positions, late, late & False), causal, 1.0, 0.0)[0].item()
        for tokens in (ids, changed)
    ]
    assert losses[0] != losses[1]


def test_a_model_that_caps_its_logits_is_refused_in_chunks():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    attention.register()
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        final_logit_softcapping=0.01,
        attn_logit_softcapping=None,
        sliding_window=64,
        attn_implementation="ropewalk",
    )
    capped = Gemma2ForCausalLM(config)
    with pytest.raises(ValueError, match="loss_chunk_tokens"):
        WeightedLoss(capped, 8)(batch(), causal_rows(), 1.0, 0.0)
    assert WeightedLoss(capped, 999)(batch(), causal_rows(), 1.0, 0.0)[0] > 0
