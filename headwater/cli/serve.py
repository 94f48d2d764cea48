"""`headwater serve`: what it takes to run nodes by hand, on machines of different networks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from headwater.cli.faults import faults_reported
from headwater.errors import ConfigurationError
from headwater.wire.certificates import Signed, load_authority, new_authority, new_node, write_new

_AUTHORITY = "ca"
_THIS_MACHINE = "node"

serve = typer.Typer(
    help="Run nodes by hand, and make the certificates that they show each other.", no_args_is_help=True
)


@serve.callback()
def _commands() -> None:
    """Keep `certificates` a command of its own while it is the only one."""


@serve.command()
def certificates(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files are written.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="A machine, by every host name and IP address that others dial it with; repeatable. "
            "Without: this machine.",
        ),
    ] = None,
) -> None:
    """Make an authority, and a certificate for each machine, for TLS between nodes.

    Writes ca.pem and ca.key, and NAME.pem and NAME.key for each machine. An authority that is there
    already is used again, so machines can be added later; no file is ever overwritten. Every node needs
    ca.pem and its own two files; ca.key stays where it is.

    [bold]Examples[/bold]

    headwater serve certificates certs --host node1,10.0.0.1 --host node2,10.0.0.2
    """
    with faults_reported():
        for line in make_certificates(directory, host or []):
            print(line)


def make_certificates(directory: Path, hosts: list[str]) -> list[str]:
    """Write the files; return what was written, in words.

    Raises:
        ConfigurationError: a file exists, half an authority is there, or a name is not one.
    """
    own, key = _files(directory, _AUTHORITY)
    new = not own.exists() and not key.exists()
    authority = new_authority() if new else load_authority(own, key)
    nodes = [_node(directory, authority, machine) for machine in _machines(hosts).items()]
    for certificate, secret, _, _ in nodes:
        for path in (certificate, secret):
            if path.exists():
                raise ConfigurationError(f"{path} exists: remove it first, or name another directory")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make {directory}: {error}") from error
    lines = []
    if new:
        write_new(authority, own, key)
        lines.append(f"{own}: the authority, for every node; {key.name} makes nodes: keep it secret")
    for certificate, secret, signed, names in nodes:
        write_new(signed, certificate, secret)
        until = signed.certificate.not_valid_after_utc.date()
        lines.append(f"{certificate} and {secret.name}: {', '.join(names)}; valid until {until}")
    return lines


def _machines(hosts: list[str]) -> dict[str, list[str]]:
    """The names of each machine, by the name of its files."""
    if not hosts:
        return {_THIS_MACHINE: [socket.gethostname(), "localhost", "127.0.0.1", "::1"]}
    machines: dict[str, list[str]] = {}
    for host in hosts:
        names = [name.strip() for name in host.split(",")]
        stem = names[0].replace(":", "_")
        if stem in machines or stem == _AUTHORITY:
            raise ConfigurationError(f"--host {names[0]!r}: its files would be those of another: rename it")
        machines[stem] = names
    return machines


def _node(
    directory: Path, authority: Signed, machine: tuple[str, list[str]]
) -> tuple[Path, Path, Signed, list[str]]:
    stem, names = machine
    signed = new_node(authority, names)  # refuses what is no host name, so what is no file name either
    return (*_files(directory, stem), signed, names)


def _files(directory: Path, stem: str) -> tuple[Path, Path]:
    return directory / f"{stem}.pem", directory / f"{stem}.key"
