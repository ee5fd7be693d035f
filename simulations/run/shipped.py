"""What comes with the package: experiments, studies, and its own import names.

The names ``client`` and ``server`` are generic: another package of that name must not run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from deal_core.errors import UserError


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


PACKAGES = ("deal_core", "client", "server")
ROOT = Path(__file__).resolve().parents[2]


def require_own_packages() -> None:
    """Check that the packages beside this one would be imported, and no others; none is imported.

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
