"""Liger's fused linear cross-entropy (arXiv:2410.10989), where liger-kernel is installed; it cuts chunks by itself.

Shape legend: N tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The sum or mean over all tokens given, in fp32; gradients of weight are added up in fp32.

    Raises ValueError where it cannot run.
    """
    if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"implementation liger needs a GPU, but hidden is on {hidden.device}: use chunked")
    try:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )
    except ImportError as error:
        raise ValueError(f"implementation liger needs the package liger-kernel: {error}") from None
    if not len(hidden):
        # Its mean over nothing would be NaN.
        return (hidden.sum() + weight[:0].sum()).float()
    loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction=reduction, accum_dtype=torch.float32)
    return loss.float()
