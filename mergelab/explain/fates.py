"""What became of a latent that a specialist gained, once it was merged."""

from __future__ import annotations

from typing import Literal

__all__ = ["FATES", "Fate", "fate_of"]

Fate = Literal["amplified", "survived", "weakened", "interfered", "lost"]

FATES: tuple[Fate, ...] = ("amplified", "survived", "weakened", "interfered", "lost")

_LOST, _WHOLE, _MORE = 0.25, 0.75, 1.25


def fate_of(share: float, low: float, high: float, *, opposed: bool) -> Fate:
    """The word for a share of the gain, `(merge - base) / (specialist - base)`, and its interval.

    Args:
        share: what the merge keeps; 1 is all of the gain.
        low: lower end of its interval.
        high: upper end.
        opposed: whether another parent has less of the latent than the base.

    Returns:
        `amplified` where the whole interval is above 1.25, `survived` from three quarters on; below that
        `interfered` where another parent moves it the other way, else `lost` up to a quarter, or where the
        interval reaches 0, and `weakened` between.
    """
    if low > _MORE:
        return "amplified"
    if share >= _WHOLE:
        return "survived"
    if opposed:
        return "interfered"
    return "lost" if share <= _LOST or low <= 0 <= high else "weakened"
