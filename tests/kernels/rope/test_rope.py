"""Rope against its fp64 definition and transformers' own, and what the plain form loses at far positions."""

import pytest
import torch
from numerics import assert_within_budget
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ropewalk.kernels.rope import apply_rope
from ropewalk.kernels.rope.angles import cos_and_sin, fixed_point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", "triton"]
MILLION = 2**20
OFFSETS = [2**10, 2**16, 2**18, MILLION]


def frequencies(num_pairs, theta=500_000.0):
    return (theta ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)).float().to(DEVICE)


def rope_inputs(batch=2, num_heads=4, kv_heads=2, num_tokens=37, head_dim=64, dtype=torch.float32):
    """(q, k, dq, dk) as a projection leaves them: tokens outside heads in memory."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        values = torch.randn(batch, num_tokens, heads, head_dim, generator=generator, dtype=torch.float64)
        return values.to(DEVICE, dtype).transpose(1, 2)

    q, k = draw(num_heads), draw(kv_heads)
    return q.requires_grad_(), k.requires_grad_(), draw(num_heads), draw(kv_heads)


def random_positions(batch, num_tokens, largest=MILLION):
    return torch.randint(0, largest, (batch, num_tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def plain_rope(q, k, position_ids, inv_freq):
    """As transformers has it: angles in fp32, cos and sin rounded to the dtype of q, the rotation in that dtype."""
    angles = position_ids[..., None].float() * inv_freq.float()
    angles = torch.cat([angles, angles], dim=-1)
    return apply_rotary_pos_emb(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))


def gradients(q, k, position_ids, inv_freq, dq, dk, implementation, scaling=1.0):
    """[q, k, their gradients]."""
    inputs = [x.detach().requires_grad_() for x in (q, k)]
    out = apply_rope(*inputs, position_ids, inv_freq, attention_scaling=scaling, implementation=implementation)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, inputs, (dq, dk))]


@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_near_positions_give_what_transformers_gives(implementation, kind):
    parameters = {"rope_type": kind, "rope_theta": 10_000.0}
    if kind == "yarn":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": 1024}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=4096)
    config.rope_parameters = parameters
    q, k, _, _ = rope_inputs()
    position_ids = random_positions(2, 37, 64)
    embedding = LlamaRotaryEmbedding(config).to(DEVICE)
    cos, sin = embedding(q, position_ids)
    inv_freq, scaling = embedding.inv_freq, embedding.attention_scaling
    assert (scaling > 1) == (kind == "yarn")
    found = apply_rope(
        q, k, position_ids, torch.tensor(inv_freq, dtype=torch.float64, device=DEVICE),
        attention_scaling=scaling, implementation=implementation,
    )  # fmt: skip
    torch.testing.assert_close(found, apply_rotary_pos_emb(q, k, cos, sin), rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("head_dim", "num_pairs", "num_heads"), [(64, 32, 4), (80, 40, 2), (96, 48, 2), (256, 128, 2), (64, 8, 4)]
)
def test_far_and_unordered_positions_keep_the_error_budget(implementation, head_dim, num_pairs, num_heads):
    q, k, dq, dk = rope_inputs(num_heads=num_heads, head_dim=head_dim, num_tokens=19)
    arguments = (random_positions(2, 19), frequencies(num_pairs))
    found = gradients(q, k, *arguments, dq, dk, implementation, scaling=1.3)
    exact = gradients(q.double(), k.double(), *arguments, dq.double(), dk.double(), "reference", scaling=1.3)
    for name, fast, right in zip(("q", "k", "dq", "dk"), found, exact, strict=True):
        # No plain form to compare with: at these positions it is off by percents. Right but for fp32 rounding.
        assert_within_budget(name, fast, right.float(), right)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(implementation, dtype):
    if implementation == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter cuts fp32 off to bf16 instead of rounding it")
    q, k, dq, dk = rope_inputs(dtype=dtype)
    arguments = (random_positions(2, 37), frequencies(32))
    found = gradients(q, k, *arguments, dq, dk, implementation)
    exact = gradients(q.double(), k.double(), *arguments, dq.double(), dk.double(), "reference")
    for fast, right in zip(found, exact, strict=True):
        assert fast.dtype == dtype
        half_a_step = torch.finfo(dtype).eps / 2 * right.abs()
        assert bool(((fast.double() - right).abs() <= half_a_step + 1e-6).all())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_gradient_is_the_rotation_back(implementation):
    q, k, _, _ = rope_inputs()
    arguments = (random_positions(2, 37), frequencies(32))
    turned = apply_rope(q, k, *arguments, implementation=implementation)
    back = torch.autograd.grad(turned, (q, k), [x.detach() for x in turned])
    torch.testing.assert_close(back, (q.detach(), k.detach()), rtol=1e-5, atol=2e-6)


def test_gradients_of_first_and_second_order_are_right():
    q, k, _, _ = rope_inputs(num_tokens=3, head_dim=8, num_heads=2, kv_heads=1, dtype=torch.float64)
    position_ids, inv_freq = random_positions(1, 3), frequencies(3)

    def rotated(q, k):
        return apply_rope(q, k, position_ids, inv_freq, attention_scaling=1.2, implementation="torch")

    assert torch.autograd.gradcheck(rotated, (q, k))
    assert torch.autograd.gradgradcheck(rotated, (q, k))


def test_a_loss_of_one_output_alone_leaves_the_other_without_gradient():
    q, k, dq, _ = rope_inputs()
    turned, _ = apply_rope(q, k, random_positions(2, 37), frequencies(32))
    grads = torch.autograd.grad(turned, (q, k), dq)
    assert bool((grads[1] == 0).all()) and bool((grads[0] != 0).any())


def shifted_scores(rope, q, k, inv_freq, offset):
    """Scores of all pairs with the positions counted from `offset`, summed in fp64."""
    position_ids = offset + torch.arange(q.shape[2], device=DEVICE)[None]
    turned = [x.double() for x in rope(q, k, position_ids, inv_freq)]
    return torch.einsum("bhld,bhsd->bhls", *turned)


def drifts(rope, dtype):
    """Root mean square of how far scores at each offset are from the exact ones, which depend on distances alone."""
    q, k, _, _ = (x.detach() for x in rope_inputs(1, 4, 4, 64, 128, dtype))
    inv_freq = frequencies(64)

    def exact(*arguments):
        return apply_rope(*arguments, implementation="reference")

    right = shifted_scores(exact, q.double(), k.double(), inv_freq, 0)
    return [float((shifted_scores(rope, q, k, inv_freq, n) - right).square().mean().sqrt()) for n in OFFSETS]


def test_plain_rope_drifts_with_the_offset_and_ours_does_not():
    plain, ours = drifts(plain_rope, torch.bfloat16), drifts(apply_rope, torch.bfloat16)
    assert plain == sorted(plain) and plain[-1] > 2 * plain[0]
    assert max(ours) < 1.05 * min(ours)
    assert all(one > 1.4 * other for one, other in zip(plain, ours, strict=True)) and plain[-1] > 3 * ours[-1]
    plain, ours = drifts(plain_rope, torch.float32), drifts(apply_rope, torch.float32)
    assert plain[-1] > 500 * plain[0] and max(ours) < 1e-5 < plain[0]


@pytest.mark.parametrize("offset", [0, *OFFSETS, 2**30])
def test_scores_depend_on_the_distance_but_for_one_rounding(offset):
    q, k, _, _ = (x.detach() for x in rope_inputs(1, 2, 2, 64, 128, torch.bfloat16))
    inv_freq = frequencies(64)
    near = shifted_scores(apply_rope, q, k, inv_freq, 0)
    far = shifted_scores(apply_rope, q, k, inv_freq, offset)
    norms = q.double().norm(dim=-1)[..., :, None] * k.double().norm(dim=-1)[..., None, :]
    # Each of q and k, at each of the two offsets, is off by at most half a step of bf16, relative to its norm.
    assert bool(((far - near).abs() <= 4.02 * torch.finfo(torch.bfloat16).eps / 2 * norms).all())


def test_angles_are_exact_at_any_position():
    # An eighth of a turn a token: after 8 n + m tokens, m eighths, whatever n.
    eighth = fixed_point(torch.tensor([torch.pi / 4, torch.pi, 7 * torch.pi / 4], dtype=torch.float64))
    cos, sin = cos_and_sin(torch.tensor([[0, 2**30, 2**30 + 1, 2**30 + 2, -1]]), eighth, torch.float64)
    root = 0.5**0.5
    assert (cos[0, :, 0] - torch.tensor([1, 1, root, 0, root])).abs().max() < 1e-7
    assert (sin[0, :, 0] - torch.tensor([0, 0, root, 1, -root])).abs().max() < 1e-7
    assert (cos[0, :, 1] - torch.tensor([1, 1, -1, 1, -1])).abs().max() < 1e-7
    assert (sin[0, :, 2] - torch.tensor([0, 0, -root, -1, root])).abs().max() < 1e-7


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_results_keep_the_layout_and_do_not_depend_on_it(implementation):
    q, k, _, _ = rope_inputs()
    arguments = (random_positions(1, 37).int(), frequencies(32))
    turned = apply_rope(q, k, *arguments, implementation=implementation)
    assert turned[0].stride() == q.stride() and turned[1].stride() == k.stride()
    others = [
        apply_rope(q.contiguous(), k.mT.contiguous().mT, *arguments, implementation=implementation),
        apply_rope(q, k, arguments[0].long().expand(2, 37), arguments[1], implementation=implementation),
    ]
    for other in others:
        assert torch.equal(turned[0], other[0]) and torch.equal(turned[1], other[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_are_no_error(implementation):
    q, k, _, _ = rope_inputs(num_tokens=0)
    turned = apply_rope(q, k, random_positions(2, 0), frequencies(32), implementation=implementation)
    assert [x.shape for x in turned] == [q.shape, k.shape]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 5, 8)}, r"must be \[batch, heads, tokens, head_dim\], got q \[4, 5, 8\]"),
        ({"k": torch.zeros(2, 2, 6, 8)}, r"agree in batch, tokens and head_dim, got .* k \[2, 2, 6, 8\]"),
        ({"k": torch.zeros(2, 2, 5, 8).half()}, "one floating dtype, got torch.float32 and torch.float16"),
        ({"position_ids": torch.zeros(2, 5)}, "position_ids must be int32 or int64, got torch.float32"),
        ({"position_ids": torch.arange(4)[None]}, r"must be \[2, 5\] or \[1, 5\] to fit q, got \[1, 4\]"),
        ({"inv_freq": torch.ones(5)}, r"inv_freq must hold .* at most 4, got \[5\]"),
        ({"inv_freq": torch.ones(0)}, r"inv_freq must hold .* got \[0\]"),
        ({"inv_freq": torch.ones(4).bfloat16()}, "inv_freq must be float32 or float64, got torch.bfloat16"),
        ({"inv_freq": torch.ones(4, requires_grad=True)}, "no gradient flows into inv_freq"),
        ({"inv_freq": torch.ones(4, device="meta")}, "must lie on one device, got cpu, cpu, cpu and meta"),
        ({"implementation": "flash"}, "implementation must be one of auto, triton, torch, reference, got 'flash'"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    given = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 5, 8), "position_ids": torch.arange(5)[None]}
    with pytest.raises(ValueError, match=message):
        apply_rope(**({**given, "inv_freq": torch.ones(4)} | changes))


def test_the_kernel_refuses_what_it_cannot_do(monkeypatch):
    q, k, _, _ = rope_inputs(dtype=torch.float64)
    arguments = (random_positions(2, 37), frequencies(32))
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32, got torch\.float64"):
        apply_rope(q, k, *arguments, implementation="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            apply_rope(q.float(), k.float(), *arguments, implementation="triton")
