"""Simulated clusters as tests of the log use them: with programs of their own, and failures at their word."""

from typing import Any

from headwater import messages as m
from headwater.spec.rules import Accumulate, Rule
from headwater.testing.processes.host import Host
from headwater.testing.processes.network import End
from headwater.testing.world import World

SHAPES = {"a": (3,), "b": (20, 75), "c": (4000,), "empty": (0, 4), "scalar": ()}
"""Six pages: five servers have some each, and no tensor but `a` starts where a range does."""

MOST_LOSSES = 30
"""Of connections in one run: each makes ten messages, so with more a run might never end."""


def model_spec(
    name="model", shapes=None, rule: Rule | None = None, rules=(), groups=None, clip_norm=None
) -> m.ModelSpec:
    rules = rules or (rule or Accumulate(),)
    tensors = [
        m.TensorSpec(tensor, tuple(shape), "float32", (groups or {}).get(tensor, 0))
        for tensor, shape in (shapes or SHAPES).items()
    ]
    return m.ModelSpec(name, tuple(tensors), tuple(rule.to_spec() for rule in rules), clip_norm)


class Cluster(World):
    """`private`: values travel instead of being shared."""

    def __init__(self, mode: str, *, private: bool = False, **arguments: Any) -> None:
        super().__init__(mode, shares=not private, **arguments)

    def begin(self) -> None:
        """Until the declared workers have joined."""
        while not (self.shards and self.shards[0].standings.started):
            self.step()

    def go(self, entries: int) -> None:
        """Until so many more entries have been processed, or nothing happens any more."""
        end = len(self.log) + entries
        while len(self.log) < end and not self.is_over() and self.step():
            pass

    def settle(self) -> None:
        """Until whoever is started now has all that there is."""
        end = self.agenda.now + 0.5
        while self.agenda.now < end and self.step():
            pass

    def rest(self) -> None:
        """Until nothing happens any more."""
        while not self.is_over() and self.step():
            pass


def lose(source, target) -> None:
    """Everything that is on its way from one process to another never arrives."""
    for end in source.ends:
        if end.peer.process is target:
            end._way._frames.clear()


class FlakyCluster(Cluster):
    """Members lose connections: before anything happens one of them does with probability `flaky`."""

    def __init__(self, mode: str, *, flaky: float = 0.0, **arguments: Any) -> None:
        super().__init__(mode, **arguments)
        self.flaky = flaky
        self.losses = 0

    def step(self) -> bool:
        flaky = self.losses < MOST_LOSSES and self.random.random() < self.flaky
        if flaky and (living := self.living()):
            self.losses += 1
            self.random.choice(living).lose()
        return super().step()


class ReplicatedCluster(FlakyCluster):
    """Every server has a standby; servers die, standbys take over, and others are started in their place."""

    def __init__(self, mode: str, **arguments: Any) -> None:
        super().__init__(mode, replicas=1, beats=True, **arguments)
        self._zombies: set[Host] = set()

    @property
    def takeovers(self) -> int:
        return sum(host.role == "server" for host in self.hosts[self.servers :])

    def kill_server(self, index: int, *, zombie: bool = False) -> bool:
        """A primary dies, or is taken for dead and goes on; whether its standby can take over."""
        if not self.coordinator.book.complete() or not self.is_replicated(index):
            return False
        server = self.serving[index]
        if not self._is_well(server):
            return False
        if zombie:
            self._zombies.add(server)
            self._membership(server)[0].break_off(self.random)
        else:
            self.kill(server)
        return True

    def kill_standby(self, index: int) -> None:
        """Its server goes on alone, until there is another."""
        standby = self.standby(index)
        if standby is not None and standby.alive and self._is_well(self.serving[index]):
            self.kill(standby)

    def _is_well(self, server: Host) -> bool:
        """Whether it lives, and the coordinator has no reason yet to think otherwise."""
        return server.alive and server not in self._zombies and bool(self._membership(server))

    @staticmethod
    def _membership(server: Host) -> list[End]:
        """Its open connections to the coordinator: one, until it is struck off."""
        return [end for end in server.ends if end.label.startswith(f"{server.name} – coordinator")]
