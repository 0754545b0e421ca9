"""SeerAttention: a small learned gate scores pairs of blocks, distilled from the model's own attention.

Gao et al., "SeerAttention" (arXiv:2410.13276, section 3); microsoft/SeerAttention:
seer_attn/prefill_sparse/attn_gate.py (`AttnGate`, form Qavg_Kmaxminavg), seer_attn/kernels/attn_pooling_kernel_2d.py
(ground truth), and seer_attn/prefill_sparse/llama/modeling_llama_seerattn.py (loss).

To train: freeze the model, and for each layer add `distillation_loss(gate(q, k, starts), block_maximum(q_rotated,
k_rotated, starts))`. To use: `seer_lists(gate(q, k, starts), starts, row_tokens, ...)`.

Shape legend: B batch, H query heads, G key/value heads, L tokens of a row, N blocks of a row, D head dim, E gate dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..patterns import DocumentStarts, document
from ..plan import BlockLists
from .grid import BlockGrid, block_mean, check_at_least, check_fraction, grid_of, largest, scale_of, scores

INITIAL_DEVIATION = 0.02
MOST_SCORES = 2**24
"""Attention scores that the ground truth holds at a time."""


class SeerGate(nn.Module):
    """Scores every pair of blocks from q and k before rotary embedding.

    A block's queries are pooled to their mean, its keys to their largest, smallest and mean values side by side; one
    linear map for each head takes both to `gate_dim`; they are rotated as the first position of their block; the
    score is their product over sqrt(gate_dim). With `gate_dim` None it is `head_dim`, which must then be even.

    The published module has no map for queries where gate_dim is head_dim, unless told to; here both have one. Blocks
    that two packed documents share are pooled as one. Raises ValueError for sizes that make no sense.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        gate_dim: int | None = None,
        block_tokens: int = 64,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        gate_dim = head_dim if gate_dim is None else gate_dim
        check_at_least(num_heads=(num_heads, 1), num_kv_heads=(num_kv_heads, 1), gate_dim=(gate_dim, 2))
        if num_heads % num_kv_heads or gate_dim % 2:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, and gate_dim even, got {num_heads}, {num_kv_heads} and "
                f"{gate_dim}"
            )
        self.block_tokens = block_tokens
        self.rope_base = rope_base
        self.query_weight = nn.Parameter(torch.empty(num_heads, head_dim, gate_dim))
        self.key_weight = nn.Parameter(torch.empty(num_kv_heads, 3 * head_dim, gate_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02, as the published models are initialised."""
        nn.init.normal_(self.query_weight, std=INITIAL_DEVIATION)
        nn.init.normal_(self.key_weight, std=INITIAL_DEVIATION)

    def forward(self, q: Tensor, k: Tensor, document_starts: DocumentStarts) -> Tensor:
        """Scores [B, H, N, N] in fp32 or better, -inf for pairs that no query and key of one document make.

        q is [B, H, L, D] and k [B, G, L, D], both before rotary embedding. Raises ValueError where they do not fit.
        """
        grid = grid_of(q, k, document_starts, self.block_tokens)
        for name, found, weight in (("q", q, self.query_weight), ("k", k, self.key_weight)):
            expected = (weight.shape[0], weight.shape[1] // (3 if name == "k" else 1))
            if (found.shape[1], found.shape[3]) != expected:
                raise ValueError(f"{name} must have {expected[0]} heads of {expected[1]}, got {list(found.shape)}")
        edge = self.block_tokens
        highest, lowest = _block_max(k, edge), -_block_max(-k, edge)
        pooled = {"q": _block_mean(q, edge), "k": torch.cat([highest, lowest, _block_mean(k, edge)], dim=-1)}
        weights = {"q": self.query_weight, "k": self.key_weight}
        mapped = {
            name: torch.einsum("bhnc,hce->bhne", pooled[name], weights[name].to(pooled[name].dtype)) for name in "qk"
        }
        rotated = {name: _rotate(mapped[name], edge, self.rope_base) for name in "qk"}
        gates = [scores(rotated["q"][row], rotated["k"][row]) for row in range(len(q))]
        return (torch.stack(gates) * scale_of(rotated["q"], None)).masked_fill(~grid.reachable, -torch.inf)


@torch.no_grad()
def seer_lists(
    gate_scores: Tensor,
    document_starts: DocumentStarts,
    row_tokens: int,
    *,
    block_tokens: int,
    top_k: int | None = None,
    threshold: float | None = None,
) -> BlockLists:
    """Lists from the gate's scores [B, H, N, N]: the `top_k` largest of a block of queries, or those above a threshold.

    The threshold is a probability: that of the softmax over a block's keys (published default 0.002). The own block is
    listed besides, which the published code leaves to the gate. H plan heads. The published top-k is given as a share
    of all blocks; here as a number.

    Raises ValueError unless exactly one of `top_k` (1 or more) and `threshold` (in [0, 1]) is given, and for scores
    that do not fit the rows.
    """
    if (top_k is None) == (threshold is None):
        raise ValueError(f"seer_lists needs top_k or threshold, one of them, got {top_k=}, {threshold=}")
    grid = BlockGrid.of(document_starts, row_tokens, block_tokens, gate_scores.device)
    expected = [len(document_starts), grid.num_blocks, grid.num_blocks]
    if gate_scores.dim() != 4 or [gate_scores.shape[0], *gate_scores.shape[2:]] != expected:
        raise ValueError(
            f"gate_scores must be [batch, heads, blocks, blocks] with batch and blocks {expected}, "
            f"got {list(gate_scores.shape)}"
        )
    masked = gate_scores.masked_fill(~grid.reachable, -torch.inf)
    if threshold is not None:
        check_fraction(threshold=threshold)
        return grid.lists(masked.softmax(dim=-1) > threshold)
    assert top_k is not None
    check_at_least(top_k=(top_k, 1))
    return grid.lists(largest(masked, top_k))


@torch.no_grad()
def block_maximum(
    q: Tensor, k: Tensor, document_starts: DocumentStarts, *, block_tokens: int = 64, scale: float | None = None
) -> Tensor:
    """The gate's ground truth [B, H, N, N]: the largest probability of each pair of blocks, rows summing to 1.

    q is [B, H, L, D] and k [B, G, L, D] as attention takes them, after rotary embedding. One block of queries at a time
    meets keys chunk by chunk; kept are each query's largest score in every block and its running log-sum-exp, so memory
    is that of a block of queries by N, and the result. Worked in fp32 or better (published: bf16).

    Raises ValueError for shapes or documents that do not fit.
    """
    grid = grid_of(q, k, document_starts, block_tokens)
    starts = document(document_starts, q.shape[2]).lo[:, 0].to(q.device)
    truth = grid.zeros(q.shape[1], torch.promote_types(q.dtype, torch.float32))
    first_blocks = grid.first[:, 0].int().argmax(dim=-1).tolist()
    for row in range(len(q)):
        for block in range(grid.num_blocks):
            first = first_blocks[row][block]
            truth[row, :, block, first : block + 1] = _maxima_of_block(
                q[row], k[row], starts[row], block, first, block_tokens, scale_of(q, scale)
            )
    return truth / truth.sum(dim=-1, keepdim=True)


def distillation_loss(gate_scores: Tensor, ground_truth: Tensor) -> Tensor:
    """KL(ground truth || softmax of the gate's scores), the mean over blocks of queries; a scalar.

    Both are [B, H, N, N]. The first quarter of the blocks of queries is left out, as published, for stability. The
    published loss averages over all elements of the map, and so is N times smaller.

    Raises ValueError if the shapes differ.
    """
    if gate_scores.shape != ground_truth.shape:
        raise ValueError(
            f"gate_scores and ground_truth must have one shape, got {list(gate_scores.shape)} and "
            f"{list(ground_truth.shape)}"
        )
    kept = slice(gate_scores.shape[2] // 4, None)
    right = ground_truth[:, :, kept]
    found = gate_scores[:, :, kept].log_softmax(dim=-1)
    # 0 times -inf: what is not reachable has no part in the sum.
    found = found.masked_fill(found == -torch.inf, 0.0)
    return (torch.xlogy(right, right) - right * found).sum(dim=-1).mean()


def _maxima_of_block(
    q: Tensor, k: Tensor, starts: Tensor, block: int, first: int, block_tokens: int, scale: float
) -> Tensor:
    """[H, block + 1 - first]: largest probabilities of a block of queries, of q [H, L, D] and k [G, L, D]."""
    stop = min((block + 1) * block_tokens, q.shape[1])
    queries = slice(block * block_tokens, stop)
    query = torch.arange(queries.start, stop, device=q.device)[:, None]
    chunk = block_tokens * max(1, MOST_SCORES // (q.shape[0] * block_tokens * block_tokens))
    maxima, lses = [], []
    for begin in range(first * block_tokens, stop, chunk):
        key = torch.arange(begin, min(begin + chunk, stop), device=q.device)
        found = scores(q[:, queries], k[:, begin : begin + len(key)]) * scale
        found = found.masked_fill((key > query) | (key < starts[queries, None]), -torch.inf)
        lses.append(found.logsumexp(dim=-1))
        padded = torch.nn.functional.pad(found, (0, -len(key) % block_tokens), value=-torch.inf)
        maxima.append(padded.unflatten(-1, (-1, block_tokens)).amax(dim=-1))
    lse = torch.stack(lses).logsumexp(dim=0)
    return (torch.cat(maxima, dim=-1) - lse.unsqueeze(-1)).exp().amax(dim=1)


def _block_mean(x: Tensor, block_tokens: int) -> Tensor:
    """[B, heads, N, D] of x [B, heads, L, D]: means over blocks; the last one may be short."""
    return block_mean(x.flatten(0, 1), 0, block_tokens).unflatten(0, x.shape[:2])


def _block_max(x: Tensor, block_tokens: int) -> Tensor:
    """[B, heads, N, D] of x [B, heads, L, D]: largest values in blocks, in the dtype of `_block_mean`."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block_tokens), value=-torch.inf)
    return padded.unflatten(2, (-1, block_tokens)).amax(dim=3)


def _rotate(x: Tensor, block_tokens: int, base: float) -> Tensor:
    """Rotary embedding of x [B, heads, N, E] at the first position of each block, halves paired."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    positions = torch.arange(x.shape[2], device=x.device, dtype=torch.float64) * block_tokens
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
