"""What a curve of a budget study is called on a plot."""

from __future__ import annotations

from collections.abc import Sequence

SHARES = {"sum": "noise in the sum", "site": "noise at each site"}
"""``privacy.noise_share`` to how its curve is called."""
OTHER = {"sum": "site", "site": "sum"}
BETWEEN = "-noise-"
"""What stands in a setting's name between its method and a share that is not the experiment's."""


def curve_names(settings: Sequence[str]) -> dict[str, str]:
    """Return setting to name: where a method is drawn with both shares of the noise, the share,
    with the method where several are; else the setting as it is.

    Args:
        settings: methods, methods with another share of the noise, and experiments beside them.
    """
    pairs = [pair for name in settings if (pair := _pair(name)) and pair[0] in settings]
    named = {name: name for name in settings}
    for method, share in pairs:
        before = f"{method}, " if len(pairs) > 1 else ""
        named[method] = before + SHARES[OTHER[share]]
        named[f"{method}{BETWEEN}{share}"] = before + SHARES[share]
    return named


def _pair(name: str) -> tuple[str, str] | None:
    """Method and share of a setting that has a share of its own; None: it has not."""
    method, between, share = name.rpartition(BETWEEN)
    return (method, share) if between and share in SHARES else None
