"""How a person asks for nodes as actors of a Ray cluster; Ray is imported once a cluster starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from headwater.engines.engine import Engine, Launch
from headwater.errors import ConfigurationError
from headwater.spec.amounts import one_of, real, shown, text
from headwater.spec.seconds import seconds

Strategy: TypeAlias = Literal["PACK", "SPREAD"]

_RAYS_NAMES = {"CPU": "num_cpus", "GPU": "num_gpus"}


def _one_cpu() -> dict[str, float]:
    return {"num_cpus": 1}


@dataclass(frozen=True, slots=True)
class RayEngine:
    """Servers and workers as actors of a Ray cluster: `engine=RayEngine(…)`, or "ray" for the defaults.

    Ray starts processes and says when they end; no tensor travels through it. The coordinator stays in the
    calling process, which must be on one of the Ray cluster's machines.

    Args:
        address: "host:port" of the Ray cluster. Without it, the one that this process uses already, or what
            `ray.init()` finds: RAY_ADDRESS, one that runs on this machine, or else a new one.
        server_resources: what every server and standby reserves: `num_cpus`, `num_gpus`, `memory` (bytes),
            or resources of your own by their names in the Ray cluster.
        worker_resources: the same for every worker, which also gets OMP_NUM_THREADS = num_cpus, at least 1,
            unless that is set here or in `runtime_env`.
        strategy: "PACK" puts workers on few of Ray's nodes, "SPREAD" on many, as far as possible. Servers are
            always spread, and a standby is kept apart from its server.
        runtime_env: as for `ray.init`: `working_dir` and `py_modules` bring your modules to other machines.
        timeout: seconds in which a node must have its place.

    Raises:
        ConfigurationError: an impossible argument.
    """

    address: str | None = None
    server_resources: Mapping[str, float] = field(default_factory=_one_cpu)
    worker_resources: Mapping[str, float] = field(default_factory=_one_cpu)
    strategy: Strategy = "PACK"
    runtime_env: Mapping[str, Any] | None = None
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.address is not None:
            _check_address(self.address)
        for name in ("server_resources", "worker_resources"):
            _check_resources(name, getattr(self, name))
        one_of("strategy", self.strategy, ("PACK", "SPREAD"))
        seconds("timeout", self.timeout)

    def start(self, launch: Launch) -> Engine:
        """The engine at work; Ray is imported now, and used when the first node is started.

        Raises:
            ConfigurationError: Ray is not installed.
        """
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"engine 'ray' needs Ray ({error}): pip install '.[ray]' in a clone"
            ) from error
        from headwater.engines.actors import ActorEngine

        return ActorEngine(launch, self)


def _check_address(address: str) -> None:
    text("address", address)
    if address.startswith("ray://"):
        raise ConfigurationError(
            f"address: got {address!r}, of a Ray Client, whose process is outside of the cluster and cannot "
            "be its coordinator: run this on a machine of the cluster, for instance with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ConfigurationError(f"address: got {address!r}, expected host:port of a Ray cluster")


def _check_resources(name: str, resources: Mapping[str, float]) -> None:
    if not isinstance(resources, Mapping):
        raise ConfigurationError(f"{name}: got {shown(resources)}, expected a dict of amounts")
    amounts = dict(resources)
    for resource, amount in amounts.items():
        if resource in _RAYS_NAMES:
            raise ConfigurationError(f"{name}: got {resource!r}, expected {_RAYS_NAMES[resource]!r}")
        amounts[resource] = real(f"{name}: {resource}", amount, zero=True)
    if not any(amounts.values()):
        raise ConfigurationError(
            f"{name}: got {amounts}, which reserves nothing, so nodes would have no places: "
            "give a small share such as num_cpus=0.1"
        )
