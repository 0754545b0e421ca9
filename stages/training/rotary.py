"""Rotary embedding of stock models by the exact rotation of `kernels/rope`, in place of their own arithmetic.

transformers works out position x frequency in float32, rounds cos and sin to the model's dtype and turns q and k in it.
In bfloat16 scores then depend on where in the row two tokens stand, not on their distance alone, and the more so the
further on (Wang et al., arXiv:2411.13476, which is why they anchor). Here angles are exact at any position, the turn is
worked in float32 and rounded once, q and k in one kernel on a GPU.

The models' code stays as it is: the rotary embedding of one model hands on its positions (`Turns`) where cos and sin
would be, and the function of its modelling module that applies them knows what to do with these. Other models of the
same class, whose embedding hands on cos and sin, are turned as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ropewalk.stages.training.model import rotary_embedding

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FUNCTION = "apply_rotary_pos_emb"
SWITCH = "set enable_exact_rope to false to leave the rotation to the model's own code"


@dataclass(frozen=True, eq=False)
class Turns:
    """What stands for cos and sin: by how much each token of a batch is turned."""

    position_ids: Tensor
    """[B, T] integers."""
    inv_freq: Tensor
    """Radians a token of each pair, float32."""
    attention_scaling: float
    """Factor on cos and sin (YaRN)."""

    def apply(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, [B, heads, T, head_dim], turned."""
        from ropewalk.kernels.rope import apply_rope

        return apply_rope(q, k, self.position_ids, self.inv_freq, attention_scaling=self.attention_scaling)


def rotate_exactly(model: torch.nn.Module) -> None:
    """From now on q and k of this model are turned by `kernels/rope`. A model without rotary embedding stays as it is.

    Raises ValueError for a model whose rotation is not this one: several embeddings, frequencies that change with the
    length, a function of its own. The last is found out by asking it to turn something.
    """
    if not any("inv_freq" in name for name, _ in model.named_buffers()):
        return
    name = type(model).__name__
    embedding: Any = rotary_embedding(model)
    if embedding is None:
        raise ValueError(f"{name} has several rotary embeddings: {SWITCH}")
    kind = getattr(embedding, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"{name} has rope_type {kind!r}, whose frequencies change with the length: {SWITCH}")
    modules = _modelling_modules(model)
    if not modules:
        raise ValueError(f"the modelling code of {name} has no function {FUNCTION}: {SWITCH}")
    for module in modules:
        _check_same(name, module, embedding)
        _dispatch(module)
    embedding.forward = partial(_hand_on, embedding)


def _hand_on(embedding: Any, x: Tensor, position_ids: Tensor) -> tuple[Turns, Turns]:
    turns = Turns(position_ids, embedding.inv_freq, embedding.attention_scaling)
    return turns, turns


def _modelling_modules(model: torch.nn.Module) -> list[ModuleType]:
    """The modules of the model's layers that define or import the function."""
    found = {type(layer).__module__: sys.modules[type(layer).__module__] for layer in model.modules()}
    return [module for module in found.values() if hasattr(module, FUNCTION)]


def _check_same(name: str, module: ModuleType, embedding: Any) -> None:
    """Raise ValueError unless the model's own function turns as ours does, in float32 at small positions."""
    import torch

    inv_freq = embedding.inv_freq
    positions = torch.arange(8, device=inv_freq.device).unsqueeze(0)
    # The first dims of a head, or all of them: what the embedding is for.
    q = torch.linspace(-1, 1, 2 * 8 * 2 * len(inv_freq), device=inv_freq.device).view(1, 2, 8, -1)
    k = q.flip(2)[:, :1]
    turns = Turns(positions, inv_freq.float(), embedding.attention_scaling)
    try:
        own = getattr(module, FUNCTION)(q, k, *type(embedding).forward(embedding, q, positions))
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} is turned by a function of another kind ({error}): {SWITCH}") from None
    if not all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(own, turns.apply(q, k), strict=True)):
        raise ValueError(f"{name} does not turn its heads in halves, as most models do: {SWITCH}")


def _dispatch(module: ModuleType) -> None:
    """Make the module's function know `Turns`; repeating is harmless."""
    stock: Callable[..., tuple[Tensor, Tensor]] = getattr(module, FUNCTION)
    if getattr(stock, "knows_turns", False):
        return
    signature = inspect.signature(stock)

    @wraps(stock)
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(given["cos"], Turns):
            return stock(*args, **kwargs)
        if given.get("unsqueeze_dim", 1) != 1:
            raise ValueError(f"{module.__name__} turns [batch, tokens, heads, head_dim]: {SWITCH}")
        return given["cos"].apply(given["q"], given["k"])

    apply_rotary_pos_emb.knows_turns = True  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    setattr(module, FUNCTION, apply_rotary_pos_emb)
