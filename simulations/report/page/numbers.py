"""Figures as they are shown: per cent, points, bytes, times. The value itself stays exact."""

from __future__ import annotations

from server.spending import rounded_up
from simulations.output.files import DASH
from simulations.report.page.blocks import Cell, Number
from simulations.run.live_view import duration, signed


def percent(share: float | None, source: str = "") -> Cell:
    """Return a share of 0 to 1 in per cent, without the sign; a dash where there is none."""
    return DASH if share is None else Number(share, f"{100 * share:.1f}", source)


def points(difference: float | None, source: str = "") -> Cell:
    """Return a difference of shares in points, with its sign."""
    return DASH if difference is None else Number(difference, signed(difference), source)


def whole(count: float | None, source: str = "") -> Cell:
    """Return a count."""
    return DASH if count is None else Number(count, f"{count:,.0f}".replace(",", " "), source)


def decimal(value: float | None, digits: int = 3, source: str = "") -> Cell:
    """Return a figure to so many significant digits."""
    return DASH if value is None else Number(value, f"{value:.{digits}g}", source)


def at_most(value: float | None, digits: int = 3, source: str = "") -> Cell:
    """Return a bound to so many significant digits, never a smaller one: an epsilon, a delta."""
    return DASH if value is None else Number(value, rounded_up(value, digits), source)


def size(count: float | None, source: str = "") -> Cell:
    """Return bytes in the unit that suits them."""
    if count is None:
        return DASH
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return Number(count, f"{count / scale:.1f} {unit}", source)
    return Number(count, f"{count:.0f} B", source)


def time(seconds: float | None, source: str = "") -> Cell:
    """Return seconds as a time for people; below ten with a digit after the point."""
    if seconds is None:
        return DASH
    text = f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
    return Number(seconds, text, source)


def pointer(*parts: str | int) -> str:
    """Return a JSON pointer (RFC 6901) from the keys and places that lead to a value."""
    escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in parts)
    return "".join(f"/{part}" for part in escaped)
