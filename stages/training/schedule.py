"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate(step: int, *, num_steps: int, peak: float, warmup_steps: int, min_fraction: float) -> float:
    """Learning rate of 0-based `step`: linear to `peak` at step `warmup_steps` - 1, then a cosine.

    The last step, `num_steps` - 1, has `peak` x `min_fraction` (Loshchilov and Hutter 2017, arXiv 1608.03983,
    without restarts).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return peak * (min_fraction + (1 - min_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))
