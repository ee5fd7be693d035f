"""Names of a table's columns: no two are the same."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.errors import UserError


def check_names(names: Sequence[str], where: str) -> None:
    """Check that every column has a name of its own; a value would have two meanings.

    Raises:
        UserError: two have the same; the message starts with ``where``.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: column '{name}' occurs twice; rename one")
