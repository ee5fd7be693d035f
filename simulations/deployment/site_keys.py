"""The key pair with which a site signs in: EC P-384 in OpenSSH's format, as Flower wants it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.errors import UserError


@dataclass(frozen=True)
class KeyPair:
    """A private key and its public half, as the bytes of their files."""

    private: bytes
    public: bytes


def make_key_pair(comment: str) -> KeyPair:
    """Return a new pair; ``comment`` ends the public line."""
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.Encoding.OpenSSH
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(openssh, serialization.PublicFormat.OpenSSH)
    return KeyPair(private, public + b" " + comment.encode() + b"\n")


def read_public_key(path: Path) -> str:
    """Return the line of a public key, without its comment.

    Raises:
        UserError: no such file, or no public key of a site in it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if b"PRIVATE KEY" in data:
        raise UserError(f"{path}: this is a private key, which must stay at its site; use KEY.pub")
    try:
        key = serialization.load_ssh_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path}: no public key; use the .pub file of deal site init") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(f"{path}: not an EC key; use the .pub file of deal site init")
    return " ".join(data.decode().split()[:2])
