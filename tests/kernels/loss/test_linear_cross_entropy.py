"""The chunked loss against all logits at once: values, gradients, masks, and how much memory there is at a time."""

import importlib.util
import weakref

import pytest
import torch
from numerics import DEVICES, assert_within_budget
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ropewalk.kernels.loss import chunked, linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
NUM_TOKENS, WIDTH, VOCABULARY = 23, 12, 50


def loss_inputs(num_tokens=NUM_TOKENS, width=WIDTH, vocabulary=VOCABULARY, dtype=torch.float64, device="cpu"):
    """(hidden, weight, targets, loss_mask, token_weights)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (num_tokens,), generator=generator)
    loss_mask = torch.rand(num_tokens, generator=generator) < 0.6
    token_weights = torch.rand(num_tokens, generator=generator)
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, targets.to(device), loss_mask.to(device), token_weights.to(device)


def plain_loss(hidden, weight, targets, loss_mask=None, token_weights=None, reduction="sum"):
    """All logits in the dtype of hidden, as a model makes them, the rest in fp32 or better."""
    logits = functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shares = torch.ones_like(logits[:, 0]) if token_weights is None else token_weights.to(logits.dtype)
    if loss_mask is not None:
        shares = shares * loss_mask
    losses = functional.cross_entropy(logits, targets, reduction="none") * shares
    if reduction == "none":
        return losses
    return losses.sum() / (shares.sum() if reduction == "mean" else 1)


def with_gradients(loss, hidden, weight):
    """[loss, dhidden, dweight], of a loss that is no scalar with gradients that differ from token to token."""
    upstream = torch.linspace(0.5, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), upstream)]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize(("is_masked", "is_weighted"), [(False, False), (True, False), (False, True), (True, True)])
def test_values_and_gradients_are_those_of_plain_cross_entropy(
    reduction, implementation, is_masked, is_weighted, monkeypatch
):
    monkeypatch.setattr(chunked, "VOCABULARY_SLICE", 16)
    hidden, weight, targets, loss_mask, token_weights = loss_inputs()
    chosen = {"loss_mask": loss_mask if is_masked else None, "token_weights": token_weights if is_weighted else None}
    expected = with_gradients(plain_loss(hidden, weight, targets, **chosen, reduction=reduction), hidden, weight)
    for chunk_tokens in (1, 5, NUM_TOKENS, 1000):
        loss = linear_cross_entropy(
            hidden, weight, targets, **chosen, chunk_tokens=chunk_tokens, reduction=reduction,
            implementation=implementation,
        )  # fmt: skip
        torch.testing.assert_close(with_gradients(loss, hidden, weight), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("magnitude", [1.0, 4.0, 16.0])
def test_low_precision_keeps_the_error_budget(dtype, reduction, magnitude, device):
    hidden, weight, targets, loss_mask, token_weights = loss_inputs(67, 32, 301, dtype, device)
    hidden = (hidden.detach() * magnitude).requires_grad_()
    chosen = {"loss_mask": loss_mask, "token_weights": token_weights}
    found = linear_cross_entropy(hidden, weight, targets, **chosen, chunk_tokens=16, reduction=reduction)
    plain = plain_loss(hidden, weight, targets, **chosen, reduction=reduction)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = linear_cross_entropy(*wide, targets, **chosen, reduction=reduction, implementation="reference")
    results = [with_gradients(*pair) for pair in ((found, hidden, weight), (plain, hidden, weight), (exact, *wide))]
    for name, fast, rounded, right in zip(("loss", "dhidden", "dweight"), *results, strict=True):
        assert_within_budget(name, fast, rounded, right)
    # The inputs are rounded, the logits are not.
    torch.testing.assert_close(found.double(), exact.to(found.dtype).double(), rtol=1e-5, atol=1e-5 * magnitude)


def rounded_product(x, y, dtype):
    """What CUDA does with operands in half precision."""
    working = torch.promote_types(dtype, torch.float32)
    return x.to(dtype).to(working) @ y.to(dtype).to(working)


@pytest.mark.parametrize("device", [*DEVICES, "cpu, products as on CUDA"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("share", "upstream"), [(1 + 2.0**-8, 1.0), (1.0, 1.3)])
def test_factors_do_not_bias_the_gradients(reduction, share, upstream, device, monkeypatch):
    """1 + 2^-8 is half way between two numbers of bf16, and 1.3 is off by 0.24 percent there."""
    if "," in device:
        device = "cpu"
        monkeypatch.setattr(chunked, "_product", rounded_product)
    hidden, weight, targets, _, token_weights = loss_inputs(67, 32, 301, torch.bfloat16, device)
    token_weights = torch.full_like(token_weights, share)
    chosen = {"token_weights": token_weights, "reduction": reduction}
    loss = linear_cross_entropy(hidden, weight, targets, **chosen).sum() * upstream
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(plain_loss(*wide, targets, **chosen).sum() * upstream, wide)
    for fast, right in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert abs((fast.double() * right).sum() / right.square().sum() - 1) < 5e-4


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weights_of_one_in_a_million_tokens_are_not_lost_in_half_precision(reduction):
    hidden, weight, targets, _, _ = loss_inputs(dtype=torch.float16)
    token_weights = torch.full((NUM_TOKENS,), 1e-6)
    # As a loss scaler does: the gradient would be representable again at the end.
    scale = 2.0**16
    loss = linear_cross_entropy(hidden, weight, targets, token_weights=token_weights, reduction=reduction)
    found = torch.autograd.grad(loss.sum() * scale, (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(plain_loss(*wide, targets) * 1e-6 * scale, wide)
    for fast, right in zip(found, exact, strict=True):
        assert (fast.double() - right).abs().max() < 2e-3 * right.abs().max()


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("is_empty", [False, True])
def test_nothing_to_learn_is_zero_and_not_nan(reduction, is_empty, implementation):
    hidden, weight, targets, _, _ = loss_inputs(0 if is_empty else NUM_TOKENS)
    nothing = {"loss_mask": torch.zeros(len(hidden), dtype=torch.bool)}
    unweighted = {"token_weights": torch.zeros(len(hidden))}
    for chosen in (nothing, unweighted):
        loss = linear_cross_entropy(
            hidden, weight, targets, **chosen, reduction=reduction, implementation=implementation
        )
        for value in with_gradients(loss, hidden, weight):
            assert bool((value == 0).all())


def test_masked_tokens_are_not_read():
    hidden, weight, targets, loss_mask, _ = loss_inputs()
    expected = with_gradients(plain_loss(hidden, weight, targets, loss_mask), hidden, weight)
    spoilt = torch.where(loss_mask[:, None], hidden.detach(), torch.nan).requires_grad_()
    ignored = torch.where(loss_mask, targets, -100)
    found = with_gradients(linear_cross_entropy(spoilt, weight, ignored, loss_mask=loss_mask), spoilt, weight)
    torch.testing.assert_close(found, expected)


def test_the_trainers_two_sums_come_from_losses_of_tokens():
    """As stages/training/loss.py: targets and inserted targets weighted apart, both sums reported."""
    hidden, weight, targets, is_target, _ = loss_inputs()
    is_inserted = ~is_target
    plain = plain_loss(hidden, weight, targets, reduction="none")
    ours = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4, reduction="none")
    objectives = [0.3 * losses[is_target].sum() + 0.05 * losses[is_inserted].sum() for losses in (ours, plain)]
    found, expected = (with_gradients(objective, hidden, weight) for objective in objectives)
    torch.testing.assert_close(found, expected)
    token_weights = 0.3 * is_target + 0.05 * is_inserted
    at_once = linear_cross_entropy(hidden, weight, targets, token_weights=token_weights.double(), chunk_tokens=4)
    torch.testing.assert_close(with_gradients(at_once, hidden, weight), expected)


def test_a_frozen_head_or_body_leaves_the_others_gradient_right():
    hidden, weight, targets, _, _ = loss_inputs()
    expected = torch.autograd.grad(plain_loss(hidden, weight, targets), (hidden, weight))
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, weight.detach(), targets, reduction=reduction).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected[0])
        loss = linear_cross_entropy(hidden.detach(), weight, targets, reduction=reduction).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected[1])


def test_autocast_does_not_lower_the_precision():
    hidden, weight, targets, _, _ = loss_inputs(dtype=torch.float32)
    expected = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class MemoryMeter(TorchDispatchMode):
    """Bytes of the largest storage made, and of those alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.largest = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.alive:
                    self.alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
                self.largest = max(self.largest, storage.nbytes())
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def measured(reduction, num_tokens, loss_of=linear_cross_entropy, **options):
    hidden, weight, targets, _, _ = loss_inputs(num_tokens, 4, 6000, torch.bfloat16)
    with MemoryMeter() as meter:
        loss_of(hidden, weight, targets, reduction=reduction, **options).sum().backward()
    return meter


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_memory_holds_one_chunk_of_logits_whatever_the_number_of_tokens(reduction, monkeypatch):
    chunk = 16 * 6000 * 4
    of_weight = 6000 * 4 * 4
    monkeypatch.setattr(chunked, "VOCABULARY_SLICE", 1024)
    few, many = (measured(reduction, n, chunk_tokens=16) for n in (64, 1024))
    assert many.largest == chunk
    # The logits and a slice of them, the weight, its gradient in fp32 and bf16; hidden is small.
    assert many.peak < 1.3 * chunk + 2.5 * of_weight
    assert many.peak < few.peak + 1024 * 4 * 20
    assert measured(reduction, 1024, plain_loss).largest == 1024 * 6000 * 4


