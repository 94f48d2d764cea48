"""Certificates for a cluster of one's own: an authority, and node certificates that it signs.

Only this file needs the `cryptography` package; connections use the standard library's ssl. A node's
certificate serves both as listener and as caller, so it carries both purposes; its names are what
others dial. Nothing is ever overwritten, and keys are readable by their owner only.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.errors import ConfigurationError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

AUTHORITY_DAYS = 3650
NODE_DAYS = 825
_SKEW = datetime.timedelta(hours=1)  # a node whose clock is behind may use it at once


@dataclass(frozen=True, slots=True)
class Signed:
    """A certificate and its private key."""

    certificate: Certificate
    key: EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        """Return the certificate as PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        """Return the key as PEM, not encrypted."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def new_authority(days: float = AUTHORITY_DAYS) -> Signed:
    """Make an authority: whoever holds its key can make nodes.

    Raises:
        ConfigurationError: the `cryptography` package is not installed.
    """
    x509 = _x509()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The name holds the key's own digest: two authorities are then never taken for each other.
    name = _name(f"headwater authority {identifier.digest.hex()[:16]}")
    builder = (
        _begun(name, name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
    )
    return Signed(builder.sign(key, hashes.SHA256()), key)


def new_node(authority: Signed, names: Sequence[str], days: float = NODE_DAYS) -> Signed:
    """Make the certificate of one node, which others dial as any of `names`, host names or IP addresses.

    `days` from now may be negative: an expired certificate.

    Raises:
        ConfigurationError: a name is neither, or there is none.
    """
    x509 = _x509()
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if not names:
        raise ConfigurationError("a node's certificate needs at least one host name or IP address")
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = authority.certificate
    purposes = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _begun(_name(f"headwater node {names[0]}"[:64]), issuer.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
        )
    )
    return Signed(builder.sign(authority.key, hashes.SHA256()), key)


def load_authority(certificate: Path, key: Path) -> Signed:
    """Read an authority back from its two files.

    Raises:
        ConfigurationError: one cannot be read, or they do not belong together.
    """
    x509 = _x509()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        signed = x509.load_pem_x509_certificate(certificate.read_bytes())
        secret = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"cannot read the authority {certificate} and {key}: {error}") from error
    if not isinstance(secret, EllipticCurvePrivateKey) or secret.public_key() != signed.public_key():
        raise ConfigurationError(f"{key} is not the key of {certificate}: make a new authority elsewhere")
    return Signed(signed, secret)


def write_new(signed: Signed, certificate: Path, key: Path) -> None:
    """Write both files, the key with mode 600.

    Raises:
        ConfigurationError: one exists, or cannot be written.
    """
    for path, data, mode in ((key, signed.key_pem(), 0o600), (certificate, signed.certificate_pem(), 0o644)):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "wb") as file:
                file.write(data)
        except OSError as error:
            raise ConfigurationError(f"cannot write {path}: {error}") from error


def _x509() -> Any:
    try:
        from cryptography import x509
    except ImportError as error:
        raise ConfigurationError(
            "making certificates needs the package cryptography: pip install '.[tls]' in a clone"
        ) from error
    return x509


def _name(text: str) -> Any:
    x509 = _x509()
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _begun(name: Any, issuer: Any, key: EllipticCurvePrivateKey, days: float) -> Any:
    x509 = _x509()
    now = datetime.datetime.now(datetime.UTC)
    ends = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, ends) - _SKEW)
        .not_valid_after(ends)
    )


def _usage(*, signs_certificates: bool) -> Any:
    return _x509().KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(name: str) -> Any:
    x509 = _x509()
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass  # not an address, so a name
    try:
        ascii_name = name.encode("idna").decode("ascii")
        plausible = ascii_name[:1].isalnum() and all(c.isalnum() or c in "-._" for c in ascii_name)
    except UnicodeError:
        plausible = False
    if not plausible:
        raise ConfigurationError(f"{name!r} is neither a host name nor an IP address")
    return x509.DNSName(ascii_name)
