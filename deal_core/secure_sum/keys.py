"""Keys derived from secrets: HKDF-SHA256, with what they are for as its context."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from deal_core.secure_sum.frames import pack
from deal_core.secure_sum.protocol_error import ProtocolError

KEY_BYTES = 32


def derive(secret: bytes, purpose: str, *context: bytes) -> bytes:
    """Return 32 bytes that depend on the secret, the purpose and all of the context.

    Source: RFC 5869, without salt; ``info`` is the frame of purpose and context.
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
