"""Keys of a site, and what two sites do with the channel between them; masks from keys.

A site is known by its registered key, which signs its channel key of a run. The channel encrypts
the shares that one site has for another, and proves that both were told the same survivors. Keys
are derived with HKDF-SHA256, with what they are for as its context. In all functions ``context`` is
the digest of the round's terms, and a sender or receiver is a position in the cohort.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from deal_core.secure_sum.messages import (
    KEY_BYTES,
    TAG_BYTES,
    Message,
    ProtocolError,
    UnpinnedPeer,
    number_bytes,
    pack,
)

SITE_BYTES = 32
"""A site is named by the SHA-256 digest of its public key, in the bytes that OpenSSH hashes."""
Pins = Mapping[bytes, str]
"""Site -> the name that this institution gives it."""
_NONCE = bytes(12)


def derive(secret: bytes, purpose: str, *context: bytes) -> bytes:
    """Return 32 bytes that depend on the secret, the purpose and all of the context.

    Source: RFC 5869, without salt; ``info`` is purpose and context, packed.
    """
    return HKDF(hashes.SHA256(), KEY_BYTES, None, pack(purpose, *context)).derive(secret)


def public_half(private: bytes) -> bytes:
    """Return the X25519 public key of 32 private bytes."""
    key = X25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def shared_secret(private: bytes, public: bytes) -> bytes:
    """Return what X25519 makes of one private and one public half (RFC 7748).

    Raises:
        ProtocolError: the public half is no key, or one that gives the same secret to everybody.
    """
    try:
        peer = X25519PublicKey.from_public_bytes(public)
        return X25519PrivateKey.from_private_bytes(private).exchange(peer)
    except ValueError:
        raise ProtocolError("a public key is not a valid X25519 key") from None


def usable(public: bytes) -> bool:
    """Return whether 32 bytes are a public half with which others can share a secret. It is the
    same for every private half: a point of low order gives zero to all of them (RFC 7748, 6.1)."""
    try:
        shared_secret(bytes(range(KEY_BYTES)), public)
    except ProtocolError:
        return False
    return True


@dataclass(frozen=True)
class Announcement(Message):
    """A site's channel key for one run, signed by its registered key; the signature of one that
    was read is not yet verified."""

    kind = "announcement"

    run: str
    identity: bytes
    """The registered public key, as OpenSSH writes it (type and base64)."""
    channel_key: bytes
    """X25519 public key, 32 bytes."""
    signature: bytes
    """ECDSA with SHA-384 over run and channel key."""

    @property
    def site(self) -> bytes:
        """Who announces."""
        return site_of_line(self.identity)


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
    site, channel_key = announcement.site, announcement.channel_key
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
        key.verify(announcement.signature, _signed(run, channel_key), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        raise ProtocolError(
            f"the channel key of site {name} is not signed by that site: somebody stands between",
            site,
        ) from None
    if not usable(channel_key):
        raise ProtocolError(f"the channel key of site {name} is no X25519 key", site)


def site_of(public_key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the digest that names the holder of a key."""
    return site_of_line(_line(public_key))


def site_of_line(line: bytes) -> bytes:
    """Return the digest of a public key in OpenSSH's text; ProtocolError where it is none."""
    try:
        blob = base64.b64decode(line.split()[1], validate=True)
    except (IndexError, ValueError):
        raise ProtocolError("an identity is no public key in OpenSSH's format") from None
    return hashlib.sha256(blob).digest()


def fingerprint(site: bytes) -> str:
    """Return what ``ssh-keygen -l`` prints of the key: ``SHA256:`` and base64."""
    return "SHA256:" + base64.b64encode(site).decode().rstrip("=")


def site_of_fingerprint(text: str) -> bytes:
    """Return the site of a fingerprint; ProtocolError where it is none."""
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


def encrypt_shares(
    channel: bytes, context: bytes, sender: int, receiver: int, mask_key: bytes, shares: bytes
) -> bytes:
    """Return the 32 bytes of ``shares``, of the mask seed and of the self seed, encrypted for one
    receiver, under the channel's key and the sender's public mask key of the round."""
    key = _shares_key(channel, context, sender, receiver, mask_key)
    return AESGCM(key).encrypt(_NONCE, shares, context)


def decrypt_shares(
    channel: bytes, context: bytes, sender: int, receiver: int, mask_key: bytes, encrypted: bytes
) -> bytes:
    """Return the two shares.

    Raises:
        ProtocolError: they were not encrypted by this sender, for this receiver, in this round,
            with this mask key.
    """
    key = _shares_key(channel, context, sender, receiver, mask_key)
    try:
        return AESGCM(key).decrypt(_NONCE, encrypted, context)
    except InvalidTag:
        raise ProtocolError(
            "the shares of a site do not open: they are of another round, sender or receiver, or "
            "its mask key was exchanged"
        ) from None


def _shares_key(
    channel: bytes, context: bytes, sender: int, receiver: int, mask_key: bytes
) -> bytes:
    return derive(channel, "box", context, number_bytes(sender), number_bytes(receiver), mask_key)


def agreement_tag(
    channel: bytes, context: bytes, sender: int, receiver: int, survivors: bytes
) -> bytes:
    """Return what only the two ends of a channel can make: the sender was told these survivors (as
    the bytes of their positions)."""
    key = derive(channel, "agreement", context, number_bytes(sender), number_bytes(receiver))
    return hmac.new(key, survivors, hashlib.sha256).digest()[:TAG_BYTES]


def mask_private_key(mask_seed: bytes, context: bytes) -> bytes:
    """Return the X25519 private key of the pairwise masks of one round."""
    return derive(mask_seed, "mask key", context)


def pair_mask_key(private: bytes, peer_public: bytes, context: bytes, own: int, peer: int) -> bytes:
    """Return the stream key of the mask that two sites share, from the private mask key of one and
    the public one of the other; both ends get the same."""
    ends = number_bytes(min(own, peer)), number_bytes(max(own, peer))
    return derive(shared_secret(private, peer_public), "pair mask", context, *ends)


def self_mask_key(self_seed: bytes, context: bytes) -> bytes:
    """Return the stream key of the mask that a site adds by itself."""
    return derive(self_seed, "self mask", context)


def commitment(self_seed: bytes, context: bytes) -> bytes:
    """Return what tells the server that the self seed it put together is the site's."""
    return derive(self_seed, "self commitment", context)


Words = NDArray[np.unsignedinteger[Any]]
BLOCK_BYTES = 1 << 17
"""Worked on at a time, by all streams: vector and stream stay in the processor's cache."""


def ring_type(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the type of a ring's words, little endian; its sums wrap."""
    return np.dtype(f"<u{bits // 8}")


def add_masks(vector: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the streams of some keys to a vector, and take those of others away, in place.

    Args:
        vector: ring words, one-dimensional and contiguous.
        plus: keys of 32 bytes, each of which has made no other stream.
        minus: the same, of the streams to take away.
    """
    streams: list[tuple[Any, np.ufunc]] = [(mask_stream(key), np.add) for key in plus]
    streams += [(mask_stream(key), np.subtract) for key in minus]
    zeros, buffer = bytes(BLOCK_BYTES), bytearray(BLOCK_BYTES)
    mask = np.frombuffer(buffer, vector.dtype)
    step = len(mask)
    for start in range(0, len(vector), step):
        piece = vector[start : start + step]
        still = memoryview(zeros)[: piece.nbytes]
        for stream, apply in streams:
            stream.update_into(still, buffer)
            apply(piece, mask[: len(piece)], out=piece)


def mask_stream(key: bytes) -> Any:
    """Return the keystream of a key, as a cipher that has not begun."""
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
