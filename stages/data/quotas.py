"""Whole numbers that add up, from shares that do not."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction


def largest_remainder(fractions: Mapping[str, float], total: int) -> dict[str, int]:
    """Divide `total` by shares of any sum, by the largest remainder (Hamilton's method).

    Each quota is its exact share rounded down or up, and the quotas add up to `total`. Equal remainders are served in
    the order of the names, so the order of the mapping does not matter. Raises ValueError if a share is negative or all
    are zero.
    """
    # Through the decimal spelling: 0.29 of 100 is 29, although the nearest double is a little less.
    shares = {name: Fraction(repr(float(share))) for name, share in fractions.items()}
    if any(share < 0 for share in shares.values()) or not any(shares.values()):
        raise ValueError(f"shares must not be negative, nor all zero: {dict(fractions)}")
    exact = {name: share * total / sum(shares.values()) for name, share in shares.items()}
    quotas = {name: int(value) for name, value in exact.items()}
    left = total - sum(quotas.values())
    for name in sorted(exact, key=lambda name: (quotas[name] - exact[name], name))[:left]:
        quotas[name] += 1
    return quotas
