"""Who a site is: the fingerprint of its registered key, and what that key signs for a run."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.secure_sum.frames import pack, unpack
from deal_core.secure_sum.keys import usable
from deal_core.secure_sum.protocol_error import ProtocolError, UnpinnedPeer

SITE_BYTES = 32
"""A site is named by the SHA-256 digest of its public key, in the bytes that OpenSSH hashes."""
Pins = Mapping[bytes, str]
"""Site -> the name that this institution gives it."""


@dataclass(frozen=True)
class Announcement:
    """A site's channel key for one run, signed by its registered key.

    Attributes:
        run: name of the run.
        identity: the registered public key, as OpenSSH writes it (type and base64).
        channel_key: X25519 public key, 32 bytes.
        signature: ECDSA with SHA-384 over run and channel key.
    """

    run: str
    identity: bytes
    channel_key: bytes
    signature: bytes

    @property
    def site(self) -> bytes:
        """Who announces."""
        return site_of_line(self.identity)

    def to_bytes(self) -> bytes:
        """Return the message."""
        return pack(
            "announcement", self.run.encode(), self.identity, self.channel_key, self.signature
        )

    @staticmethod
    def from_bytes(data: bytes) -> Announcement:
        """Return what the bytes say; the signature is not yet verified."""
        run, identity, channel_key, signature = unpack("announcement", data, 4)
        return Announcement(run.decode(errors="replace"), identity, channel_key, signature)


def announce(run: str, channel_key: bytes, identity: ec.EllipticCurvePrivateKey) -> Announcement:
    """Sign a channel key; the same key and run give the same bytes (RFC 6979)."""
    algorithm = ec.ECDSA(hashes.SHA384(), deterministic_signing=True)
    signature = identity.sign(_signed(run, channel_key), algorithm)
    return Announcement(run, _line(identity.public_key()), channel_key, signature)


def verify(announcement: Announcement, run: str, pins: Pins | None) -> None:
    """Accept an announcement, or refuse it.

    Args:
        announcement: as it came from the server.
        run: the run that this site takes part in.
        pins: the peers that this site knows; None: whoever signs is accepted, which holds only
            where the server is trusted not to pose as a site.

    Raises:
        UnpinnedPeer: a site that is not pinned.
        ProtocolError: another run, a signature of somebody else, or a channel key that is none.
    """
    site = announcement.site
    if pins is not None and site not in pins:
        raise UnpinnedPeer(
            f"site {fingerprint(site)} is not among the pinned peers: compare the fingerprint "
            "with that institution, and pin it",
            site,
        )
    name = fingerprint(site) if pins is None else f"'{pins[site]}' ({fingerprint(site)})"
    if announcement.run != run:
        raise ProtocolError(f"the announcement of site {name} is for another run", site)
    key = _public_key(announcement.identity)
    try:
        key.verify(
            announcement.signature,
            _signed(run, announcement.channel_key),
            ec.ECDSA(hashes.SHA384()),
        )
    except InvalidSignature:
        raise ProtocolError(
            f"the channel key of site {name} is not signed by that site: somebody stands between",
            site,
        ) from None
    if not usable(announcement.channel_key):
        raise ProtocolError(f"the channel key of site {name} is no X25519 key", site)


def site_of(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the digest that names the holder of a key."""
    return site_of_line(_line(public_key))


def site_of_line(line: bytes) -> bytes:
    """Return the digest of a public key in OpenSSH's text.

    Raises:
        ProtocolError: it is no such text.
    """
    try:
        blob = base64.b64decode(line.split()[1], validate=True)
    except (IndexError, ValueError):
        raise ProtocolError("an identity is no public key in OpenSSH's format") from None
    return hashlib.sha256(blob).digest()


def fingerprint(site: bytes) -> str:
    """Return what ``ssh-keygen -l`` prints of the key: ``SHA256:`` and base64."""
    return "SHA256:" + base64.b64encode(site).decode().rstrip("=")


def site_of_fingerprint(text: str) -> bytes:
    """Return the site of a fingerprint.

    Raises:
        ProtocolError: it is none.
    """
    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", text):
        raise ProtocolError(f"'{text}' is no fingerprint; deal site init prints it: SHA256:…")
    return base64.b64decode(text.removeprefix("SHA256:") + "=")


def _signed(run: str, channel_key: bytes) -> bytes:
    return pack("signed-channel-key", run.encode(), channel_key)


def _line(key: ec.EllipticCurvePublicKey) -> bytes:
    openssh = serialization.Encoding.OpenSSH
    return key.public_bytes(openssh, serialization.PublicFormat.OpenSSH)


def _public_key(line: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(line)
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last: a compressed point
        raise ProtocolError("an identity is no public key in OpenSSH's format") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ProtocolError("an identity is no EC key, as deal site init makes them")
    return key
