"""What libraries with cumulative sequence lengths are told of a plan: exactly the plan, or nothing."""

import gc
from itertools import product

import pytest
import torch
from attention_plans import PLANS, random_blocks
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ropewalk.kernels.attention import (
    AttentionPlan,
    anchor,
    block_lists,
    causal,
    document,
    shared_prefix,
    sliding_window,
)
from ropewalk.kernels.attention.libraries import documents
from ropewalk.kernels.attention.libraries.documents import documents_of

BATCH = st.integers(1, 3)


def described(found, plan):
    """The dense mask [B, L, S] that the documents stand for, one query at a time."""
    q_edges, k_edges = found.q_edges.tolist(), found.k_edges.tolist()
    assert (q_edges[0], q_edges[-1]) == (0, plan.batch * plan.q_tokens)
    assert (k_edges[0], k_edges[-1]) == (0, plan.batch * plan.k_tokens)
    mask = torch.zeros(q_edges[-1], k_edges[-1], dtype=torch.bool)
    for n in range(len(q_edges) - 1):
        num_queries, num_keys = q_edges[n + 1] - q_edges[n], k_edges[n + 1] - k_edges[n]
        assert 0 < num_queries <= found.longest_q and 0 < num_keys <= found.longest_k
        for query in range(num_queries):
            last = query + num_keys - num_queries
            first = 0 if found.window_tokens is None else max(0, last - found.window_tokens + 1)
            mask[q_edges[n] + query, k_edges[n] + first : k_edges[n] + last + 1] = True
    rows = mask.view(plan.batch, plan.q_tokens, plan.batch, plan.k_tokens)
    own = torch.eye(plan.batch, dtype=torch.bool)[:, None, :, None]
    assert not (rows & ~own).any(), "a query sees a key of another row"
    return (rows & own).any(dim=2)


def is_exact(plan):
    """Whether the plan is recognised; fails if what was recognised is another plan."""
    try:
        found = documents_of(plan, "flash_attn")
    except ValueError as error:
        assert str(error).startswith("implementation flash_attn cannot express ") and str(error).endswith(": use auto")
        return False
    assert torch.equal(described(found, plan), plan.visible()[:, 0])
    assert found.longest_q == int(found.q_edges.diff().max()) and found.longest_k == int(found.k_edges.diff().max())
    return True


@st.composite
def document_starts(draw, row_tokens):
    rows = [draw(st.sets(st.integers(1, max(1, row_tokens - 1)), max_size=6)) for _ in range(draw(BATCH))]
    return [[0, *sorted(start for start in row if start < row_tokens)] for row in rows]


@st.composite
def packed_rows(draw):
    row_tokens = draw(st.integers(1, 24))
    return draw(document_starts(row_tokens)), row_tokens


@given(packed_rows(), st.integers(1, 30))
@example(([[0, 1, 2], [0]], 3), 1)
@example(([[0, 3]], 20), 5)
@settings(max_examples=150, deadline=None)
def test_documents_and_windows_are_always_recognised(rows, window_tokens):
    starts, row_tokens = rows
    assert is_exact(document(starts, row_tokens))
    assert is_exact(sliding_window(starts, row_tokens, window_tokens=window_tokens))
    assert is_exact(shared_prefix([[[start] for start in row] for row in starts], row_tokens))


@given(BATCH, st.integers(1, 12), st.integers(0, 12))
@settings(max_examples=50, deadline=None)
def test_causal_is_always_recognised_with_a_cache_too(batch, q_tokens, cached_tokens):
    plan = causal(batch, q_tokens, q_tokens + cached_tokens)
    assert is_exact(plan)
    found = documents_of(plan, "flash_attn")
    assert len(found.q_edges) == batch + 1 and found.window_tokens is None


@st.composite
def any_plans(draw):
    """Small integers: many of these are documents by chance, with caches, in two halves, or nearly."""
    batch, q_tokens, k_tokens = draw(BATCH), draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def intervals(low, high):
        values = draw(st.lists(st.integers(low, high), min_size=batch * q_tokens, max_size=batch * q_tokens))
        return torch.tensor(values, dtype=torch.int32).view(batch, 1, q_tokens)

    lo, hi = intervals(0, k_tokens), intervals(-1, k_tokens - 1)
    return AttentionPlan(lo, hi, intervals(0, k_tokens), intervals(0, k_tokens), k_tokens)


@given(any_plans())
@settings(max_examples=400, deadline=None)
def test_any_other_plan_is_exact_or_refused(plan):
    is_exact(plan)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_recognised_plan_with_one_bound_moved_is_exact_or_refused(data):
    starts, row_tokens = data.draw(packed_rows())
    plan = sliding_window(starts, row_tokens, window_tokens=data.draw(st.integers(1, 8)))
    bounds = {name: getattr(plan, name).clone() for name in ("lo", "hi", "glo", "ghi")}
    moved = bounds[data.draw(st.sampled_from(list(bounds)))]
    place = data.draw(st.integers(0, moved.numel() - 1))
    moved.view(-1)[place] = data.draw(st.integers(0, row_tokens - 1))
    is_exact(AttentionPlan(**bounds, k_tokens=row_tokens))


