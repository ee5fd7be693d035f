"""The key pair with which a site signs in: EC P-384 in OpenSSH's format, as Flower wants it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deal_core.errors import UserError
from deal_core.secure_sum.keys import fingerprint, site_of, site_of_line


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


def fingerprint_of_line(line: str) -> str:
    """Return the fingerprint of a public key's line, as ``ssh-keygen -l`` prints it."""
    return fingerprint(site_of_line(line.encode()))


def fingerprint_of_private_key(path: Path) -> str:
    """Return the fingerprint of the public half of a private key.

    Raises:
        UserError: no such file, or no private key of a site in it.
    """
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path}: no private key of deal site init; restore your backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: not an EC key; deal site init makes one")
    return fingerprint(site_of(key.public_key()))
