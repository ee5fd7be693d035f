"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path

from deal_core.errors import UserError


def at_home(name: str | Path) -> Path:
    """Return a path in which ``~`` is the home folder, and ``~ann`` that of Ann.

    Raises:
        UserError: nobody has that name here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(f"{name}: there is no such home folder; write the whole path") from None
