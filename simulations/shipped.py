"""The experiments that come with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path


def shipped_experiments() -> dict[str, Path]:
    """Return name to file, sorted by name."""
    folder = Path(__file__).parent / "experiments"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def descriptions() -> dict[str, str]:
    """Return name to its one-line purpose."""
    return {
        name: str(tomllib.loads(path.read_text(encoding="utf-8")).get("description", ""))
        for name, path in shipped_experiments().items()
    }
