"""Position methods against golden numbers, against transformers, and against formulas written out anew."""

import math

import pytest
from pydantic import ValidationError

from ropewalk.stages.training.rope import RopeConfig, extended_parameters, extended_window, frequencies, original_window

DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
METHODS = {
    "linear": RopeConfig(method="linear"),
    "theta": RopeConfig(method="theta", theta=2e6),
    "ntk": RopeConfig(method="ntk"),
    "yarn": RopeConfig(method="yarn"),
    "yarn with other bounds": RopeConfig(method="yarn", beta_fast=16, beta_slow=2),
    "linear beyond the rows": RopeConfig(method="linear", factor=16),
    "none": RopeConfig(),
}


def extend(rope, window=2048, head_dim=4, parameters=DEFAULT, max_position_embeddings=512):
    return extended_parameters(rope, parameters, max_position_embeddings, window, head_dim)


# Worked out by hand from the formulas in rope.py, with base 10,000, original window 512 and factor 4.
# yarn, 8 dimensions: bounds floor(0.406) = 0 and ceil(1.911) = 2, so pairs keep 1, 1/2, 0, 0 of their frequency.
@pytest.mark.parametrize(
    ("rope", "head_dim", "expected", "scaling"),
    [
        (RopeConfig(), 4, [1.0, 0.01], 1.0),
        (RopeConfig(method="linear"), 4, [0.25, 0.0025], 1.0),
        (RopeConfig(method="theta", theta=1e6), 4, [1.0, 0.001], 1.0),
        (RopeConfig(method="ntk"), 4, [1.0, 0.0025], 1.0),
        (RopeConfig(method="yarn"), 8, [1.0, 0.0625, 0.0025, 0.00025], 1.1386294361119891),
    ],
)
def test_methods_give_the_frequencies_worked_out_by_hand(rope, head_dim, expected, scaling):
    found, found_scaling = frequencies(extend(rope, head_dim=head_dim), head_dim)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found_scaling == pytest.approx(scaling, rel=1e-12)


def independent_frequencies(rope, head_dim, base=10_000.0, original=512, window=2048):
    """Chen et al. 2306.15595 (linear), Peng et al. 2309.00071 sections 3.1 to 3.4 (ntk, yarn), by dimension index."""
    factor = rope.factor or window / original
    if rope.method == "theta":
        base = rope.theta
    if rope.method == "ntk":
        base = base * factor ** (head_dim / (head_dim - 2))
    turn = [1 / base ** (index / head_dim) for index in range(0, head_dim, 2)]
    if rope.method == "linear":
        return [t / factor for t in turn]
    if rope.method != "yarn":
        return turn

    def index_with(turns):  # the pair whose wavelength fits `turns` times into the original window
        return math.log(original / (2 * math.pi * turns), base) * head_dim / 2

    low, high = math.floor(index_with(rope.beta_fast)), math.ceil(index_with(rope.beta_slow))
    low, high = max(0, low), min(high, head_dim - 1)
    scaled = []
    for pair, t in enumerate(turn):
        interpolated = 0.0 if pair <= low else 1.0 if pair >= high else (pair - low) / (high - low)
        scaled.append(interpolated * t / factor + (1 - interpolated) * t)
    return scaled


@pytest.mark.parametrize("head_dim", [8, 32, 64])
@pytest.mark.parametrize("name", METHODS)
def test_transformers_really_uses_these_frequencies(name, head_dim):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = METHODS[name]
    parameters = extend(rope, head_dim=head_dim)
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        max_position_embeddings=extended_window(parameters, 512, 2048),
        rope_parameters=dict(parameters),
    )
    module = LlamaRotaryEmbedding(config)
    expected = independent_frequencies(rope, head_dim)
    assert module.inv_freq.tolist() == pytest.approx(expected, rel=1e-5)
    assert frequencies(parameters, head_dim)[0] == pytest.approx(expected, rel=1e-12)
    cos, _ = module(torch.zeros(1), torch.tensor([[0]]))
    assert cos.max().item() == pytest.approx(frequencies(parameters, head_dim)[1], rel=1e-6)


@pytest.mark.parametrize("method", ["linear", "yarn"])
def test_a_second_extension_starts_from_the_original_window(method):
    first = extend(RopeConfig(method=method), window=2048)
    window = extended_window(first, 512, 2048)
    assert (window, original_window(first, window)) == (2048, 512)
    second = extend(RopeConfig(method=method), window=8192, parameters=first, max_position_embeddings=window)
    assert second == extend(RopeConfig(method=method), window=8192)


def test_an_explicit_factor_keeps_the_original_window_recoverable():
    parameters = extend(RopeConfig(method="linear", factor=16), window=2048)
    window = extended_window(parameters, 512, 2048)
    assert (window, original_window(parameters, window)) == (8192, 512)


def test_base_changes_compose():
    once = extend(RopeConfig(method="ntk", factor=8))
    twice = extend(RopeConfig(method="ntk", factor=4), parameters=extend(RopeConfig(method="ntk", factor=2)))
    assert twice["rope_theta"] == pytest.approx(once["rope_theta"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "theta"}, "rope.theta"),
        ({"method": "yarn", "theta": 1e6}, "rope.theta"),
        ({"method": "none", "factor": 2}, "rope.factor"),
        ({"method": "yarn", "beta_fast": 1, "beta_slow": 1}, "rope.beta_fast"),
        ({"method": "dynamic"}, "method"),
    ],
)
def test_contradicting_fields_are_refused_by_name(fields, message):
    with pytest.raises(ValidationError, match=message):
        RopeConfig(**fields)


@pytest.mark.parametrize(
    ("rope", "window", "parameters", "message"),
    [
        (RopeConfig(method="yarn"), 256, DEFAULT, "rows of 256 tokens are shorter .* window of 512"),
        (RopeConfig(method="linear", factor=2), 2048, DEFAULT, "rope.factor 2 stretches 512 tokens"),
        (RopeConfig(method="yarn"), 2048, DEFAULT | {"rope_type": "llama3"}, "cannot rescale a 'llama3'"),
    ],
)
def test_embeddings_that_cannot_be_extended_are_refused(rope, window, parameters, message):
    with pytest.raises(ValueError, match=message):
        extend(rope, window=window, parameters=parameters)
