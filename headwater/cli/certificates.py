"""`headwater serve certificates`: an authority, and what each machine shows the others."""

from __future__ import annotations

import socket
from pathlib import Path

from headwater.errors import ConfigurationError
from headwater.wire.certificates import Signed, load_authority, new_authority, new_node, write_new

_AUTHORITY = "ca"
_THIS_MACHINE = "node"


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
