"""The installation: its digest, which both sides of a run must have in common, whether its packages
are those that would be imported, and the import of large libraries in less time."""

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from deal_core.errors import UserError

PACKAGES = ("client", "deal_core", "server")
"""What the two sides of a run make of each other's messages."""
ROOT = Path(__file__).resolve().parents[1]
"""Folder of all packages: a checkout, or where packages are installed."""


@cache
def package_digest() -> str:
    """Return the SHA-256 over the names and the bytes of the installed modules, as hexadecimal
    digits: two installations with equal digests run the same code."""
    found = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(ROOT).as_posix()
            found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def require_own_packages() -> None:
    """Check that the packages of this installation would be imported, and no others of the same
    generic names; none is imported.

    Raises:
        UserError: another one comes first, or one is missing.
    """
    for name in PACKAGES:
        spec = find_spec(name)
        places = [*(spec.submodule_search_locations or ()), spec.origin or ""] if spec else [""]
        if not places[0] or Path(places[0]).resolve() != ROOT / name:
            raise UserError(
                f"the name '{name}' means {places[0] or 'nothing'} here, and not {ROOT / name}; "
                "start deal from another folder, take that one out of PYTHONPATH, or uninstall the "
                "other package"
            )


def import_path() -> str:
    """Return ``PYTHONPATH`` for a child: this code comes first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@contextmanager
def without_collection() -> Iterator[None]:
    """Within the block the garbage collector rests.

    Torch, transformers and PEFT leave a million objects that stay. Python's collector would go
    through them again and again while they come (measured: a quarter of ``deal check``).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
