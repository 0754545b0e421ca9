"""XAttention's lists: the sum of a block's antidiagonals tells how much attention it holds.

Xu et al., "XAttention" (arXiv:2503.16428, section 2); mit-han-lab/x-attention: xattn/src/Xattention.py
(`xattn_estimate`, mode "inverse") and xattn/src/utils.py (`find_blocks_chunked`).

Shape legend: B batch, H query heads, G key/value heads, L tokens of a row, M tokens of a document, N blocks of a row
or a document, R strides of a document's blocks, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import DocumentStarts
from ..plan import BlockLists
from .grid import Document, check_fraction, covering, grid_of, scale_of, scores

MOST_SCORES = 2**24
"""Antidiagonal sums held at a time."""


@torch.no_grad()
def xattention(
    q: Tensor,
    k: Tensor,
    document_starts: DocumentStarts,
    *,
    stride: int = 8,
    threshold: float = 0.9,
    block_tokens: int = 128,
    scale: float | None = None,
) -> BlockLists:
    """Lists of the fewest blocks that hold a share `threshold` of the estimated attention, one for each query head.

    Queries and keys are taken in strides of `stride`. The scores on the antidiagonal between a stride of queries and
    one of keys (first query with last key, and so on) are averaged; a softmax over the strides up to the query's own
    gives a coarse attention map, which is added up by blocks. A block of queries keeps its own block, the first one
    of the document, and the largest others until `threshold` of its sum is reached. A threshold of 1 keeps everything.

    q is [B, H, L, D] and k [B, G, L, D]; the lists have H plan heads.

    As published, the softmax includes all of the query's own stride, and positions beyond the end count as zeros. On
    packed rows, which is ours, strides are counted from the row's start, and each document is estimated by itself, with
    zeros around it and a threshold of its own.

    Raises ValueError for shapes or documents that do not fit, a stride that does not divide the block, and a
    threshold outside [0, 1].
    """
    check_fraction(threshold=threshold)
    if stride < 1 or block_tokens % stride:
        raise ValueError(f"stride must divide block_tokens {block_tokens}, got {stride}")
    grid = grid_of(q, k, document_starts, block_tokens)
    block_map = grid.zeros(q.shape[1], torch.bool)
    for document in grid.documents():
        area = document.area(block_map)
        if threshold == 1:
            area[:] = True
        else:
            area |= _choose(_masses(document.of(q), document.of(k), document, stride, scale_of(q, scale)), threshold)
    return grid.lists(block_map)


def _choose(masses: Tensor, threshold: float) -> Tensor:
    """bool [H, N, N]: own and first blocks, and the largest others until the threshold is reached."""
    masses = masses.double()
    forced = torch.eye(masses.shape[-1], dtype=torch.bool, device=masses.device)
    forced[:, 0] = True
    needed = threshold * masses.sum(dim=-1) - (masses * forced).sum(dim=-1)
    return forced | covering(masses.masked_fill(forced, 0.0), needed)


def _masses(q: Tensor, k: Tensor, document: Document, stride: int, scale: float) -> Tensor:
    """[H, N, N]: the coarse attention of a document's q [H, M, D] and k [G, M, D], added up by blocks."""
    edge, num_blocks = document.block_tokens, document.num_blocks
    begin = document.start - document.blocks.start * edge
    padding = (0, 0, begin, num_blocks * edge - begin - document.num_tokens)
    q, k = (torch.nn.functional.pad(x, padding).unflatten(1, (-1, stride)) for x in (q, k))
    # [heads, R, stride * D]: reversed against straight phases, so that a dot product is an antidiagonal's sum.
    q, k = q.flip(2).flatten(2), k.flatten(2)
    first, stop = begin // stride, (begin + document.num_tokens - 1) // stride + 1
    per_block = edge // stride
    blocks_at_once = max(1, MOST_SCORES // (q.shape[0] * per_block * q.shape[1]))
    position = torch.arange(q.shape[1], device=q.device)
    masses = q.new_zeros(q.shape[0], num_blocks, num_blocks, dtype=torch.promote_types(q.dtype, torch.float32))
    for block in range(0, num_blocks, blocks_at_once):
        rows = slice(block * per_block, min((block + blocks_at_once) * per_block, q.shape[1]))
        found = scores(q[:, rows], k[:, : rows.stop]) * (scale / stride)
        row, column = position[rows, None], position[: rows.stop]
        found.masked_fill_((column < first) | (column > row), -torch.inf)
        # Strides without a token of the document get no attention and have none to give.
        outside = (row < first) | (row >= stop)
        weights = found.masked_fill_(outside, 0.0).softmax(dim=-1).masked_fill_(outside, 0.0)
        sums = weights.unflatten(2, (-1, per_block)).sum(dim=-1).unflatten(1, (-1, per_block)).sum(dim=2)
        masses[:, block : block + sums.shape[1], : sums.shape[2]] = sums
    return masses
