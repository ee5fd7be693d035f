"""The only app that a site runs: the ten lines that are installed here, which import what is
installed here. Of another app, which the server may send, nothing is unpacked.

Nothing here imports ``client``: the SuperNode's own process does not load it.
"""

from __future__ import annotations

import hashlib

from simulations.engines.flower import BUNDLE

REFUSAL = "the app is not allowed at this site"
"""All that the server is told."""


class AppNotAllowed(Exception):
    """The site does not run this app; ``digest`` is its SHA-256, which the text does not hold."""

    def __init__(self, digest: str) -> None:
        super().__init__(REFUSAL)
        self.digest = digest


def own_app() -> bytes:
    """Return the bundle that ``flwr run`` builds: it holds no time and no path, and nothing in it
    is compressed, so the same files give the same bytes everywhere."""
    from flwr.cli.build import build_fab_from_files

    files = {path.name: path for path in BUNDLE.iterdir() if path.is_file()}
    return build_fab_from_files(files)[0]


def own_digest() -> str:
    """Return the SHA-256 of :func:`own_app`."""
    return digest_of(own_app())


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of an app's bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def require_allowed(content: bytes, allowed: str) -> None:
    """Check an app against the digest of the one that may run.

    Raises:
        AppNotAllowed: it is another.
    """
    if digest_of(content) != allowed:
        raise AppNotAllowed(digest_of(content))
