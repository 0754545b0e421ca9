"""A plan as libraries with cumulative sequence lengths are told it: documents one after the other, and a window.

Read from what the queries see, not from how the plan was made: an anchor before a single document is plain causal.

Shape legend: B batch, L query tokens, S key tokens, N documents of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..plan import FIELDS, AttentionPlan

Refuse = Callable[[Tensor, str], None]
"""Raises ValueError if any element is true, naming what a library cannot express."""
_RECOGNISED: WeakKeyDictionary[AttentionPlan, Documents] = WeakKeyDictionary()
"""A plan is recognised once a batch, not once a layer."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The rows of a batch behind each other, cut into documents; the last query of each sees up to its last key.

    Query i of a document with m queries and n keys sees its keys j with j <= i + n - m, and within the window if there
    is one: j > i + n - m - window_tokens.
    """

    q_edges: Tensor
    """int32 [N + 1], on the plan's device: where documents begin among the B * L queries, and B * L."""
    k_edges: Tensor
    """int32 [N + 1], on the plan's device: where they begin among the B * S keys, and B * S."""
    longest_q: int
    """Queries of the document that has the most."""
    longest_k: int
    """Keys of the document that has the most."""
    window_tokens: int | None
    """Keys that a query sees at most, itself included. None: there is no limit."""


def documents_of(plan: AttentionPlan, implementation: str) -> Documents:
    """The documents that a plan describes; worked out once for each plan, with one copy to the CPU.

    Raises ValueError, in the name of the `implementation`, for a plan that is no such thing, saying what it has.
    """
    if plan not in _RECOGNISED:
        refusal = f"implementation {implementation} cannot express {{}}: use auto"
        if plan.plan_heads > 1:
            raise ValueError(refusal.format(f"{plan.plan_heads} plan heads"))
        if plan.blocks is not None:
            raise ValueError(refusal.format("block lists"))
        _RECOGNISED[plan] = _recognise(plan, refusal)
    return _RECOGNISED[plan]


def _recognise(plan: AttentionPlan, refusal: str) -> Documents:
    def refuse_if(is_other: Tensor, what: str) -> None:
        if bool(is_other.any()):
            raise ValueError(refusal.format(what))

    intervals = torch.stack([getattr(plan, name)[:, 0] for name in FIELDS]).cpu().long()
    first, last = _interval(intervals, refuse_if)
    refuse_if(last[:, -1] != plan.k_tokens - 1, "keys behind those that the last query sees")
    rows = torch.arange(plan.batch).unsqueeze(1) * plan.k_tokens
    # Documents share no keys, and queries that share keys share a document.
    begins = torch.ones_like(first, dtype=torch.bool)
    begins[:, 1:] = first[:, 1:] > last[:, :-1]
    first, last, begins = (first + rows).flatten(), (last + rows).flatten(), begins.flatten()
    refuse_if(~begins[1:] & (last.diff() != 1), "intervals that do not end one key later from query to query")
    q_edges = torch.cat([begins.nonzero().flatten(), torch.tensor([len(begins)])])
    k_edges = torch.cat([torch.zeros(1, dtype=torch.int64), last[q_edges[1:] - 1] + 1])
    document_first = k_edges[:-1].repeat_interleave(q_edges.diff())
    refuse_if(first < document_first, "intervals that reach into the document before")
    return Documents(
        q_edges.int().to(plan.device),
        k_edges.int().to(plan.device),
        int(q_edges.diff().max()),
        int(k_edges.diff().max()),
        _window(last - first + 1, first > document_first, refuse_if),
    )


def _interval(intervals: Tensor, refuse_if: Refuse) -> tuple[Tensor, Tensor]:
    """The first and the last key that each query sees, int64 [B, L], of (lo, hi, glo, ghi), int64 [4, B, L]."""
    lo, hi, glo, ghi = intervals.unbind()
    has_own, has_shared = lo <= hi, glo < ghi
    refuse_if(~has_own & ~has_shared, "queries that see nothing")
    glo, ghi = torch.where(has_shared, glo, lo), torch.where(has_shared, ghi, hi + 1)
    lo, hi = torch.where(has_own, lo, glo), torch.where(has_own, hi, ghi - 1)
    is_apart = torch.maximum(lo, glo) > torch.minimum(hi + 1, ghi)
    refuse_if(is_apart, "a shared interval apart from the own one (an anchor, sinks, a prompt)")
    return torch.minimum(lo, glo), torch.maximum(hi + 1, ghi) - 1


def _window(lengths: Tensor, is_cut: Tensor, refuse_if: Refuse) -> int | None:
    """The one length of all intervals that begin behind their document's first key; none is longer."""
    if not bool(is_cut.any()):
        return None
    window_tokens = int(lengths.max())
    refuse_if(is_cut & (lengths != window_tokens), "intervals that follow neither documents nor one window")
    return window_tokens
