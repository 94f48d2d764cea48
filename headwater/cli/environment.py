"""Options that several commands share, and the one place that knows the names of environment variables.

An option on the command line counts before its variable. A token is never an option: command lines are
there for everybody on the machine to read.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_type_hints

import typer

from headwater.cli.faults import faults_reported
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

_CREDENTIALS = {
    "token_file": TokenFile,
    "tls_ca": TlsCa,
    "tls_certificate": TlsCertificate,
    "tls_key": TlsKey,
}


def takes_credentials(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of credentials, in the place of its parameter `security`, which they become.

    Every command that dials a cluster is one of these, so that all take the same. One that listens too has an
    option `insecure`.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "security":
            parameters += [
                parameter.replace(name=name, annotation=annotation, default=None)
                for name, annotation in _CREDENTIALS.items()
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def with_credentials(**options: Any) -> None:
        given = {name: options.pop(name) for name in _CREDENTIALS}
        with faults_reported():
            security = security_of(**given, insecure=options.get("insecure", False))
        command(**options, security=security)

    with_credentials.__annotations__ = {one.name: one.annotation for one in parameters}
    with_credentials.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_credentials


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
