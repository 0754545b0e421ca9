"""What every estimator owes: causal lists with the own block, documents, determinism, memory, attention end to end."""

from importlib import import_module

import pytest
import torch
from estimator_inputs import EDGE, LAYOUTS, any_in_block, inputs, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ropewalk.kernels.attention import BlockLists, block_lists, sparse_attention
from ropewalk.kernels.attention.estimators import (
    SeerGate,
    block_maximum,
    flexprefill,
    moba,
    seer_lists,
    share_in_groups,
    vertical_slash,
    xattention,
)

torch.manual_seed(0)
GATE = SeerGate(4, 2, 8, block_tokens=EDGE)


def seer(q, k, starts, **options):
    with torch.no_grad():
        gates = GATE.to(q.dtype)(q, k, starts)
    return seer_lists(gates, starts, q.shape[2], **options)


SPARSE = {
    "vertical_slash": (vertical_slash, {"num_verticals": 3, "num_slashes": 4, "num_first": 1, "num_local": 2}),
    "flexprefill": (flexprefill, {"gamma": 0.6, "tau": 0.3, "min_budget_tokens": 16}),
    "xattention": (xattention, {"stride": 4, "threshold": 0.6}),
    "moba": (moba, {"chunk_tokens": 32, "top_k": 2}),
    "seer": (seer, {"top_k": 2}),
}
EVERYTHING = {
    "vertical_slash": (vertical_slash, {"num_verticals": 10**6, "num_slashes": 10**6}),
    "verticals alone": (vertical_slash, {"num_verticals": 10**6, "num_slashes": 0}),
    "slashes alone": (vertical_slash, {"num_verticals": 0, "num_slashes": 10**6}),
    "flexprefill": (flexprefill, {"gamma": 1.0}),
    "flexprefill by budget": (flexprefill, {"gamma": 0.1, "min_budget_tokens": 10**6}),
    "xattention": (xattention, {"threshold": 1.0}),
    "moba": (moba, {"chunk_tokens": 16, "top_k": 10**6}),
    "seer by top k": (seer, {"top_k": 10**6}),
    "seer by threshold": (seer, {"threshold": 0.0}),
}
CHOICE_OF_THE_PAST = ("xattention", "moba", "seer")


def lists(name, q, k, starts):
    method, options = SPARSE[name]
    return method(q, k, starts, **options, block_tokens=EDGE)


@st.composite
def packed_rows(draw):
    row_tokens = draw(st.integers(1, 150))
    rows = st.sets(st.integers(0, row_tokens - 1), max_size=4).map(lambda starts: sorted(starts | {0}))
    return draw(st.lists(rows, min_size=1, max_size=2)), row_tokens


@pytest.mark.parametrize("name", SPARSE)
@given(packed=packed_rows(), seed=st.integers(0, 1000), magnitude=st.sampled_from([0.0, 1.0, 30.0]))
@settings(max_examples=15, deadline=None)
def test_lists_hold_the_own_block_and_nothing_of_the_future_or_other_documents(name, packed, seed, magnitude):
    starts, row_tokens = packed
    q, k = inputs(starts, row_tokens, seed, magnitude=magnitude, dtype=torch.float32)
    found = lists(name, q, k, starts)
    num_blocks = -(-row_tokens // EDGE)
    block_map = found.to_map(num_blocks)
    assert block_map.shape == (len(starts), 4, num_blocks, num_blocks)
    assert bool(block_map.diagonal(dim1=2, dim2=3).all())
    assert not bool((block_map & ~any_in_block(visible(starts, row_tokens)).unsqueeze(1)).any())
    again = lists(name, q, k, starts)
    assert torch.equal(found.offsets, again.offsets) and torch.equal(found.keys, again.keys)


@pytest.mark.parametrize("name", CHOICE_OF_THE_PAST)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_what_comes_after_a_block_does_not_change_its_list(name, seed, cut):
    starts = [[0, 37]]
    q, k = inputs(starts, 150, seed)
    other_q, other_k = inputs(starts, 150, seed + 1)
    q_, k_ = (torch.cat([x[:, :, : cut * EDGE], y[:, :, cut * EDGE :]], dim=2) for x, y in ((q, other_q), (k, other_k)))
    before, after = (lists(name, *pair, starts).to_map(10)[:, :, :cut] for pair in ((q, k), (q_, k_)))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["vertical_slash", "flexprefill", "xattention", "moba"])
