"""Keys and certificates: the key pair with which a site signs in (EC P-384 in OpenSSH's format, as
Flower wants it), a certificate authority of one's own with the server's certificate from it, and
private keys on disk, which only their owner may read."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deal_core.errors import UserError
from deal_core.secure_sum.keys import fingerprint, site_of, site_of_line

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
"""The longest that common clients accept."""


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read; it is never readable by others, not even
    for a moment.

    Raises:
        UserError: there is such a file, or it cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"{path}: there is a key already; keep it, or move it away") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def check_secret(path: Path) -> None:
    """Check that a private key is there, and for its owner alone.

    Raises:
        UserError: it is missing, or others can read it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such key; deal site init makes one, or restore your backup")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path}: others can read this private key; run chmod 600 {path}")


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


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def make_authority(now: datetime | None = None) -> Pair:
    """Return a new authority (EC P-256, ten years); it can sign servers, and nothing below."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "federated-deal authority")])
    usage = _usage(certificates=True)
    builder = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def make_server_certificate(
    authority: Pair, hosts: Sequence[str], now: datetime | None = None
) -> Pair:
    """Return a certificate for these host names and addresses, and its key.

    Args:
        authority: signs it.
        hosts: at least one; the first is the common name.
        now: start of its life; the clock's when None.
    """
    parent = x509.load_pem_x509_certificate(authority.certificate)
    signer = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    served = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = (
        _builder(name, parent.subject, key.public_key(), SERVER_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(certificates=False), critical=True)
        .add_extension(served, critical=False)
        .add_extension(x509.SubjectAlternativeName([_named(h) for h in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
            critical=False,
        )
    )
    return _pair(builder.sign(signer, hashes.SHA256()), key)


def _named(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime | None,
) -> x509.CertificateBuilder:
    start = now or datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(hours=1))  # clocks differ
        .not_valid_after(start + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(certificate.public_bytes(pem), private)
