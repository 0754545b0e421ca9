"""Splitting the visible keys between plans and merging the results is the same as one plan."""

import pytest
import torch
from numerics import attention_inputs

from ropewalk.kernels.attention import (
    AttentionPlan,
    anchor,
    causal,
    document,
    merge_branches,
    sparse_attention,
    sparse_attention_bwd,
)


def split(plan):
    """Two plans with disjoint keys: the shared interval left of the own one, and the own one."""
    nothing = torch.zeros_like(plan.lo)
    own = AttentionPlan(plan.lo, plan.hi, nothing, nothing, plan.k_tokens)
    shared = AttentionPlan(nothing + 1, nothing, plan.glo, torch.minimum(plan.ghi, plan.lo), plan.k_tokens)
    return own, shared


ANCHORED = anchor([[0, 1, 8, 13], [0, 1, 2, 19]], 20)


@pytest.mark.parametrize("implementation", ["segmented", "reference"])
def test_merged_branches_and_their_autograd_equal_the_whole(implementation):
    q, k, v, dout = attention_inputs(ANCHORED, num_heads=4, num_kv_heads=2)
    # Branch two is empty at the anchor itself: its rows there are out 0, lse -inf.
    branches = [sparse_attention(q, k, v, branch, implementation=implementation) for branch in split(ANCHORED)]
    assert (branches[1][1] == -torch.inf).any()
    merged = merge_branches(branches)
    whole = sparse_attention(q, k, v, ANCHORED, implementation="reference")
    torch.testing.assert_close(merged, whole)

    def grads(out, lse):
        return torch.autograd.grad((out * dout).sum() + (lse * dout[..., 1]).sum(), (q, k, v))

    torch.testing.assert_close(grads(*merged), grads(*whole))


@pytest.mark.parametrize("implementation", ["segmented", "reference"])
def test_backward_of_each_branch_with_merged_results_sums_to_the_wholes(implementation):
    q, k, v, dout = attention_inputs(ANCHORED, num_heads=4, num_kv_heads=2)
    out, lse = sparse_attention(q, k, v, ANCHORED, implementation="reference")
    expected = torch.autograd.grad(out, (q, k, v), dout)
    with torch.no_grad():
        branches = split(ANCHORED)
        out, lse = merge_branches([sparse_attention(q, k, v, branch) for branch in branches])
        shares = [
            sparse_attention_bwd(dout, q, k, v, out, lse, branch, implementation=implementation) for branch in branches
        ]
    total = tuple(sum(share) for share in zip(*shares, strict=True))
    torch.testing.assert_close(total, expected)


def test_queries_that_no_branch_sees_stay_empty_without_nan():
    nothing = AttentionPlan(*(torch.full((1, 1, 4), edge, dtype=torch.int32) for edge in (1, 0, 0, 0)), k_tokens=4)
    q, k, v, dout = attention_inputs(nothing)
    out, lse = merge_branches([sparse_attention(q, k, v, nothing) for _ in range(2)])
    assert out.count_nonzero() == 0
    assert (lse == -torch.inf).all()
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(out, (q, k, v), dout))


def test_half_precision_branches_are_merged_in_fp32():
    out = torch.tensor([[[[1.0]]]], dtype=torch.bfloat16)
    # The second branch weighs exp(-6) = 0.0025: adding in bfloat16 would lose it in the lse.
    merged, lse = merge_branches([(out, torch.tensor([[[8.0]]])), (out, torch.tensor([[[2.0]]]))])
    assert merged.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert lse.item() == pytest.approx(8.0024757, abs=1e-6)


def test_merging_refuses_nothing_and_unequal_shapes():
    with pytest.raises(ValueError, match="at least one"):
        merge_branches([])
    long, short = (sparse_attention(*attention_inputs(plan)[:3], plan) for plan in (causal(1, 4), document([[0]], 3)))
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 8\].*\[1, 2, 3, 8\]"):
        merge_branches([long, short])
