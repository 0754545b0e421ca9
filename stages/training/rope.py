"""Position methods: how a checkpoint's rotary embedding is changed so that it reaches a longer window.

Notation: d rotary dimensions, b base (theta), N original window, L target window, s = L/N; the pair i = 0 .. d/2-1
turns by b^(-2i/d) radians a token. Every method starts from the *original* embedding (b, N), also where the
checkpoint was extended before, so that a second extension does not scale what is scaled already.

* linear  position interpolation (Chen et al. 2023, arXiv 2306.15595): all frequencies divided by s.
* theta   base change, "ABF" (Xiong et al. 2023, arXiv 2309.16039): b replaced by a given larger base.
* ntk     NTK-aware base change: b * s^(d/(d-2)), which leaves i = 0 as it is and divides the last pair by s. It is
          written as a plain change of base, which every reader knows.
* yarn    (Peng et al. 2023, arXiv 2309.00071): pairs that turn more than `beta_fast` times in N stay, those that turn
          less than `beta_slow` times are divided by s, a linear ramp between; cos and sin are multiplied by
          0.1 ln s + 1. As transformers has it, the ramp is linear in the pair's index between rounded bounds.

Dynamic NTK is left out: its frequencies depend on the longest sequence of a batch, so keys in a cache go stale and
readers disagree on them. Everything here is float64 and plain Python; nothing heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from ropewalk.stages.schema import Record

RESCALABLE = ("default", "linear", "yarn")


class RopeConfig(Record):
    """Which position method turns the checkpoint's embedding into the long one."""

    method: Literal["none", "linear", "theta", "ntk", "yarn"] = "none"
    """See the module's docstring; "none" keeps the checkpoint's embedding."""
    factor: float | None = Field(default=None, ge=1)
    """s of linear, ntk and yarn; None is longest row / original window."""
    theta: float | None = Field(default=None, gt=1)
    """The new base, for theta only."""
    beta_fast: float = Field(default=32.0, gt=0)
    """yarn: turns in the original window above which a pair keeps its frequency."""
    beta_slow: float = Field(default=1.0, gt=0)
    """yarn: turns in the original window below which a pair is divided by the whole factor."""

    @model_validator(mode="after")
    def _fields_of_the_method(self) -> RopeConfig:
        if (self.theta is None) == (self.method == "theta"):
            raise ValueError("rope.theta belongs to rope.method 'theta', and only to it")
        if self.factor is not None and self.method not in ("linear", "ntk", "yarn"):
            raise ValueError(f"rope.factor has no meaning for rope.method {self.method!r}: leave it out")
        if self.beta_fast <= self.beta_slow:
            raise ValueError("rope.beta_fast must be greater than rope.beta_slow")
        return self


def original_window(parameters: Mapping[str, Any], max_position_embeddings: int) -> int:
    """N in tokens: the window before any extension that `rope_parameters` tells of."""
    if "original_max_position_embeddings" in parameters:
        return int(parameters["original_max_position_embeddings"])
    if parameters.get("rope_type") == "linear":
        return round(max_position_embeddings / parameters["factor"])
    return max_position_embeddings


def extended_parameters(
    rope: RopeConfig, parameters: Mapping[str, Any], max_position_embeddings: int, window: int, head_dim: int
) -> dict[str, Any]:
    """The new `rope_parameters` of a transformers config.

    `parameters` and `max_position_embeddings` are the checkpoint's, `window` is the longest row in tokens.
    Raises ValueError where the checkpoint's embedding cannot be rescaled, or needs no rescaling.
    """
    if rope.method == "none":
        return dict(parameters)
    kind = parameters.get("rope_type", "default")
    if kind not in RESCALABLE:
        raise ValueError(f"rope.method {rope.method!r} cannot rescale a {kind!r} embedding: use method 'none'")
    original = original_window(parameters, max_position_embeddings)
    theta = float(parameters["rope_theta"])
    kept = {key: parameters[key] for key in ("partial_rotary_factor",) if key in parameters}
    if rope.method == "theta":
        return {"rope_type": "default", "rope_theta": rope.theta, **kept}
    factor = rope.factor if rope.factor is not None else window / original
    if factor < 1:
        raise ValueError(
            f"rows of {window} tokens are shorter than the checkpoint's window of {original}: set rope.method to 'none'"
        )
    if rope.method == "ntk":
        rotary_dim = _rotary_dim(parameters, head_dim)
        if rotary_dim < 4:
            raise ValueError(f"rope.method 'ntk' needs 4 or more rotary dimensions; the checkpoint has {rotary_dim}")
        base = theta * factor ** (rotary_dim / (rotary_dim - 2))
        return {"rope_type": "default", "rope_theta": base, **kept}
    if factor * original < window:
        raise ValueError(f"rope.factor {factor:g} stretches {original} tokens to less than the rows' {window}")
    if rope.method == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor, **kept}
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        **kept,
    }


def extended_window(parameters: Mapping[str, Any], original: int, window: int) -> int:
    """`max_position_embeddings` that goes with new `rope_parameters`: what they stretch to, or the longest row.

    Readers derive the factor of linear and yarn from it, so for these it is factor x original window.
    """
    return max(window, round(parameters.get("factor", 1.0) * original))


def frequencies(parameters: Mapping[str, Any], head_dim: int) -> tuple[list[float], float]:
    """Radians a token of each pair, and the factor on cos and sin, that `rope_parameters` stand for.

    Raises ValueError for types other than default, linear and yarn.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in RESCALABLE:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(RESCALABLE)}")
    dim, theta = _rotary_dim(parameters, head_dim), parameters["rope_theta"]
    plain = [theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    if kind == "default":
        return plain, 1.0
    factor = parameters["factor"]
    if kind == "linear":
        return [frequency / factor for frequency in plain], 1.0
    kept = _yarn_kept_fractions(parameters, dim)
    scaled = [f * (k + (1 - k) / factor) for f, k in zip(plain, kept, strict=True)]
    given = parameters.get("attention_factor")
    temperature = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return scaled, temperature if given is None else given


def _rotary_dim(parameters: Mapping[str, Any], head_dim: int) -> int:
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _yarn_kept_fractions(parameters: Mapping[str, Any], dim: int) -> list[float]:
    """Share of its own frequency that each pair keeps: 1 for fast pairs, 0 for slow ones (gamma in the paper)."""
    original, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(parameters.get("beta_fast") or 32)), 0)
    last = min(math.ceil(pair_that_turns(parameters.get("beta_slow") or 1)), dim - 1)
    # transformers widens an empty ramp by the same amount.
    width = last - first or 0.001
    return [1 - min(max((pair - first) / width, 0.0), 1.0) for pair in range(dim // 2)]