def test_without_gradients_none_are_formed(monkeypatch):
    monkeypatch.setattr(chunked, "VOCABULARY_SLICE", 1024)
    hidden, weight, targets, _, _ = loss_inputs(64, 4, 6000, torch.bfloat16)
    with torch.no_grad(), MemoryMeter() as meter:
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=1)
    assert not loss.requires_grad
    assert meter.largest == weight.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(5, 3)}, r"hidden must be .* got \[5, 3\] and \[7, 4\]"),
        ({"hidden": torch.zeros(1, 5, 4)}, r"hidden must be \[tokens, width\]"),
        ({"weight": torch.zeros(7, 4).half()}, "one floating dtype, got torch.float32 and torch.float16"),
        ({"targets": torch.zeros(5)}, "targets must be int64, got torch.float32"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, r"targets must be \[5\] to fit hidden, got \[6\]"),
        ({"targets": torch.tensor([0, 1, -100, 2, 3])}, "targets must be 0 to 6 where they count, got -100"),
        ({"targets": torch.tensor([0, 1, 7, 2, 3])}, "targets must be 0 to 6 where they count, got 7"),
        ({"loss_mask": torch.ones(5)}, "loss_mask must be bool, got torch.float32"),
        ({"loss_mask": torch.ones(4, dtype=torch.bool)}, r"loss_mask must be \[5\] to fit hidden, got \[4\]"),
        ({"token_weights": torch.ones(5, 1)}, r"token_weights must be \[5\] to fit hidden, got \[5, 1\]"),
        ({"token_weights": torch.ones(5, requires_grad=True)}, "token_weights must be floating and without gradient"),
        ({"token_weights": torch.ones(5, device="meta")}, "token_weights must lie on cpu as hidden does, got meta"),
        ({"chunk_tokens": 0}, "chunk_tokens must be 1 or more, got 0"),
        ({"reduction": "max"}, "reduction must be one of sum, mean, none, got 'max'"),
        ({"implementation": "fused"}, "implementation must be one of auto, chunked, liger, reference, got 'fused'"),
        ({"implementation": "liger", "reduction": "none"}, "liger takes no token_weights and no reduction 'none'"),
        ({"implementation": "liger", "token_weights": torch.ones(5)}, "liger takes no token_weights"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    given = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), "targets": torch.arange(5)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(given | changes))


def test_liger_is_refused_where_it_cannot_run_and_never_replaced(monkeypatch):
    hidden, weight, targets, _, _ = loss_inputs()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="implementation liger needs a GPU, but hidden is on cpu: use chunked"):
        linear_cross_entropy(hidden, weight, targets, implementation="liger")
    if importlib.util.find_spec("liger_kernel") is None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(ValueError, match="implementation liger needs the package liger-kernel"):
            linear_cross_entropy(hidden, weight, targets, implementation="liger")


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, DEVICE), pytest.param(torch.bfloat16, "cuda", marks=ON_GPU)]
)
def test_liger_gives_the_same(device, reduction, dtype):
    hidden, weight, targets, loss_mask, _ = loss_inputs(67, 32, 301, dtype, device)
    results = []
    for implementation in ("liger", "chunked"):
        loss = linear_cross_entropy(
            hidden, weight, targets, loss_mask=loss_mask, reduction=reduction, implementation=implementation
        )
        results.append(with_gradients(loss, hidden, weight))
    tolerance = 8 * torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
