"""Cross-entropy of a linear head without the logits of all tokens at once."""

from .api import Implementation, Reduction, linear_cross_entropy

__all__ = ["Implementation", "Reduction", "linear_cross_entropy"]
