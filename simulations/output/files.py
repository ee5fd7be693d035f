"""Tables and figures on disk: whoever reads meanwhile finds the old text or the new one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deal_core.config.home import at_home
from deal_core.errors import UserError
from deal_core.whole_file import write_whole


def write_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, made where it is missing.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        for name, text in texts.items():
            write_whole(out / name, text)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another --out"
        ) from None


def write_file(name: str | Path, text: str) -> Path:
    """Write one file, its folder made where it is missing.

    Args:
        name: as a person writes it.
        text: all of it.

    Returns:
        Its path.

    Raises:
        UserError: it is a folder, or cannot be written.
    """
    path = at_home(name)
    if path.is_dir():
        raise UserError(f"{name}: is a folder; name a file")
    write_texts(path.parent, {path.name: text})
    return path
