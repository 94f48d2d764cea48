"""`--engine` and the options that go with it: where nodes run."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.cli.assignments import parse_settings
from headwater.engines import RayEngine
from headwater.errors import ConfigurationError


def chosen_engine(
    engine: str,
    address: str | None,
    working_dir: str | None,
    server_resources: Sequence[str],
    worker_resources: Sequence[str],
) -> str | RayEngine:
    """The engine as `headwater.run` takes it.

    Raises:
        ConfigurationError: an option of Ray's with another engine, or an impossible value.
    """
    given = {
        "address": address,
        "server_resources": _amounts("--server-resource", server_resources),
        "worker_resources": _amounts("--worker-resource", worker_resources),
        "runtime_env": {"working_dir": working_dir} if working_dir else None,
    }
    options = {name: value for name, value in given.items() if value}
    if engine == "ray":
        return RayEngine(**options)  # type: ignore[arg-type]
    if options:
        raise ConfigurationError(
            f"--ray-address, --working-dir, --server-resource and --worker-resource go with --engine ray, "
            f"got --engine {engine}"
        )
    return engine


def _amounts(option: str, assignments: Sequence[str]) -> dict[str, float]:
    amounts: dict[str, float] = {}
    for name, amount in parse_settings(assignments, option).items():
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise ConfigurationError(f"{option} takes NAME=AMOUNT, got {name}={amount}")
        amounts[name] = amount
    return amounts
