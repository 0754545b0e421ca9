"""Which keys each query sees: the one description of a mask that every attention implementation reads.

Query i sees key j iff `lo[i] <= j <= hi[i]` or `glo[i] <= j < ghi[i]`. The first interval is a query's own
neighbourhood (its document, a window); the second is what many queries share (an anchor, attention sinks, a prompt
that several answers continue). Either may be empty; where they overlap a key still counts once. Memory is linear in
the sequence length, and position ids play no part: they are data, used by rotary embeddings outside.

Shape legend: B batch, L query tokens, S key tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .pieces import Piece, decompose

FIELDS = ("lo", "hi", "glo", "ghi")


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Row intervals of a batch. Build it with a pattern (`patterns.py`); compare plans by `visible()`.

    Raises ValueError if a tensor has another shape, dtype or device than the rest, or reaches outside the keys.
    """

    lo: Tensor
    """int32 [B, L]: first key of the own interval; `lo > hi` makes it empty."""
    hi: Tensor
    """int32 [B, L]: last key of the own interval, inclusive."""
    glo: Tensor
    """int32 [B, L]: first key of the shared interval; `glo >= ghi` makes it empty."""
    ghi: Tensor
    """int32 [B, L]: end of the shared interval, exclusive."""
    k_tokens: int
    """S, the number of keys."""

    def __post_init__(self) -> None:
        if self.lo.dim() != 2 or self.lo.numel() == 0:
            raise ValueError(f"lo must be [batch, q_tokens] with no empty dimension, got {list(self.lo.shape)}")
        for name in FIELDS:
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name} must be int32, got {tensor.dtype}")
            if tensor.shape != self.lo.shape or tensor.device != self.lo.device:
                raise ValueError(
                    f"{name} must match lo in shape and device, got {list(tensor.shape)} on {tensor.device} "
                    f"and {list(self.lo.shape)} on {self.lo.device}"
                )
        for name, least, most in (
            ("lo", 0, self.k_tokens),
            ("hi", -1, self.k_tokens - 1),
            ("glo", 0, self.k_tokens),
            ("ghi", 0, self.k_tokens),
        ):
            smallest, largest = (int(edge) for edge in getattr(self, name).aminmax())
            if smallest < least or largest > most:
                raise ValueError(
                    f"{name} must lie in [{least}, {most}] for k_tokens={self.k_tokens}, "
                    f"got values from {smallest} to {largest}"
                )

    @property
    def batch(self) -> int:
        """B."""
        return self.lo.shape[0]

    @property
    def q_tokens(self) -> int:
        """L."""
        return self.lo.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the intervals lie; q, k and v must lie there too."""
        return self.lo.device

    def to(self, device: torch.device | str) -> AttentionPlan:
        """The same plan on another device."""
        moved = copy.copy(self)
        for name in FIELDS:
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved

    def visible(self) -> Tensor:
        """The dense mask, bool [B, 1, L, S]: True where the query sees the key. Quadratic in memory."""
        key = torch.arange(self.k_tokens, device=self.device)
        lo, hi, glo, ghi = (getattr(self, name)[:, None, :, None] for name in FIELDS)
        return ((lo <= key) & (key <= hi)) | ((glo <= key) & (key < ghi))

    def intervals(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The visible keys as three disjoint half-open intervals: own, shared left of own, shared right of own.

        Each is a pair (start, stop) of int64 [B, L]; `start >= stop` is empty.
        """
        lo, hi, glo, ghi = (getattr(self, name).long() for name in FIELDS)
        # An empty own interval cuts nothing off: all of the shared one then counts as left of it.
        is_empty = lo > hi
        left_stop = torch.where(is_empty, ghi, torch.minimum(ghi, lo))
        right_start = torch.where(is_empty, ghi, torch.maximum(glo, hi + 1))
        return (lo, hi + 1), (glo, left_stop), (right_start, ghi)

    def num_visible(self) -> Tensor:
        """Visible query-key pairs of each row of the batch, int64 [B]."""
        return torch.stack([(stop - start).clamp(min=0).sum(dim=1) for start, stop in self.intervals()]).sum(dim=0)

    def density(self) -> float:
        """Visible pairs as a share of what plain causal attention over as many tokens sees."""
        first = self.k_tokens - self.q_tokens + 1
        num_causal = torch.arange(first, self.k_tokens + 1).clamp(min=0).sum().item() * self.batch
        return self.num_visible().sum().item() / num_causal

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The visible area cut into rectangles and causal triangles, each pair in exactly one. Worked out once."""
        return decompose(self.intervals())

    @classmethod
    def stack(cls, plans: Sequence[AttentionPlan]) -> AttentionPlan:
        """One batch out of several plans, whose patterns may differ.

        Raises ValueError if there is none or they differ in `q_tokens`, `k_tokens` or device.
        """
        if not plans:
            raise ValueError("stack needs at least one plan")
        shapes = {(plan.q_tokens, plan.k_tokens, plan.device) for plan in plans}
        if len(shapes) > 1:
            raise ValueError(f"plans to stack must agree in (q_tokens, k_tokens, device), got {shapes}")
        tensors = [torch.cat([getattr(plan, name) for plan in plans]) for name in FIELDS]
        return cls(*tensors, k_tokens=plans[0].k_tokens)
