"""Estimators: block lists from q and k, for `block_lists(lists, document_starts, row_tokens)`.

Each looks at a batch of rows of packed documents and returns `BlockLists` with one plan head for each query head;
`share_in_groups` joins them. The block of a query's own position is always listed, and a block is never listed that
lies in the future or in other documents only. Plain torch, on the device of q; no gradients pass; the same input gives
the same lists. Memory is linear in tokens, but for one entry for each pair of blocks.
"""

from .flexprefill import flexprefill
from .grid import share_in_groups
from .moba import moba
from .seer import SeerGate, block_maximum, distillation_loss, seer_lists
from .vertical_slash import vertical_slash
from .xattention import xattention

__all__ = [
    "SeerGate",
    "block_maximum",
    "distillation_loss",
    "flexprefill",
    "moba",
    "seer_lists",
    "share_in_groups",
    "vertical_slash",
    "xattention",
]