def test_a_document_is_estimated_without_its_neighbours(name):
    starts = [[0, 37, 90]]
    q, k = inputs(starts, 150)
    changed_q, changed_k = q.clone(), k.clone()
    for x in (changed_q, changed_k):
        x[:, :, :37] *= -3
        x[:, :, 90:] *= -3
    before, after = (lists(name, *pair, starts).to_map(10) for pair in ((q, k), (changed_q, changed_k)))
    # Blocks 3 and 4 hold tokens of the second document alone.
    assert torch.equal(before[:, :, 3:5], after[:, :, 3:5])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", EVERYTHING)
def test_with_a_budget_for_everything_attention_is_dense(name, layout):
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens)
    method, options = EVERYTHING[name]
    plan = block_lists(method(q, k, starts, **options, block_tokens=EDGE), starts, row_tokens)
    assert torch.equal(plan.visible(), visible(starts, row_tokens).unsqueeze(1).expand(-1, 4, -1, -1))


@pytest.mark.parametrize("name", SPARSE)
def test_attention_over_the_lists_equals_the_reference(name):
    starts, row_tokens = [[0, 23, 251], [0]], 300
    q, k = inputs(starts, row_tokens)
    v = torch.randn(k.shape, dtype=k.dtype, generator=torch.Generator().manual_seed(7))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found = lists(name, q, k, starts)
    for chosen in (found, share_in_groups(found, 2, 19)):
        plan = block_lists(chosen, starts, row_tokens)
        assert plan.density() < 0.85 * plan_of_everything(starts, row_tokens).density()
        results = {}
        for implementation in ("tiled", "reference"):
            out, lse = sparse_attention(q, k, v, plan, implementation=implementation)
            results[implementation] = (out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))
        for fast, exact in zip(results["tiled"], results["reference"], strict=True):
            torch.testing.assert_close(fast, exact)


def plan_of_everything(starts, row_tokens):
    num_blocks = -(-row_tokens // EDGE)
    every = torch.ones(len(starts), 1, num_blocks, num_blocks, dtype=torch.bool)
    return block_lists(BlockLists.from_map(every, EDGE), starts, row_tokens)


def test_groups_share_the_union_of_their_heads_lists():
    q, k = inputs([[0]], 150)
    found = moba(q, k, [[0]], chunk_tokens=16, top_k=2, block_tokens=EDGE)
    heads, groups = found.to_map(10), share_in_groups(found, 2, 10).to_map(10)
    assert torch.equal(groups[:, 0], heads[:, 0] | heads[:, 1]) and torch.equal(groups[:, 1], heads[:, 2] | heads[:, 3])
    with pytest.raises(ValueError, match="plan_heads must divide the 4 of the lists, got 3"):
        share_in_groups(found, 3, 10)


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", [*SPARSE, "block_maximum"])
def test_no_tensor_is_quadratic_in_tokens(name, monkeypatch):
    for module in ("xattention", "seer"):
        monkeypatch.setattr(import_module(f"ropewalk.kernels.attention.estimators.{module}"), "MOST_SCORES", 2**18)
    starts, row_tokens = [[0, 100]], 4096
    q, k = inputs(starts, row_tokens, dtype=torch.float32)
    with Largest() as largest:
        if name == "block_maximum":
            block_maximum(q, k, starts, block_tokens=64)
        elif name == "seer":
            gate = SeerGate(4, 2, 8, block_tokens=64)
            with torch.no_grad():
                seer_lists(gate(q, k, starts), starts, row_tokens, block_tokens=64, top_k=4)
        else:
            method, options = SPARSE[name]
            method(q, k, starts, **{**options, **({"chunk_tokens": 128} if name == "moba" else {})}, block_tokens=64)
    # 64 queries of the two heads of a group over the row, twice; a sixteenth of all pairs of one head.
    assert 0 < largest.num_elements <= 2 * 2 * 64 * row_tokens


@pytest.mark.parametrize("name", ["vertical_slash", "flexprefill", "xattention", "moba"])
def test_shapes_and_blocks_that_do_not_fit_are_refused(name):
    method, options = SPARSE[name]
    q, k = inputs([[0]], 40)
    with pytest.raises(ValueError, match=r"k the same but for heads, got q \[1, 4, 40, 8\] and k \[1, 2, 39, 8\]"):
        method(q, k[:, :, 1:], [[0]], **options, block_tokens=EDGE)
    with pytest.raises(ValueError, match="one list for each row, got 2"):
        method(q, k, [[0], [0]], **options, block_tokens=EDGE)
    with pytest.raises(ValueError, match="row 0: document starts must increase"):
        method(q, k, [[1]], **options, block_tokens=EDGE)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        method(q[:, :3], k, [[0]], **options, block_tokens=EDGE)
