"""The entry point: checks shapes, picks an implementation, never falls back silently.

Shape legend: B batch, H query heads, G key heads, L tokens, D head dim, R rotary dims (R / 2 pairs).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .angles import fixed_point

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Implementation = Literal["auto", "triton", "torch", "reference"]
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def apply_rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions, in transformers' rotate-half convention.

    q is [B, H, L, D] and k [B, G, L, D], both of one floating dtype, in any memory layout, which the results keep.
    position_ids [B, L], or [1, L] for all rows alike, are integers of any order and sign: packed, anchored, with jumps
    (CREAM) or offsets (E2-LLM, whose scale divides inv_freq). inv_freq [R / 2] holds radians a token; R may be less
    than D, and the dims behind R are handed on as they are. `attention_scaling` multiplies cos and sin (YaRN).

    Angles are exact modulo a turn (`angles`), the rotation is worked in fp32 (fp64 for fp64 input) and rounded once to
    the input's dtype: scores depend on the distance of positions alone, at any offset. Gradients are turned back by
    the same angles; none flows into inv_freq.

    `implementation`: "triton" is one kernel for q and k, for GPUs; "torch" runs everywhere; "auto" is the kernel for
    the dtypes it takes on a GPU, else torch; "reference" is fp64 throughout. All give the same bits each time.
    Raises ValueError for an unknown one, one that cannot run, or arguments that do not fit, saying which.
    """
    _check(q, k, position_ids, inv_freq)
    if implementation == "auto":
        implementation = "triton" if q.device.type == "cuda" and q.dtype in KERNEL_DTYPES else "torch"
    match implementation:
        case "triton":
            rotate = _triton(q)
        case "torch":
            from .on_torch import rotate
        case "reference":
            from . import reference

            return reference.apply_rope(q, k, position_ids, inv_freq, attention_scaling)
        case _:
            raise ValueError(
                f"implementation must be one of {', '.join(get_args(Implementation))}, got {implementation!r}"
            )
    return _Rotation.apply(q, k, position_ids, fixed_point(inv_freq), float(attention_scaling), False, rotate)


class _Rotation(torch.autograd.Function):
    """A rotation is linear, and its transpose the rotation back, so its gradient is differentiable again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        position_ids: Tensor,
        frequencies: Tensor,
        scaling: float,
        inverse: bool,
        rotate: Rotate,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(position_ids, frequencies)
        ctx.scaling, ctx.inverse, ctx.rotate = scaling, inverse, rotate
        return rotate(q, k, position_ids, frequencies, scaling, inverse)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        grads = _Rotation.apply(*grad_outputs, *ctx.saved_tensors, ctx.scaling, not ctx.inverse, ctx.rotate)
        return *grads, None, None, None, None, None


def _triton(q: Tensor) -> Rotate:
    """The kernel's launcher. Raises ValueError where it cannot run."""
    if q.dtype not in KERNEL_DTYPES:
        raise ValueError(f"triton rope takes bfloat16, float16 or float32, got {q.dtype}")
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"implementation triton needs a GPU, or TRITON_INTERPRET=1 for tests, but q is on {q.device}: use auto"
        )
    try:
        from .on_triton import rotate
    except ImportError as error:
        raise ValueError(f"implementation triton needs the package triton: {error}") from None
    return rotate


def _check(q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must be [batch, heads, tokens, head_dim], got {shapes}")
    if (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q and k must agree in batch, tokens and head_dim, got {shapes}")
    if not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"q and k must have one floating dtype, got {q.dtype} and {k.dtype}")
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"position_ids must be int32 or int64, got {position_ids.dtype}")
    if position_ids.shape not in ((q.shape[0], q.shape[2]), (1, q.shape[2])):
        raise ValueError(
            f"position_ids must be [{q.shape[0]}, {q.shape[2]}] or [1, {q.shape[2]}] to fit q, "
            f"got {list(position_ids.shape)}"
        )
    if inv_freq.dim() != 1 or not 0 < 2 * len(inv_freq) <= q.shape[3]:
        raise ValueError(
            f"inv_freq must hold one frequency for each pair of dims, at most {q.shape[3] // 2}, "
            f"got {list(inv_freq.shape)}"
        )
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"inv_freq must be float32 or float64, got {inv_freq.dtype}: it was cast with the model")
    if inv_freq.requires_grad:
        raise ValueError("no gradient flows into inv_freq, but it requires one: detach it")
    if not q.device == k.device == position_ids.device == inv_freq.device:
        raise ValueError(
            f"q, k, position_ids and inv_freq must lie on one device, got {q.device}, {k.device}, "
            f"{position_ids.device} and {inv_freq.device}"
        )
