"""Shared by tests of numerics: inputs, plans, and the error budget that fast implementations must keep.

The budget follows flash-attention's tests: against an exact fp64 result from the same (already rounded) inputs, a fast
implementation may err at most twice as much as plain torch does in the fast one's precision, plus a rounding floor.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ropewalk.kernels.attention import AttentionPlan

BUDGET_FACTOR = 2.0
FLOOR_ROUNDINGS = 8.0

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def assert_within_budget(name: str, fast: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Fail unless max|fast - exact| <= 2 max|plain - exact| + 8 roundings of max(1, largest exact value).

    The 1 stands for the inputs, which are of order one: gradients may cancel to exactly nothing.
    """
    assert fast.shape == exact.shape, f"{name}: shape {list(fast.shape)}, expected {list(exact.shape)}"
    assert fast.dtype == plain.dtype, f"{name}: {fast.dtype}, expected {plain.dtype}"
    roundoff = FLOOR_ROUNDINGS * torch.finfo(fast.dtype).eps
    fast, plain, exact = (tensor.detach().double().cpu() for tensor in (fast, plain, exact))
    assert torch.equal(fast.isinf(), exact.isinf()), f"{name}: infinities differ"
    finite = ~exact.isinf()
    if not finite.any():
        return
    fast, plain, exact = fast[finite], plain[finite], exact[finite]
    error = (fast - exact).abs().max()
    budget = BUDGET_FACTOR * (plain - exact).abs().max() + roundoff * exact.abs().max().clamp(min=1)
    # Written so that NaN, which compares false, fails.
    assert error <= budget, f"{name}: error {error:.3e} over the budget {budget:.3e}"


def attention_inputs(
    plan: AttentionPlan,
    *,
    num_heads: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    score_magnitude: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, dout) for a plan, drawn in fp64 and rounded to `dtype`; q, k and v require gradients.

    Scores have a standard deviation of `score_magnitude`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int, tokens: int, magnitude: float = 1.0) -> Tensor:
        values = torch.randn(plan.batch, heads, tokens, head_dim, generator=generator, dtype=torch.float64)
        return (magnitude * values).to(plan.device, dtype)

    q = draw(num_heads, plan.q_tokens, score_magnitude)
    k, v = draw(num_kv_heads, plan.k_tokens), draw(num_kv_heads, plan.k_tokens)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), draw(num_heads, plan.q_tokens)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of textbook masked attention in the dtype of q. Every query must see a key."""
    group = q.shape[1] // k.shape[1]
    k, v = torch.repeat_interleave(k, group, dim=1), torch.repeat_interleave(v, group, dim=1)
    scores = torch.einsum("bhld,bhsd->bhls", q, k) / q.shape[-1] ** 0.5
    visible = torch.repeat_interleave(visible, q.shape[1] // visible.shape[1], dim=1)
    scores = torch.where(visible, scores, -torch.inf)
    return torch.einsum("bhls,bhsd->bhld", torch.softmax(scores, dim=-1), v), torch.logsumexp(scores, dim=-1)


def random_plan(
    batch: int, q_tokens: int, k_tokens: int, seed: int, *, plan_heads: int = 1, has_empty_queries: bool = True
) -> AttentionPlan:
    """Unrelated intervals at every query: empty, overlapping, nested, beyond the diagonal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (batch, plan_heads, q_tokens), generator=generator, dtype=torch.int32)

    lo, hi = draw(0, k_tokens - 1), draw(-1, k_tokens - 1)
    if not has_empty_queries:
        hi = torch.maximum(lo, hi)
    return AttentionPlan(lo, hi, draw(0, k_tokens), draw(0, k_tokens), k_tokens)
