"""Places reserved in a Ray cluster: a connection to it, and a placement group for each kind of node."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray.runtime_env import RuntimeEnv
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headwater.engines.ray import RayEngine
from headwater.errors import ConfigurationError, EngineError
from headwater.spec.words import option, wording
from headwater.wire.addresses import split_place
from headwater.wire.endpoint import EVERYWHERE

_PROBE_S = 5.0
_RAYS_NAMES = {"num_cpus": "CPU", "num_gpus": "GPU"}


class RayConnection:
    """This process as a driver of a Ray cluster; `close` ends that only if it began here."""

    def __init__(self, options: RayEngine) -> None:
        self._own = not ray.is_initialized()
        runtime_env = dict(options.runtime_env or {})
        if self._own:
            _begin(options.address, runtime_env)
            self._of_actors: dict[str, Any] = {}  # Ray adds the job's
        else:
            _check_same(options.address)
            _check_uploaded(runtime_env)
            self._of_actors = runtime_env

    def environment(self, resources: Mapping[str, float]) -> dict[str, Any]:
        """The runtime environment of actors: as many threads as reserved cores, unless the user said."""
        threads = str(max(1, int(resources.get("num_cpus", 0))))
        variables = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            **ray.get_runtime_context().runtime_env.get("env_vars", {}),
            **self._of_actors.get("env_vars", {}),
        }
        return {**self._of_actors, "env_vars": variables}

    def close(self) -> None:
        """Leave the Ray cluster, or end the one that was started here."""
        if self._own:
            ray.shutdown()


class Places:
    """Reserved bundles of resources, one for each node of a kind.

    Attributes:
        machines: for each place, the Ray node that it was reserved on.
    """

    def __init__(self, count: int, resources: Mapping[str, float], strategy: str, timeout: float) -> None:
        """Reserve; blocks until all places are there.

        Raises:
            EngineError: they were not within `timeout` seconds; says what the Ray cluster has.
        """
        self._resources = {name: amount for name, amount in resources.items() if amount}
        bundle = {_RAYS_NAMES.get(name, name): amount for name, amount in self._resources.items()}
        self._group: PlacementGroup = placement_group([bundle] * count, strategy=strategy)
        try:
            if not self._group.wait(timeout):
                raise EngineError(
                    f"no places for {count} × {bundle} within {timeout:g} s: {_has()}. Reserve less, "
                    "add nodes, wait for other jobs to end, or give a longer timeout"
                )
            self.machines = self._machines()
        except BaseException:
            self.remove()
            raise

    def _machines(self) -> list[str]:
        by_place = placement_group_table(self._group)["bundles_to_node_id"]
        return [by_place[place] for place in sorted(by_place)]

    def check_reachable(self, address: str, bind: str | None) -> None:
        """Unix sockets lead to processes of this host alone, and only a host can listen at an address of it.

        `address`: the coordinator's; `bind`: where nodes in these places listen, None where they do not.

        Raises:
            ConfigurationError: some places are on other hosts, where nobody reaches `address` or has `bind`.
        """
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        others = {hosts[machine] for machine in self.machines if machine in hosts} - {socket.gethostname()}
        if address.startswith("unix:") and others:
            raise ConfigurationError(
                f"Ray's nodes on {', '.join(sorted(others))} cannot reach this cluster, whose coordinator "
                f"listens at {address} on {socket.gethostname()}: give it an address for other hosts, with "
                f"{option('bind', '0.0.0.0')} and {wording('tls or a token', 'TLS or a --token-file')}"
            )
        if others and bind is not None and split_place(bind)[0] not in EVERYWHERE:
            raise ConfigurationError(
                f"{option('bind', bind)} is an address of {socket.gethostname()}, but servers are to listen "
                f"on {', '.join(sorted(others))} too: pass {option('bind', '0.0.0.0')}, or '::' for IPv6"
            )

    def options(self, place: int) -> dict[str, Any]:
        """What an actor in that place is created with."""
        known = ("num_cpus", "num_gpus", "memory")
        return {
            "num_cpus": 0,
            **{name: amount for name, amount in self._resources.items() if name in known},
            "resources": {name: amount for name, amount in self._resources.items() if name not in known},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, place),
        }

    def remove(self) -> None:
        """Give the places back."""
        remove_placement_group(self._group)


def _begin(address: str | None, runtime_env: dict[str, Any]) -> None:
    known = address or _address_from_environment()
    if known is not None:
        _probe(known)
    try:
        ray.init(address, runtime_env=runtime_env, log_to_driver=False, include_dashboard=False)
    except Exception as error:
        where = f"the Ray cluster at {known}" if known else "a Ray cluster"
        raise EngineError(f"cannot use {where}: {type(error).__name__}: {error}") from error


def _address_from_environment() -> str | None:
    """The address that `ray.init()` will use because the environment names it."""
    address = os.environ.get("RAY_ADDRESS", "")
    return address if ":" in address else None


def _probe(address: str) -> None:
    """Fail now: where nobody listens, Ray tries again for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except (OSError, ValueError) as error:
        raise EngineError(f"no Ray cluster answers at {address}: {error}") from error


def _check_same(address: str | None) -> None:
    used = ray.get_runtime_context().gcs_address
    if address is not None and address != used:
        raise ConfigurationError(
            f"address: got {address!r}, but this process uses Ray at {used} already: leave address out"
        )


def _check_uploaded(runtime_env: dict[str, Any]) -> None:
    """Ray uploads directories for a whole job only, when the driver connects."""
    try:
        RuntimeEnv(**runtime_env)
    except Exception as error:
        raise ConfigurationError(f"runtime_env: {error}") from error
    for path in [runtime_env.get("working_dir"), *runtime_env.get("py_modules", ())]:
        if path is not None and "://" not in str(path):
            raise ConfigurationError(
                f"runtime_env: {path} is local, and this process uses Ray already: give it to your own "
                "ray.init(runtime_env=…), which uploads it"
            )


def _has() -> str:
    """What the Ray cluster has in all and free, in words."""
    nodes = [_amounts(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    free = _amounts(ray.available_resources())
    return f"the Ray cluster has {len(nodes)} node(s) with {'; '.join(nodes)}, and free are {free}"


def _amounts(resources: Mapping[str, float]) -> str:
    """Without what Ray keeps for itself: memory, and names such as node:ADDRESS and bundle_group_ID."""
    own = re.compile("^node:|_group_|memory")
    named = sorted((name, amount) for name, amount in resources.items() if not own.search(name))
    return ", ".join(f"{name} {amount:g}" for name, amount in named) or "nothing"
