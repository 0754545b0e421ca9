import numpy as np
import pytest
import torch
from judges import write_judge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from ropewalk.stages.data.selection.language_model import (
    TextEncoder,
    load_model,
    observe_attention,
    token_losses,
    truncate,
)
from ropewalk.stages.data.selection.long_positions import stretch_positions

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("models") / "judge")


def random_ids(*lengths):
    return [RNG.integers(0, 300, length).tolist() for length in lengths]


def plain_losses(folder, ids, **options):
    """One sequence, stock transformers, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", **options)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return -torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


def plain_attention(folder, ids):
    """[layers, H, L, L], float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        return torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0].numpy()


def seen_attention(model, ids, layers=None, block=None):
    found = {}

    def see(layer):
        pieces = [(first, weights.numpy()) for first, weights in layer.blocks(0, layer.num_tokens)]
        square = np.zeros((len(layer.query_HLD), len(ids), len(ids)))
        for first, weights in pieces:
            square[:, first : first + weights.shape[1], : weights.shape[2]] = weights
        found[layer.layer] = square

    observe_attention(model, ids, see, layers=layers)
    return found


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_losses_of_a_batch_are_those_of_each_sequence_alone(judge, batch_tokens):
    sequences = random_ids(31, 5, 17, 1, 2, 17)
    losses = token_losses(load_model(judge), sequences, batch_tokens=batch_tokens)
    for ids, found in zip(sequences, losses, strict=True):
        np.testing.assert_allclose(found, plain_losses(judge, ids), rtol=2e-5, atol=2e-5)


def test_losses_begin_at_the_first_target(judge):
    sequences, firsts = random_ids(30, 12, 9), [20, 1, 9]
    losses = token_losses(load_model(judge), sequences, batch_tokens=100, first_targets=firsts)
    for ids, first, found in zip(sequences, firsts, losses, strict=True):
        np.testing.assert_allclose(found, plain_losses(judge, ids)[first - 1 :], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("block_elements", [1, 500, 2**26])
def test_attention_weights_are_those_of_eager_transformers(judge, monkeypatch, block_elements):
    monkeypatch.setattr("ropewalk.stages.data.selection.language_model._BLOCK_ELEMENTS", block_elements)
    (ids,) = random_ids(37)
    found, expected = seen_attention(load_model(judge), ids), plain_attention(judge, ids)
    assert sorted(found) == [0, 1]
    for layer in found:
        np.testing.assert_allclose(found[layer], expected[layer], atol=1e-5)


def test_attention_of_gpt2_and_of_a_sliding_window_is_read_as_it_is(tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    sliding = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        initializer_range=0.3,
    )
    MistralForCausalLM(sliding).save_pretrained(tmp_path / "sliding")
    (ids,) = random_ids(40)
    for name in ("gpt2", "sliding"):
        found, expected = seen_attention(load_model(tmp_path / name), ids), plain_attention(tmp_path / name, ids)
        np.testing.assert_allclose(np.stack([found[0], found[1]]), expected, atol=1e-5)
        assert (expected[0, :, -1, 0] > 0).all() == (name == "gpt2")


def test_only_the_layers_asked_for_run(judge):
    model, (ids,) = load_model(judge), random_ids(12)
    ran = []
    model.model.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    found = seen_attention(model, ids, layers=[0])
    assert list(found) == [0] and not ran
    np.testing.assert_allclose(found[0], plain_attention(judge, ids)[0], atol=1e-5)
    assert len(token_losses(model, [ids], batch_tokens=50)[0]) == 11, "the observer is gone afterwards"


def test_a_model_of_its_first_layers_has_their_attention(judge):
    (ids,) = random_ids(12)
    model = load_model(judge, num_layers=1)
    assert model.num_layers == 1
    np.testing.assert_allclose(seen_attention(model, ids)[0], plain_attention(judge, ids)[0], atol=1e-5)


def test_dynamic_positions_do_not_depend_on_what_was_read_before(tmp_path):
    folder = write_judge(tmp_path / "short", window=32)
    model = load_model(folder, window=128, extension="dynamic")
    longer, middle, short = random_ids(120, 64, 30)
    rope = {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10_000.0}
    for ids in (longer, middle, short, longer):
        stretch_positions(model, len(ids))
        (found,) = token_losses(model, [ids], batch_tokens=200)
        # A model loaded afresh has seen no longer sequence.
        np.testing.assert_allclose(found, plain_losses(folder, ids, rope_parameters=rope), rtol=1e-4, atol=1e-4)


def test_ntk_positions_are_those_of_the_changed_base(tmp_path):
    folder = write_judge(tmp_path / "short", window=32)
    (ids,) = random_ids(100)
    base = 10_000.0 * 4 ** (8 / 6)
    expected = plain_losses(folder, ids, rope_parameters={"rope_type": "default", "rope_theta": base})
    (found,) = token_losses(load_model(folder, window=128, extension="ntk"), [ids], batch_tokens=200)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert abs(found - plain_losses(folder, ids)).max() > 0.01


def test_text_that_spells_a_special_token_stays_text(judge):
    encoder = TextEncoder(judge)
    encoded = encoder.encode("rope <|eos|> é")
    assert encoder.eos_token_id not in encoded.ids and encoder.prefix == [encoder.bos_token_id]
    place = "rope <|eos|> é".index("é")
    assert encoded.offsets[encoded.first_token_beyond(place)][1] > place
    assert encoded.first_token_beyond(99) == len(encoded.ids)


def test_truncation_tells_what_it_left_out():
    assert truncate([1, 2, 3, 4], 3, keep="head") == ([1, 2, 3], 1)
    assert truncate([1, 2, 3, 4], 3, keep="tail") == ([2, 3, 4], 1)
    assert truncate([1, 2], 3, keep="tail") == ([1, 2], 0)


def test_what_a_model_cannot_read_is_named(judge, tmp_path):
    model = load_model(judge)
    with pytest.raises(ValueError, match=r"reads 256 tokens, a sample has 257"):
        token_losses(model, [[1] * 257], batch_tokens=9)
    with pytest.raises(ValueError, match=r"embeddings for \d+ ids, a sample holds 9999"):
        token_losses(model, [[1, 9999]], batch_tokens=9)
    with pytest.raises(ValueError, match="256 tokens, but 512 are wanted"):
        load_model(judge, window=512)
    with pytest.raises(ValueError, match=r"layers 0 to 1, asked for were \[2\]"):
        observe_attention(model, [1, 2], print, layers=[2])
    with pytest.raises(ValueError, match=r"is no model: it has no config.json"):
        load_model(tmp_path)
