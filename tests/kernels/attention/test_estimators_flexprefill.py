"""FlexPrefill's lists against the algorithm in loops over full attention."""

import math

import pytest
import torch
from estimator_inputs import EDGE, LAYOUTS, any_in_block, block_of, documents, inputs, key_head, probabilities, with_own

from ropewalk.kernels.attention.estimators import flexprefill


def num_to_exceed(masses, share):
    total, count = 0.0, 0
    for mass in sorted(masses, reverse=True):
        total += mass
        count += 1
        if total > share:
            break
    return count


def root_divergence(p, q):
    total = 0.0
    for x, y in zip(p, q, strict=True):
        middle = (x + y) / 2
        total += 0.5 * (x * math.log(x / middle) if x > 0 else 0) + 0.5 * (y * math.log(y / middle) if y > 0 else 0)
    return math.sqrt(max(total, 0.0))


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def ranked(masses, count):
    return sorted(range(len(masses)), key=lambda place: (place != 0, -masses[place], place))[:count]


def choose(q, k, start, gamma, tau, least, most):
    """(pairs of blocks counted in the document, whether query-aware) for q and k [M, D] of one document."""
    length, root = len(q), q.shape[1] ** 0.5
    first_block = block_of(start)
    num_blocks = block_of(start + length - 1) - first_block + 1
    members = [[] for _ in range(num_blocks)]
    for j in range(length):
        members[block_of(start + j) - first_block].append(j)
    seen = probabilities(q, k)[-EDGE:]
    by_key = [float(seen[:, j].sum()) / EDGE for j in range(length)]
    by_distance = [0.0] * length
    for place in range(EDGE):
        i = length - EDGE + place
        for j in range(i + 1):
            by_distance[i - j] += float(seen[place, j]) / EDGE
    columns = [sum(by_key[j] for j in member) for member in members]
    diagonals = [sum(by_distance[n * EDGE : (n + 1) * EDGE]) for n in range(num_blocks)]
    mean_k = [k[member].mean(dim=0) for member in members]
    mean_q = [q[member].mean(dim=0) for member in members]
    estimate = softmax([float(q[-EDGE:].mean(dim=0) @ key) / root for key in mean_k])
    is_query_aware = root_divergence(estimate, columns) < tau
    budgets = [least if is_query_aware else num_to_exceed(x, gamma) // EDGE + 1 for x in (by_key, by_distance)]
    budgets = [min(max(budget, least), most) for budget in budgets]
    kept = {(n, c) for c in ranked(columns, budgets[0]) for n in range(c, num_blocks)}
    kept |= {(n, n - d) for d in ranked(diagonals, budgets[1]) for n in range(d, num_blocks)}
    if is_query_aware:
        masses = {}
        for n in range(num_blocks):
            row = softmax([float(mean_q[n] @ mean_k[c]) / root for c in range(n + 1)])
            masses |= {(n, c): mass for c, mass in enumerate(row)}
        total = 0.0
        for pair in sorted(masses, key=lambda pair: -masses[pair]):
            if total >= gamma * num_blocks:
                break
            total += masses[pair]
            kept.add(pair)
    return kept, is_query_aware


def by_definition(q, k, starts, gamma, tau, least, most):
    num_heads, row_tokens = q.shape[1], q.shape[2]
    num_blocks = -(-row_tokens // EDGE)
    block_map = torch.zeros(len(q), num_heads, num_blocks, num_blocks, dtype=torch.bool)
    kinds = set()
    for row, start, stop in documents(starts, row_tokens):
        for head in range(num_heads):
            if stop - start <= max(2, least) * EDGE:
                pairs = torch.zeros(row_tokens, row_tokens, dtype=torch.bool)
                pairs[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril() > 0
                block_map[row, head] |= any_in_block(pairs)
                continue
            keys = key_head(k, row, head, num_heads)[start:stop]
            kept, is_query_aware = choose(q[row, head, start:stop], keys, start, gamma, tau, least, most)
            kinds.add(is_query_aware)
            for n, c in kept:
                block_map[row, head, block_of(start) + n, block_of(start) + c] = True
    return with_own(block_map), kinds


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lists_follow_the_algorithm(layout, tau):
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens)
    found = flexprefill(q, k, starts, gamma=0.7, tau=tau, min_budget_tokens=1, block_tokens=EDGE)
    expected, _ = by_definition(q, k, starts, 0.7, tau, 1, 10**6)
    assert torch.equal(found.to_map(-(-row_tokens // EDGE)), expected)


def test_both_kinds_of_heads_occur_at_the_tau_tested():
    starts, row_tokens = LAYOUTS["packed anyhow"]
    q, k = inputs(starts, row_tokens)
    assert by_definition(q, k, starts, 0.7, 0.3, 1, 10**6)[1] == {True, False}


@pytest.mark.parametrize("budgets", [(40, None), (1, 32), (48, 48)])
def test_budgets_bound_the_columns_and_diagonals(budgets):
    starts, row_tokens = LAYOUTS["packed anyhow"]
    q, k = inputs(starts, row_tokens, magnitude=0.5)
    least, most = budgets
    found = flexprefill(
        q, k, starts, gamma=0.8, tau=0.1, min_budget_tokens=least, max_budget_tokens=most, block_tokens=EDGE
    )
    blocks = [10**6 if tokens is None else max(1, -(-tokens // EDGE)) for tokens in budgets]
    assert torch.equal(found.to_map(10), by_definition(q, k, starts, 0.8, 0.1, *blocks)[0])


def test_means_that_tell_the_truth_make_a_head_query_aware_and_find_its_block():
    # Blocks of equal tokens: the estimate is exact. Every block of queries from the third on wants that one alone.
    q, k = torch.zeros(1, 1, 160, 4), torch.zeros(1, 1, 160, 4)
    q[..., 0], k[:, :, 32:48, 0] = 10.0, 10.0
    found = flexprefill(q, k, [[0]], gamma=0.85, tau=0.1, min_budget_tokens=1, block_tokens=EDGE).to_map(10)[0, 0]
    expected = torch.eye(10, dtype=torch.bool)
    expected[:, 0], expected[2:, 2] = True, True
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.2}, "gamma must lie in"),
        ({"tau": -1.0}, "tau must be at least 0"),
        ({"max_budget_tokens": 100}, "max_budget_tokens must be at least 512"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    q, k = inputs([[0]], 20)
    with pytest.raises(ValueError, match=message):
        flexprefill(q, k, [[0]], **options)
