"""Keys and certificates: the key pair with which a site signs in (EC P-384 in OpenSSH's format, as
Flower wants it), a private certificate authority with the server's certificate from it, and
private keys on disk, which only their owner may read."""

import ipaddress
import os
import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

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
WARN_DAYS = 30


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read, from the first moment on."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"{path}: there is a key already; keep it, or move it away") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def check_secret(path: Path) -> None:
    """Raise :class:`UserError` unless a private key is there, and readable by its owner alone."""
    if not path.is_file():
        raise UserError(f"{path}: no such key; deal site init makes one, or restore your backup")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(f"{path}: others can read this private key; run chmod 600 {path}")


class KeyPair(NamedTuple):
    """A private key and its public half, a line or a certificate, as the bytes of their files."""

    private: bytes
    public: bytes


def make_key_pair(comment: str) -> KeyPair:
    """Return a new pair; ``comment`` ends the public line."""
    key = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.Encoding.OpenSSH
    public = key.public_key().public_bytes(openssh, serialization.PublicFormat.OpenSSH)
    line = public + b" " + comment.encode() + b"\n"
    return KeyPair(_pem(key, serialization.PrivateFormat.OpenSSH), line)


def read_public_key(path: Path) -> str:
    """Return the line of a site's public key, without its comment; UserError: there is none."""
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
    """Return the fingerprint of the public half of a site's key; UserError: there is none."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UserError(f"{path}: no private key of deal site init; restore your backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: not an EC key; deal site init makes one")
    return fingerprint(site_of(key.public_key()))


def expiring(*certificates: Path) -> Iterator[str]:
    """Yield a line for each certificate that has expired, or will within :data:`WARN_DAYS`."""
    for path in certificates:
        try:
            found = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            yield f"{path}: no certificate; restore your backup"
            continue
        if said := expiry(found.not_valid_after_utc):
            yield f"{path}: {said}"


def expiry(end: datetime) -> str:
    """Return what is said of a certificate that is valid until ``end``; empty: it is for long."""
    days = (end - datetime.now(UTC)).days
    if days > WARN_DAYS:
        return ""
    when = f"on {end:%Y-%m-%d}"
    said = f"expired {when}, and no site connects" if days < 0 else f"expires {when}"
    return f"{said}; renew it (docs/DEPLOYMENT.md)"


def make_authority() -> KeyPair:
    """Return a new authority (EC P-256, ten years); it can sign servers, and nothing below."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name("federated-deal authority")
    limits = x509.BasicConstraints(ca=True, path_length=0)
    return _signed(key, name, name, key, AUTHORITY_DAYS, limits)


def make_server_certificate(authority: KeyPair, hosts: Sequence[str]) -> KeyPair:
    """Return a certificate for host names and addresses, the first as common name, and its key."""
    parent = x509.load_pem_x509_certificate(authority.public)
    signer = serialization.load_pem_private_key(authority.private, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    return _signed(
        ec.generate_private_key(ec.SECP256R1()),
        _common_name(hosts[0][:64]),
        parent.subject,
        signer,
        SERVER_DAYS,
        x509.BasicConstraints(ca=False, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectAlternativeName([_named(host) for host in hosts]),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
    )


def _signed(
    key: ec.EllipticCurvePrivateKey,
    subject: x509.Name,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    limits: x509.BasicConstraints,
    *extensions: x509.ExtensionType,
) -> KeyPair:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not limits.ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=limits.ca,
        crl_sign=limits.ca,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(limits, critical=True)
        .add_extension(usage, critical=True)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    certificate = builder.sign(signer, hashes.SHA256())
    public = certificate.public_bytes(serialization.Encoding.PEM)
    return KeyPair(_pem(key, serialization.PrivateFormat.PKCS8), public)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _named(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey, kind: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
