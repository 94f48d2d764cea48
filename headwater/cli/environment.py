"""Options that several commands share, and the one place that knows the names of environment variables.

An option on the command line counts before its variable. A token is never an option: command lines are
there for everybody on the machine to read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from headwater.errors import ConfigurationError
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import TLS, Security

_TOKEN = "HEADWATER_TOKEN"

FROM_ENVIRONMENT = {"auto_envvar_prefix": "HEADWATER"}
"""For commands all of whose options can be variables: HEADWATER_MIN_WORKERS for --min-workers, and so on."""

Bind: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="HOST[:PORT]",
        envvar="HEADWATER_BIND",
        help="Listen for nodes of other machines too: an address of this one, or 0.0.0.0 or :: for all.",
    ),
]
Advertise: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="HOST[:PORT]",
        envvar="HEADWATER_ADVERTISE",
        help="What others dial, where it is not what --bind says.",
    ),
]
TokenFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="HEADWATER_TOKEN_FILE",
        help="A secret that all nodes share; or the environment variable HEADWATER_TOKEN.",
    ),
]
TlsCa: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="HEADWATER_TLS_CA", help="The authority that all nodes believe."),
]
TlsCertificate: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="HEADWATER_TLS_CERTIFICATE", help="This machine's certificate."),
]
TlsKey: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", envvar="HEADWATER_TLS_KEY", help="This machine's key."),
]
Insecure: TypeAlias = Annotated[
    bool, typer.Option("--insecure", help="Listen beyond this machine with neither token nor TLS.")
]


def security_of(
    token_file: Path | None = None,
    tls_ca: Path | None = None,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    insecure: bool = False,
) -> Security:
    """What the options say that nodes must prove.

    Raises:
        ConfigurationError: some of the three files without the others, no readable token, or too short a one.
    """
    files = {"--tls-ca": tls_ca, "--tls-certificate": tls_certificate, "--tls-key": tls_key}
    missing = [option for option, path in files.items() if path is None]
    if 0 < len(missing) < len(files):
        raise ConfigurationError(f"TLS needs three files: {', '.join(missing)} is missing")
    tls = None
    if tls_ca is not None and tls_certificate is not None and tls_key is not None:
        tls = TLS(tls_ca, tls_certificate, tls_key)
    return Security(_token(token_file), tls, insecure)


def reach_of(bind: str | None, advertise: str | None, security: Security) -> Endpoint:
    """Where the options say that a node listens.

    Raises:
        ConfigurationError: as `Endpoint`.
    """
    return Endpoint(bind, advertise, security)


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read a token from {file}: {error}") from error