def test_of_all_small_plans_those_that_are_documents_are_recognised_and_no_other():
    intervals = [(0, -1), *((lo, hi) for lo in range(4) for hi in range(lo, 4))]
    possible = {mask for window in (None, 1, 2, 3) for mask in all_masks(3, 4, window)}
    found = set()
    for chosen in product(intervals, repeat=3):
        lo, hi = (torch.tensor(bounds, dtype=torch.int32).view(1, 1, 3) for bounds in zip(*chosen, strict=True))
        zeros = torch.zeros_like(lo)
        plan = AttentionPlan(lo, hi, zeros, zeros, 4)
        if is_exact(plan):
            found.add(chosen)
    assert found == possible and len(found) > 10


def test_one_query_is_a_document_if_it_sees_one_run_of_keys_up_to_the_last():
    num_found = 0
    for bounds in product(range(5), range(-1, 4), range(5), range(5)):
        lo, hi, glo, ghi = (torch.tensor(bound, dtype=torch.int32).view(1, 1, 1) for bound in bounds)
        plan = AttentionPlan(lo, hi, glo, ghi, 4)
        sees = plan.visible().flatten().tolist()
        is_run = sees[-1] and sees == sorted(sees)
        assert is_exact(plan) == is_run, bounds
        num_found += is_run
    assert num_found > 10


def all_masks(num_queries, num_keys, window):
    """The (lo, hi) of every query, for every way to cut queries and keys into documents."""
    if num_queries == 0:
        return [()] if num_keys == 0 else []
    masks = []
    for m in range(1, num_queries + 1):
        for n in range(m, num_keys + 1):
            begin = num_keys - n
            lasts = range(begin + n - m, num_keys)
            own = tuple((begin if window is None else max(begin, last - window + 1), last) for last in lasts)
            masks += [(*before, *own) for before in all_masks(num_queries - m, begin, window)]
    return masks


@pytest.mark.parametrize("seed", range(20))
def test_documents_with_caches_of_their_own_are_recognised(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, keys = [torch.randint(1, 5, (2, 4), generator=generator) for _ in range(2)]
    keys = keys + queries
    queries[:, 0], keys[:, 0] = 20 - queries[:, 1:].sum(dim=1), 40 - keys[:, 1:].sum(dim=1)
    lo, hi = torch.zeros(2, 1, 20, dtype=torch.int32), torch.zeros(2, 1, 20, dtype=torch.int32)
    window = int(torch.randint(2, 12, (1,), generator=generator))
    for row in range(2):
        q, k = 0, 0
        for m, n in zip(queries[row].tolist(), keys[row].tolist(), strict=True):
            last = torch.arange(k + n - m, k + n)
            hi[row, 0, q : q + m] = last
            lo[row, 0, q : q + m] = (last - window + 1).clamp(min=k)
            q, k = q + m, k + n
    zeros = torch.zeros_like(lo)
    assert is_exact(AttentionPlan(lo, hi, zeros, zeros, 40))


def test_the_shared_interval_may_hold_what_the_own_one_does_not_reach():
    assert is_exact(anchor([[0, 1]], 9))
    plan = causal(1, 5)
    assert is_exact(AttentionPlan(plan.lo, plan.lo - 1, plan.lo, plan.hi + 1, 5))


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (PLANS["shifted groups"], "2 plan heads"),
        (block_lists(random_blocks(2, 1, 64, 0), [[0], [0]], 64), "block lists"),
        (PLANS["anchor"], r"a shared interval apart from the own one \(an anchor, sinks, a prompt\)"),
        (PLANS["window with sinks"], "a shared interval apart"),
        (PLANS["shared prefix"], "a shared interval apart"),
    ],
)
def test_what_no_document_can_be_is_named(plan, what):
    with pytest.raises(ValueError, match=f"^implementation varlen cannot express {what}.*: use auto$"):
        documents_of(plan, "varlen")


@pytest.mark.parametrize(
    ("lo", "hi", "what"),
    [
        ([0, 0, 0], [0, 1, 1], "keys behind those that the last query sees"),
        ([0, 0, 0], [2, 2, 2], "intervals that do not end one key later from query to query"),
        ([0, 2, 1], [0, 1, 2], "queries that see nothing"),
        ([0, 1, 0], [0, 1, 2], "intervals that reach into the document before"),
        ([0, 1, 1], [0, 1, 2], None),
        ([1, 1, 1], [1, 2, 3], "intervals that follow neither documents nor one window"),
    ],
)
def test_intervals_of_no_document_are_named(lo, hi, what):
    lo, hi = (torch.tensor(values, dtype=torch.int32).view(1, 1, 3) for values in (lo, hi))
    plan = AttentionPlan(lo, hi, torch.zeros_like(lo), torch.zeros_like(lo), max(3, int(hi.max()) + 1))
    if what is None:
        assert is_exact(plan)
        return
    with pytest.raises(ValueError, match=f"cannot express {what}: use auto"):
        documents_of(plan, "varlen")


def test_a_plan_is_recognised_once_and_forgotten_with_it(monkeypatch):
    taken = []
    original = documents._recognise
    monkeypatch.setattr(documents, "_recognise", lambda *args: (taken.append(1), original(*args))[1])
    plan, other = causal(1, 7), causal(1, 7)
    assert documents_of(plan, "varlen") is documents_of(plan, "flash_attn")
    assert documents_of(other, "varlen") is not documents_of(plan, "varlen")
    assert len(taken) == 2
    num_known = len(documents._RECOGNISED)
    del plan, other
    gc.collect()
    assert len(documents._RECOGNISED) == num_known - 2
