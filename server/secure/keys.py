"""The channel keys with which clients have announced themselves, and the numbers of rounds.

Both last as long as the run's folder: sites answer one announcement of a peer in a run, and no
number twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.atomic_write import atomic_write
from deal_core.secure_sum.keys import Announcement, fingerprint, site_of, verify
from deal_core.secure_sum.messages import ProtocolError

ANNOUNCED, NUMBER = "announced", "number"
"""Keys of the file: client to its announcement, hexadecimal; the last round's number."""


@dataclass(frozen=True)
class ChannelKeys:
    """Attributes: ``path``, the file; ``run``, name of the run, as sites know it."""

    path: Path
    run: str

    @cached_property
    def _held(self) -> dict[str, Any]:
        if not self.path.exists():
            return {ANNOUNCED: {}, NUMBER: 0}
        held: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return held

    def announcement(self, client: str) -> bytes:
        """Return what a client has announced; empty: nothing yet."""
        return bytes.fromhex(self._held[ANNOUNCED].get(client, ""))

    def site(self, client: str) -> bytes:
        """Return which site a client is that has announced itself."""
        return Announcement.from_bytes(self.announcement(client)).site

    def clients_of(self, sites: Iterable[bytes]) -> dict[str, bytes]:
        """Return client to site, of some sites."""
        wanted = frozenset(sites)
        known = {client: self.site(client) for client in self._held[ANNOUNCED]}
        return {client: site for client, site in known.items() if site in wanted}

    def add(self, client: str, data: bytes, registered: bytes = b"") -> str:
        """Keep a client's announcement for good.

        Args:
            client: its name.
            data: the announcement.
            registered: public key that it has signed in with, PEM; empty: it is simulated.

        Returns:
            The fingerprint of its key.

        Raises:
            ProtocolError: it is for another run, not signed by its own key, of another site than
                the registered one, or that of another client.
        """
        announcement = Announcement.from_bytes(data)
        site = announcement.site
        if registered and site != registered_site(registered):
            raise ProtocolError(f"announces {fingerprint(site)}, and is registered with another")
        verify(announcement, self.run, None)
        if any(other != client for other in self.clients_of([site])):
            raise ProtocolError(f"announces {fingerprint(site)}, which is another client's")
        self._held[ANNOUNCED][client] = data.hex()
        self._save()
        return fingerprint(site)

    def forget(self, client: str) -> None:
        """Drop the announcement of a client that has another key now."""
        self._held[ANNOUNCED].pop(client, None)
        self._save()

    def next_number(self) -> int:
        """Return a number for a round, larger than all before, whatever the clock says: sites take
        none that is not."""
        number: int = max(self._held[NUMBER] + 1, time.time_ns() // 1000)
        self._held[NUMBER] = number
        self._save()
        return number

    def _save(self) -> None:
        atomic_write(self.path, json.dumps(self._held), mode=0o600, for_good=True)


def registered_site(key: bytes) -> bytes:
    """Return which site signs in with a public key (PEM).

    Raises:
        ProtocolError: it is no EC key.
    """
    public = serialization.load_pem_public_key(key)
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ProtocolError("is registered with a key that is no EC key")
    return site_of(public)
