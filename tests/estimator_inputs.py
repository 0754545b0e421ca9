"""Shared by tests of estimators: inputs, layouts of documents, and dense attention written from its definition."""

import torch

EDGE = 16
LAYOUTS = {
    "one document": ([[0], [0]], 150),
    "whole blocks": ([[0, 64], [0]], 128),
    "packed anyhow": ([[0, 1, 23, 110], [0, 97, 98]], 150),
    "short rows": ([[0, 5], [0]], 11),
}


def inputs(starts, row_tokens, seed=0, num_heads=4, num_kv_heads=2, head_dim=8, magnitude=1.5, dtype=torch.float64):
    """(q, k) whose attention is spread unevenly."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(starts), num_heads, row_tokens, head_dim, generator=generator, dtype=torch.float64)
    k = torch.randn(len(starts), num_kv_heads, row_tokens, head_dim, generator=generator, dtype=torch.float64)
    return (magnitude * q).to(dtype), k.to(dtype)


def key_head(k, row, head, num_heads):
    """[L, D]: the key head that a query head reads."""
    return k[row, head * k.shape[1] // num_heads]


def documents(starts, row_tokens):
    """(row, start, stop) of every document."""
    return [
        (row, start, stop)
        for row, row_starts in enumerate(starts)
        for start, stop in zip(row_starts, [*row_starts[1:], row_tokens], strict=True)
    ]


def probabilities(q, k):
    """Causal softmax of q [M, D] and k [M, D] of one document, row by row."""
    found = torch.zeros(len(q), len(k), dtype=q.dtype)
    for i in range(len(q)):
        found[i, : i + 1] = torch.softmax(k[: i + 1] @ q[i] / q.shape[1] ** 0.5, dim=0)
    return found


def visible(starts, row_tokens):
    """bool [B, L, L] by the definition of packed documents."""
    found = torch.zeros(len(starts), row_tokens, row_tokens, dtype=torch.bool)
    for row, start, stop in documents(starts, row_tokens):
        for i in range(start, stop):
            found[row, i, start : i + 1] = True
    return found


def any_in_block(pairs, edge=EDGE):
    """bool [..., N, N] of token pairs [..., L, L]: any in the block."""
    padding = -pairs.shape[-1] % edge
    padded = torch.nn.functional.pad(pairs, (0, padding, 0, padding))
    return padded.unflatten(-1, (-1, edge)).any(dim=-1).unflatten(-2, (-1, edge)).any(dim=-2)


def block_of(position, edge=EDGE):
    """The number of a position's block."""
    return position // edge


def with_own(block_map):
    """The map with its diagonal."""
    return block_map | torch.eye(block_map.shape[-1], dtype=torch.bool)
