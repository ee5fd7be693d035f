"""Which apps may run at a site: by their SHA-256, taken over the bytes that the server has sent.

Nothing here imports ``client``: the process that runs an app must import that app's own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.site_file import SiteFile

REFUSAL = "the app is not allowed at this site"
"""All that the server is told."""
ANY = "any"


class AppNotAllowed(Exception):
    """The site does not run this app; ``digest`` is its SHA-256, which the text does not hold."""

    def __init__(self, digest: str) -> None:
        super().__init__(REFUSAL)
        self.digest = digest


@dataclass(frozen=True)
class AllowedApps:
    """SHA-256 of each app that may run; None: every app may."""

    digests: frozenset[str] | None

    def permit(self, content: bytes) -> bool:
        """Return whether an app may run."""
        return self.digests is None or digest_of(content) in self.digests

    def require(self, content: bytes) -> None:
        """Raise :class:`AppNotAllowed` for an app that may not run."""
        if not self.permit(content):
            raise AppNotAllowed(digest_of(content))

    def word(self) -> str:
        """Return the list as one argument of a program."""
        return ANY if self.digests is None else ",".join(sorted(self.digests))


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of an app's bytes, as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def from_word(word: str) -> AllowedApps:
    """Return the list that :meth:`AllowedApps.word` has written."""
    return AllowedApps(None if word == ANY else frozenset(filter(None, word.split(","))))


def allowed_apps(site: SiteFile) -> AllowedApps:
    """Return what ``[apps]`` of ``site.toml`` says. Without that table a site with a policy runs
    none: only code that it knows keeps to a policy."""
    if site.apps is not None:
        return AllowedApps(frozenset(site.apps.allowed))
    return AllowedApps(None if site.policy is None else frozenset())
