"""The experiments and studies that come with the package."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path


def shipped_experiments() -> dict[str, Path]:
    """Return name to file, sorted by name."""
    return _files("experiments")


def shipped_studies() -> dict[str, Path]:
    """Return name to file, sorted by name."""
    return _files("studies")


def _files(folder: str) -> dict[str, Path]:
    paths = (Path(__file__).parents[1] / folder).glob("*.toml")
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def descriptions(files: Mapping[str, Path]) -> dict[str, str]:
    """Return name to its one-line purpose."""
    return {
        name: str(tomllib.loads(path.read_text(encoding="utf-8")).get("description", ""))
        for name, path in files.items()
    }
