"""A JSON file that a command has left, read again by another."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from deal_core.errors import UserError

Stored = TypeVar("Stored", bound=BaseModel)


def read_stored(
    model: type[Stored], path: Path, what: str, cure: str = "name a folder that has one"
) -> Stored:
    """Return what a file holds.

    Args:
        model: of its content.
        path: of the file.
        what: it should be, in words.
        cure: what to do where it is not.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no {what} ({str(error).splitlines()[0]}); {cure}") from None
