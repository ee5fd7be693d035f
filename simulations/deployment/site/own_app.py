"""The app of this checkout, byte for byte as ``deal submit`` of the same version sends it."""

from __future__ import annotations

import os
from pathlib import Path

from simulations.deployment.site.allowed_apps import digest_of
from simulations.engines.flower import app_folder


def own_app() -> bytes:
    """Return the bundle that ``flwr run`` builds: it holds no time and no path, and nothing in it
    is compressed, so the same files give the same bytes everywhere.

    Raises:
        UserError: the package is installed without its checkout.
    """
    from flwr.cli.build import build_fab_from_files

    return build_fab_from_files(app_files(app_folder()))[0]


def app_files(folder: Path) -> dict[str, Path]:
    """Return path in the bundle to file. Flower sorts out what belongs in; folders that
    ``.gitignore`` names are not entered, because an environment in them has 50,000 files.
    """
    ignored = {line.rstrip("/") for line in (folder / ".gitignore").read_text().split()}
    files: dict[str, Path] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ignored]
        paths = [Path(place, name) for name in names]
        files |= {
            path.relative_to(folder).as_posix(): path for path in paths if not path.is_symlink()
        }
    return files


def own_digest() -> str:
    """Return the SHA-256 of :func:`own_app`."""
    return digest_of(own_app())
