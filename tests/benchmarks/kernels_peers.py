"""Other libraries' attention, each as a call that takes no arguments, for the patterns that it can express.

Shapes as they are here: q [1, H, L, D], k and v [1, G, L, D]. What they want else is made before the clock starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from kernels_patterns import Case, Shape
from torch import Tensor
from torch.nn import functional

Call = Callable[[], Tensor]
NSA_BLOCK_TOKENS, NSA_BLOCKS = 64, 16
NSA_HEADS_OF_A_GROUP = 16
MOBA_CHUNKS, MOBA_CHOSEN = 16, 3


def prepare(name: str, case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """The peer's call, None if it has no such pattern. Raises ImportError if it is not installed."""
    return PEERS[name](case, shape, q, k, v)


def _sdpa(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    if case.pattern != "causal":
        return None
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _sdpa_cudnn(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    return _sdpa_on("CUDNN_ATTENTION", case, shape, q, k, v)


def _sdpa_flash(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    return _sdpa_on("FLASH_ATTENTION", case, shape, q, k, v)


def _sdpa_on(backend: str, case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    call = _sdpa(case, shape, q, k, v)
    if call is None:
        return None

    def run() -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return call()

    return run


def _flex(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    from torch._functorch import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = _flex_mask(case, shape)
    if visible is None:
        return None
    # Else the ninth compilation falls back to eager, which holds all scores.
    torch._dynamo.reset()
    # A graph is kept for several backward passes here, which donated buffers forbid.
    config.donated_buffer = False
    mask: Any = create_block_mask(visible, None, None, case.tokens, case.tokens, device=shape.device, _compile=True)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _flex_mask(case: Case, shape: Shape) -> Callable[..., Tensor] | None:
    if case.pattern == "causal":
        return lambda b, h, i, j: j <= i
    if case.pattern in ("document", "anchor"):
        starts = torch.tensor([*case.details["starts"], case.tokens])
        number = torch.arange(len(starts) - 1).repeat_interleave(starts.diff()).to(shape.device)
        if case.pattern == "document":
            return lambda b, h, i, j: (j <= i) & (number[i] == number[j])
        return lambda b, h, i, j: (j <= i) & ((number[i] == number[j]) | (j == 0))
    if case.pattern == "sliding_window":
        window, sinks = case.details["window_tokens"], case.details["num_sinks"]
        return lambda b, h, i, j: (j <= i) & ((i - j < window) | (j < sinks))
    return None


def _torch_varlen(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    from torch.nn.attention.varlen import varlen_attn

    if case.pattern not in ("causal", "document"):
        return None
    edges, longest = _edges(case, shape)
    # torch 2.11 has no such argument, and takes fewer key/value heads without a word.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def run() -> Tensor:
        q_, k_, v_ = (x[0].transpose(0, 1) for x in (q, k, v))
        found: Any = varlen_attn(q_, k_, v_, edges, edges, longest, longest, window_size=(-1, 0), **grouped)
        return found.transpose(0, 1).unsqueeze(0)

    return run


def _flash_attn_2(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    import flash_attn  # pyright: ignore[reportMissingImports]

    return _flash_attn(flash_attn.flash_attn_varlen_func, case, shape, q, k, v)


def _flash_attn_4(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _flash_attn(flash_attn_varlen_func, case, shape, q, k, v)


def _flash_attn(function: Any, case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    if case.pattern not in ("causal", "document"):
        return None
    edges, longest = _edges(case, shape)
    given = {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def run() -> Tensor:
        found = function(*(x[0].transpose(0, 1) for x in (q, k, v)), **given, causal=True)
        out = found[0] if isinstance(found, tuple) else found
        return out.transpose(0, 1).unsqueeze(0)

    return run


def _edges(case: Case, shape: Shape) -> tuple[Tensor, int]:
    starts = torch.tensor([*case.details.get("starts", [0]), case.tokens], dtype=torch.int32)
    return starts.to(shape.device), int(starts.diff().max())


def _fla_nsa(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """Selection alone: own block, first, and random earlier ones. It wants 16 query heads for each key/value head."""
    from fla.ops.nsa import parallel_nsa  # pyright: ignore[reportMissingImports]

    if case.pattern != "causal" or shape.num_heads % NSA_HEADS_OF_A_GROUP:
        return None
    heads = shape.num_heads // NSA_HEADS_OF_A_GROUP
    own = torch.arange(case.tokens, device=shape.device)[None, :, None, None] // NSA_BLOCK_TOKENS
    chance = torch.rand(1, case.tokens, heads, NSA_BLOCKS - 2, device=shape.device)
    others = (chance * (own + 1)).long()
    chosen = torch.cat([torch.zeros_like(others[..., :1]), others, own.expand(-1, -1, heads, 1)], dim=-1)
    gate = torch.ones(1, case.tokens, shape.num_heads, dtype=q.dtype, device=shape.device)
    given = {"g_slc": gate, "block_indices": chosen.sort(dim=-1).values}

    def run() -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2).contiguous() for x in (q, k[:, :heads], v[:, :heads]))
        found = parallel_nsa(q_, k_, v_, **given, block_counts=NSA_BLOCKS, block_size=NSA_BLOCK_TOKENS)
        return found.transpose(1, 2)

    return run


def _fla_moba(case: Case, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Call | None:
    """Three of sixteen chunks, gate included; it wants flash-attn, and as many key/value heads as query heads."""
    from fla.ops.moba import parallel_moba  # pyright: ignore[reportMissingImports]

    if case.pattern != "causal":
        return None
    edges, longest = _edges(case, shape)
    group = shape.num_heads // shape.num_kv_heads

    def run() -> Tensor:
        packed = (x[0].transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
        found = parallel_moba(*packed, edges, longest, case.tokens // MOBA_CHUNKS, MOBA_CHOSEN)
        return found.transpose(0, 1).unsqueeze(0)

    return run


PEERS: dict[str, Callable[[Case, Shape, Tensor, Tensor, Tensor], Call | None]] = {
    "sdpa": _sdpa,
    "sdpa_cudnn": _sdpa_cudnn,
    "sdpa_flash": _sdpa_flash,
    "flex": _flex,
    "torch_varlen": _torch_varlen,
    "flash_attn_2": _flash_attn_2,
    "flash_attn_4": _flash_attn_4,
    "fla_nsa": _fla_nsa,
    "fla_moba": _fla_moba,
}
OWN_PATTERN = {
    "fla_nsa": f"its own: {NSA_BLOCKS} blocks of {NSA_BLOCK_TOKENS}",
    "fla_moba": f"its own: {MOBA_CHOSEN} of {MOBA_CHUNKS} chunks",
}
"""Peers that attend to something else than the case says."""
