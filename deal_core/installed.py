"""Which federated-deal is installed here: both sides of a run must have the same."""

from __future__ import annotations

import hashlib
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
