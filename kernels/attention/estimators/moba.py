"""MoBA's lists: queries pick chunks of keys by their mean key, shared by each block of queries.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (arXiv:2502.13189, section 2.2);
MoonshotAI/MoBA: moba/moba_naive.py.

Shape legend: B batch, H query heads, G key/value heads, L tokens of a row, M tokens of a document, N blocks of a row
or a document, C chunks of a document, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import DocumentStarts
from ..plan import BlockLists
from .grid import Document, block_mean, check_at_least, grid_of, largest, scores


@torch.no_grad()
def moba(
    q: Tensor,
    k: Tensor,
    document_starts: DocumentStarts,
    *,
    chunk_tokens: int = 512,
    top_k: int = 3,
    block_tokens: int = 128,
) -> BlockLists:
    """Lists of the own chunk and the `top_k - 1` past ones with the largest gate, one for each query head.

    The gate of a query and a chunk is q times the chunk's mean key, in fp32. Only chunks that ended before the
    query's own began take part; the own one is seen causally. The choice passes no gradient.

    q is [B, H, L, D] and k [B, G, L, D]; the lists have H plan heads.

    Deviations: the paper lets every query choose for itself. Here a block of queries chooses as one, by the mean of its
    queries' gates, which is the gate of their mean: a tile of the kernel then visits what all its rows want, which the
    specification recommends for training. So a query's choice depends on later queries of its block. Chunks
    are counted from the row's start, and each document only sees its own keys in them; so the first chunk of a packed
    document may be a short one.

    Raises ValueError for shapes or documents that do not fit, `top_k` below 1, and chunks that are no multiple of the
    block.
    """
    check_at_least(top_k=(top_k, 1), chunk_tokens=(chunk_tokens, 1))
    if chunk_tokens % block_tokens:
        raise ValueError(f"chunk_tokens must be a multiple of block_tokens {block_tokens}, got {chunk_tokens}")
    grid = grid_of(q, k, document_starts, block_tokens)
    block_map = grid.zeros(q.shape[1], torch.bool)
    for document in grid.documents():
        document.area(block_map)[:] |= _choose(document.of(q), document.of(k), document, chunk_tokens, top_k)
    return grid.lists(block_map)


def _choose(q: Tensor, k: Tensor, document: Document, chunk_tokens: int, top_k: int) -> Tensor:
    """bool [H, N, N] of a document's q [H, M, D] and k [G, M, D]; not causal inside the own chunk."""
    block = torch.arange(document.blocks.start, document.blocks.stop, device=q.device)
    first_chunk = document.start // chunk_tokens
    chunk_of_block = block // (chunk_tokens // document.block_tokens) - first_chunk
    gates = scores(block_mean(q, document.start, document.block_tokens), block_mean(k, document.start, chunk_tokens))
    chunk = torch.arange(gates.shape[-1], device=q.device)
    own, past = chunk_of_block[:, None] == chunk, chunk < chunk_of_block[:, None]
    chosen = largest(gates.masked_fill(~past, -torch.inf), top_k - 1) & past
    return (chosen | own)[:, :, chunk_of_block]
