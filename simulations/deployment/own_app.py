"""The app of this checkout, byte for byte as ``deal submit`` of the same version sends it."""

from __future__ import annotations

from simulations.deployment.allowed_apps import digest_of
from simulations.flower_engine import app_folder


def own_app() -> bytes:
    """Return the bundle that ``flwr run`` builds: it holds no time and no path, and nothing in it
    is compressed, so the same files give the same bytes everywhere.

    Raises:
        UserError: the package is installed without its checkout.
    """
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(app_folder())


def own_digest() -> str:
    """The SHA-256 of :func:`own_app`."""
    return digest_of(own_app())
