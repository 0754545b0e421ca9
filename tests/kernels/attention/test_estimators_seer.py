"""SeerAttention's gate, ground truth, loss and lists against loops and full attention."""

import pytest
import torch
from estimator_inputs import EDGE, LAYOUTS, any_in_block, documents, inputs, key_head, probabilities, visible

from ropewalk.kernels.attention.estimators import SeerGate, block_maximum, distillation_loss, seer, seer_lists


def gate_for(seed=0, gate_dim=6):
    torch.manual_seed(seed)
    return SeerGate(4, 2, 8, gate_dim=gate_dim, block_tokens=EDGE).double()


def rotated(vector, position, base=10000.0):
    half = len(vector) // 2
    pairs = torch.complex(vector[:half], vector[half:])
    angles = torch.tensor([position * base ** (-n / half) for n in range(half)], dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones(half, dtype=torch.float64), angles)
    return torch.cat([turned.real, turned.imag])


def scores_by_definition(gate, q, k, starts):
    batch, num_heads, row_tokens, _ = q.shape
    num_blocks = -(-row_tokens // EDGE)
    found = torch.full((batch, num_heads, num_blocks, num_blocks), -torch.inf, dtype=torch.float64)
    reachable = any_in_block(visible(starts, row_tokens))
    for row in range(batch):
        for head in range(num_heads):
            keys, weight = key_head(k, row, head, num_heads), gate.key_weight[head // 2]
            for n in range(num_blocks):
                pooled = q[row, head, n * EDGE : (n + 1) * EDGE].mean(dim=0)
                query = rotated(pooled @ gate.query_weight[head], n * EDGE)
                for c in range(num_blocks):
                    part = keys[c * EDGE : (c + 1) * EDGE]
                    pooled = torch.cat([part.max(dim=0).values, part.min(dim=0).values, part.mean(dim=0)])
                    if reachable[row, n, c]:
                        found[row, head, n, c] = query @ rotated(pooled @ weight, c * EDGE) / len(query) ** 0.5
    return found


def truth_by_definition(q, k, starts):
    num_heads, row_tokens = q.shape[1], q.shape[2]
    num_blocks = -(-row_tokens // EDGE)
    found = torch.zeros(len(q), num_heads, num_blocks, num_blocks, dtype=torch.float64)
    for row, start, stop in documents(starts, row_tokens):
        for head in range(num_heads):
            keys = key_head(k, row, head, num_heads)
            seen = torch.zeros(num_blocks * EDGE, num_blocks * EDGE, dtype=torch.float64)
            seen[start:stop, start:stop] = probabilities(q[row, head, start:stop], keys[start:stop])
            largest = seen.unflatten(0, (-1, EDGE)).amax(dim=1).unflatten(1, (-1, EDGE)).amax(dim=2)
            found[row, head] = torch.maximum(found[row, head], largest)
    return found / found.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_gate_pools_maps_and_rotates_blocks(layout):
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens)
    gate = gate_for()
    with torch.no_grad():
        torch.testing.assert_close(gate(q, k, starts), scores_by_definition(gate, q, k, starts))


@pytest.mark.parametrize("most_scores", [1, 2**24])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_ground_truth_is_the_block_maximum_of_full_attention(layout, most_scores, monkeypatch):
    monkeypatch.setattr(seer, "MOST_SCORES", most_scores)
    starts, row_tokens = layout
    q, k = inputs(starts, row_tokens)
    found = block_maximum(q, k, starts, block_tokens=EDGE)
    torch.testing.assert_close(found, truth_by_definition(q, k, starts))


def test_the_loss_is_the_divergence_of_the_rows_behind_the_first_quarter():
    starts, row_tokens = LAYOUTS["packed anyhow"]
    q, k = inputs(starts, row_tokens)
    gates, truth = gate_for()(q, k, starts).detach(), block_maximum(q, k, starts, block_tokens=EDGE)
    total, rows = 0.0, 0
    for right, found in zip(truth[:, :, 2:].reshape(-1, 10), gates[:, :, 2:].reshape(-1, 10), strict=True):
        seen = found > -torch.inf
        assert bool((right[~seen] == 0).all())
        ratio = right[seen] / torch.softmax(found[seen], dim=0)
        total, rows = total + float((right[seen] * ratio.clamp(min=1e-300).log()).sum()), rows + 1
    loss = distillation_loss(gates, truth)
    assert float(loss) == pytest.approx(total / rows)
    assert float(distillation_loss(truth.log(), truth)) == pytest.approx(0, abs=1e-12)


def test_training_the_gate_lowers_the_loss_and_gradients_are_finite():
    starts, row_tokens = LAYOUTS["packed anyhow"]
    q, k = inputs(starts, row_tokens)
    gate, truth = gate_for(gate_dim=8), block_maximum(q, k, starts, block_tokens=EDGE)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = distillation_loss(gate(q, k, starts), truth)
        loss.backward()
        assert all(bool(weight.grad.isfinite().all()) for weight in gate.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", [{"top_k": 2}, {"threshold": 0.15}])
def test_lists_are_the_largest_or_those_above_the_threshold(options):
    starts, row_tokens = LAYOUTS["packed anyhow"]
    gates = gate_for()(*inputs(starts, row_tokens), starts).detach() * 400
    found = seer_lists(gates, starts, row_tokens, block_tokens=EDGE, **options).to_map(10)
    for row in range(2):
        for head in range(4):
            for n in range(10):
                values = gates[row, head, n]
                seen = [c for c in range(10) if values[c] > -torch.inf]
                if "top_k" in options:
                    expected = set(sorted(seen, key=lambda c: -float(values[c]))[:2])
                else:
                    expected = {c for c in seen if float(values.softmax(dim=0)[c]) > 0.15}
                assert set(found[row, head, n].nonzero().flatten().tolist()) == expected | {n}


def test_bad_calls_are_refused():
    gate, (q, k) = gate_for(), inputs([[0]], 40)
    with pytest.raises(ValueError, match="k must have 2 heads of 8, got"):
        gate(q, k.repeat(1, 2, 1, 1), [[0]])
    with pytest.raises(ValueError, match="top_k or threshold, one of them"):
        seer_lists(gate(q, k, [[0]]), [[0]], 40, block_tokens=EDGE)
    with pytest.raises(ValueError, match=r"batch and blocks \[1, 2, 2\]"):
        seer_lists(gate(q, k, [[0]]), [[0]], 32, block_tokens=EDGE, top_k=1)
    with pytest.raises(ValueError, match="must have one shape"):
        distillation_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="gate_dim even"):
        SeerGate(4, 2, 8, gate_dim=5)
