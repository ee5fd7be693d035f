"""The installation: its digest, which both sides of a run must have in common, and the import of
large libraries in less time."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PACKAGES = ("client", "deal_core", "server")
"""What the two sides of a run make of each other's messages."""


@cache
def package_digest() -> str:
    """Return the SHA-256 over the names and the bytes of the installed modules, as hexadecimal
    digits: two installations with equal digests run the same code."""
    root, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(root).as_posix()
            found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


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
