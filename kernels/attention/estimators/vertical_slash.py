"""Vertical-slash lists: columns that many queries look at, and distances at which they look.

Jiang et al., "MInference 1.0" (arXiv:2407.02490, section 3.2); microsoft/MInference: minference_forward.py
(`vertical_and_slash_kernel`) and csrc/vertical_slash_index.cu.

Shape legend: B batch, H query heads, G key/value heads, L tokens of a row, M tokens of a document, N blocks of a row,
D head dim, V verticals, S slashes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import DocumentStarts
from ..plan import BlockLists
from .grid import Document, check_at_least, distance_sums, grid_of, largest, last_probabilities, scale_of

LAST_QUERIES = 64


@torch.no_grad()
def vertical_slash(
    q: Tensor,
    k: Tensor,
    document_starts: DocumentStarts,
    *,
    num_verticals: int = 1000,
    num_slashes: int = 4096,
    num_first: int = 30,
    num_local: int = 30,
    block_tokens: int = 128,
    scale: float | None = None,
) -> BlockLists:
    """Lists of the blocks that the top verticals and slashes of each query head touch.

    The attention of the last 64 queries of each document is summed by key (verticals) and by distance (slashes). The
    largest `num_verticals` keys are kept, among them the first `num_first` of the document, and the largest
    `num_slashes` distances, among them the shortest `num_local`. A block is listed if it holds a kept key that some
    query of the block sees, or a key at a kept distance of one.

    q is [B, H, L, D] and k [B, G, L, D], as attention takes them; the lists have H plan heads.

    Deviations: verticals are whole blocks instead of gathered columns, which the specification recommends and which
    lists more; slashes list exactly the blocks they cross, where the published converter rounds outwards. Its kernels
    force the shortest 100 distances, its search (and the specification) 30. A row of packed documents is estimated
    document by document. Early queries are chosen for by the last ones: that is the method.

    Raises ValueError for shapes or documents that do not fit, and for counts below 0.
    """
    check_at_least(num_verticals=(num_verticals, 0), num_slashes=(num_slashes, 0))
    check_at_least(num_first=(num_first, 0), num_local=(num_local, 0))
    grid = grid_of(q, k, document_starts, block_tokens)
    block_map = grid.zeros(q.shape[1], torch.bool)
    group = q.shape[1] // k.shape[1]
    for document in grid.documents():
        document_q, document_k, area = document.of(q), document.of(k), document.area(block_map)
        # One key/value head at a time: the scores of 64 queries over a million keys are large for all heads.
        for head in range(k.shape[1]):
            heads = slice(head * group, (head + 1) * group)
            seen = last_probabilities(document_q[heads], document_k[head : head + 1], LAST_QUERIES, scale_of(q, scale))
            verticals = _top(seen.sum(dim=1), num_verticals, num_first)
            slashes = _top(distance_sums(seen), num_slashes, num_local)
            area[heads] |= _vertical_blocks(verticals, document) | _slash_blocks(slashes, document)
    return grid.lists(block_map)


def _top(sums: Tensor, count: int, num_forced: int) -> Tensor:
    """bool [H, M]: the `count` largest sums, or `num_forced` if that is more; the first `num_forced` among them."""
    sums = sums.clone()
    sums[:, :num_forced] = torch.inf
    return largest(sums, max(count, num_forced))


def _vertical_blocks(verticals: Tensor, document: Document) -> Tensor:
    """bool [H, 1, blocks] of kept keys [H, M]."""
    found = torch.zeros(len(verticals), document.num_blocks, dtype=torch.bool, device=verticals.device)
    head, key = verticals.nonzero(as_tuple=True)
    found[head, (document.start + key) // document.block_tokens - document.blocks.start] = True
    return found.unsqueeze(1)


def _slash_blocks(slashes: Tensor, document: Document) -> Tensor:
    """bool [H, blocks, blocks] that kept distances [H, M] cross."""
    edge, device = document.block_tokens, slashes.device
    block = torch.arange(document.num_blocks, device=device)
    first_query = (block + document.blocks.start) * edge
    last_query = (first_query + edge - 1).clamp(max=document.stop - 1)
    found = torch.zeros(len(slashes), document.num_blocks, document.num_blocks, dtype=torch.bool, device=device)
    for head, kept in enumerate(slashes):
        distance = kept.nonzero()
        # The queries [low, high] of each block that have a key at the distance inside the document.
        low, high = torch.maximum(first_query, document.start + distance), last_query
        for query in (low, high.expand_as(low)):
            key_block = (query - distance) // edge - document.blocks.start
            # Nothing to list: note the block itself, which is listed anyway.
            found[head, block.expand_as(key_block), torch.where(low <= high, key_block, block)] = True
    return found
