"""Rotary position embedding of queries and keys: exact angles at any position, one rounding of the result."""

from .api import Implementation, apply_rope

__all__ = ["Implementation", "apply_rope"]
