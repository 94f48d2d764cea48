"""Options that several commands share: made from what they configure, and given to the command as one value.

An option on the command line counts before its environment variable, which every option of every command has:
HEADWATER_MIN_WORKERS for --min-workers. A token is never an option: command lines are there for everybody on
the machine to read.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from headwater.cli.assignments import parse_settings
from headwater.cli.faults import faults_reported
from headwater.cli.log_lines import LogStyle
from headwater.errors import ConfigurationError
from headwater.spec.cluster import ClusterConfig
from headwater.wire.endpoint import Endpoint
from headwater.wire.security import TLS, Security

FROM_ENVIRONMENT: dict[str, Any] = {
    "auto_envvar_prefix": "HEADWATER",
    "help_option_names": ["-h", "--help"],
}
"""Settings of every command."""

_EPILOG = "Every option can be an environment variable: HEADWATER_MIN_WORKERS for --min-workers."

_TOKEN = "HEADWATER_TOKEN"

Address = Annotated[
    str | None,
    typer.Argument(
        metavar="[ADDRESS]",
        envvar="HEADWATER_COORDINATOR",
        help="The cluster: what `headwater run` or `headwater serve coordinator` printed. "
        "Without: the variable HEADWATER_COORDINATOR.",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where Prometheus scrapes metrics; beyond loopback a token or TLS is demanded.",
    ),
]
Otlp = Annotated[
    str | None,
    typer.Option(metavar="URL", help="An OpenTelemetry collector that gets the metrics every 10 s."),
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND:PATH",
        help="Where what workers log is written: tensorboard:DIR, jsonl:FILE or csv:FILE; repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a command line that together are one argument of a command.

    Attributes:
        parameters: as typer reads them from a function's signature.
        make: from their values, by name.
    """

    parameters: list[inspect.Parameter]
    make: Callable[[Mapping[str, Any]], Any]


def command(app: typer.Typer, name: str | None = None, **options: Options) -> Callable[[Command], Command]:
    """Decorator: a command of `app`, whose arguments of these names stand for these options.

    What is wrong with them is reported as `faults_reported` does, as everything that the command raises.
    """

    def decorate(function: Command) -> Command:
        parameters: list[inspect.Parameter] = [_CONTEXT]
        for one in inspect.signature(function, eval_str=True).parameters.values():
            parameters += options[one.name].parameters if one.name in options else [_by_name(one)]
        for one in parameters:
            for info in getattr(one.annotation, "__metadata__", ()):
                info.show_envvar = False  # the help says it once

        @functools.wraps(function)
        def call(headwater_context: typer.Context, **values: Any) -> None:
            with faults_reported(headwater_context):
                for name, of in options.items():
                    own = {one.name: values.pop(one.name) for one in of.parameters}
                    values[name] = of.make(own)
                function(**values)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in parameters}
        app.command(name, context_settings=FROM_ENVIRONMENT, epilog=_EPILOG)(call)
        return function

    return decorate


def the(address: str | None) -> str:
    """An address that was given.

    Raises:
        ConfigurationError: none was.
    """
    if not address:
        raise ConfigurationError(
            "of which cluster? Pass the ADDRESS that `headwater run` or `headwater serve coordinator` "
            "printed, or set HEADWATER_COORDINATOR"
        )
    return address


def configuration(*required: str, without: Collection[str] = ()) -> Options:
    """The options of `ClusterConfig` but for `without`; without a default where they are required."""
    fields = [one for one in dataclasses.fields(ClusterConfig) if one.name not in without]
    return Options(
        [_of_field(one, one.name in required) for one in fields],
        lambda values: ClusterConfig.of(**_values(values)),
    )


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    """As `ClusterConfig` takes them."""
    own = dict(values)
    own["settings"] = parse_settings(own["settings"] or ())
    own["rules"] = own["rules"] or ()
    return own


def _of_field(field: dataclasses.Field[Any], required: bool) -> inspect.Parameter:
    """An option for a field of a configuration."""
    about = field.metadata
    flag = "--set" if field.name == "settings" else f"--{field.name.replace('_', '-')}"
    envvar = "HEADWATER_SET" if field.name == "settings" else None
    kind, default = _kind(field)
    many = kind == list[str] | None
    text = f"{about['help'].rstrip('.')}; repeatable." if many else about["help"]
    option = typer.Option(
        flag,
        help=text,
        metavar=about["metavar"] or ("N" if kind is int else None),
        min=about["least"],
        envvar=envvar,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, option],
    )


def _kind(field: dataclasses.Field[Any]) -> tuple[Any, Any]:
    """The type that a command line reads, and the default that its help shows."""
    default = field.default
    if default is dataclasses.MISSING or isinstance(default, tuple):
        return list[str] | None, None
    if isinstance(default, bool | int | float):
        return type(default), default
    return str | None, str(default) if default else None


# ── who is admitted, and where a node listens ───────────────────────────────────────────────────


def credentials() -> Options:
    """What is proven to the nodes that are dialled: a `Security`."""
    return Options(list(_PROOFS), lambda values: security_of(**values))


def log_style() -> Options:
    """How a command logs: a `LogStyle`."""
    return Options(
        list(_LOGGING), lambda values: LogStyle(values["log_level"], values["log_format"] or "text")
    )


def listening() -> Options:
    """Where a node listens, and whom it admits: an `Endpoint`."""

    def make(values: Mapping[str, Any]) -> Endpoint:
        own = dict(values)
        bind, advertise = own.pop("bind"), own.pop("advertise")
        return Endpoint(bind, advertise, security_of(**own))

    return Options([*_PLACES, *_PROOFS, _INSECURE], make)


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


def _token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(_TOKEN) or None
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read a token from {file}: {error}") from error


def _by_name(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _parameter(
    name: str, kind: Any, help: str, metavar: str | None = None, default: Any = None
) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", metavar=metavar, help=help)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


_CONTEXT = inspect.Parameter("headwater_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_PLACES = (
    _parameter(
        "bind",
        str | None,
        "Listen for nodes of other machines too: an address of this one, or 0.0.0.0 or :: for all.",
        "HOST[:PORT]",
    ),
    _parameter("advertise", str | None, "What others dial, where it is not what --bind says.", "HOST[:PORT]"),
)
_LOGGING = (
    _parameter("log_level", str | None, "The least that is logged: debug, info, warning or error.", "LEVEL"),
    _parameter("log_format", str, "How lines are logged: text or json.", "FORMAT", "text"),
)
_PROOFS = (
    _parameter(
        "token_file",
        Path | None,
        "A secret that all nodes share; or the environment variable HEADWATER_TOKEN.",
        "FILE",
    ),
    _parameter("tls_ca", Path | None, "The authority that all nodes believe.", "FILE"),
    _parameter("tls_certificate", Path | None, "This machine's certificate.", "FILE"),
    _parameter("tls_key", Path | None, "This machine's key.", "FILE"),
)
_INSECURE = _parameter(
    "insecure", bool, "Listen beyond this machine with neither a token nor TLS.", default=False
)
