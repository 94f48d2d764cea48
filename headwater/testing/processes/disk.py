"""The checkpoints of a simulated cluster: what servers have written, and which of them are complete.

What is written outlives every process. As with files, a checkpoint counts once its manifest is there, which
is written last.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

from headwater.errors import CheckpointError
from headwater.machines.memory import CheckpointPlace
from headwater.messages import Stored
from headwater.shard.resumed import Kept, resumed
from headwater.shard.snapshot import ModelSnapshot, ShardSnapshot

DIRECTORY = "simulated://checkpoints"


@dataclass(frozen=True, order=True)
class CheckpointName:
    """A checkpoint by its name; later ones are larger."""

    generation: int
    version: int

    @property
    def path(self) -> str:
        """As its folder is called."""
        return f"{DIRECTORY}/g{self.generation:03d}-v{self.version:09d}"


class Disk:
    """Of one cluster of `servers` servers.

    Attributes:
        complete: by path.
    """

    def __init__(self, servers: int) -> None:
        self.complete: dict[str, CheckpointName] = {}
        self._servers = servers
        self._parts: defaultdict[CheckpointName, dict[int, ShardSnapshot]] = defaultdict(dict)
        self._kept: dict[CheckpointName, Kept] = {}

    def put(self, place: CheckpointPlace, snapshot: ShardSnapshot) -> None:
        """A server writes its part. The memory of its models is used again for the next one."""
        models = tuple(map(_copied, snapshot.models))
        written = CheckpointName(place.generation, place.version)
        self._parts[written][snapshot.index] = dataclasses.replace(snapshot, models=models)

    def commit(self, written: CheckpointName, stored: list[Stored]) -> str:
        """All parts are there: write the manifest; returns the path.

        Raises:
            CheckpointError: a server could not write its part.
        """
        for one in stored:
            if one.failure is not None:
                raise CheckpointError(one.failure.reason)
        first = stored[0]
        assert first.standings is not None
        assert first.recorded is not None
        programs = self._parts[written][0].programs.tobytes()
        self._kept[written] = Kept(written.version, first.standings, first.recorded, programs)
        self.complete[written.path] = written
        return written.path

    def newest(self, since: int = 0) -> str:
        """Path of the newest complete one of these generations; "" where there is none."""
        own = [one for one in self.complete.values() if one.generation >= since]
        return max(own).path if own else ""

    def parts(self, path: str) -> list[ShardSnapshot]:
        """What the servers have written of it, in their order."""
        parts = self._parts[self.complete[path]]
        return [parts[index] for index in sorted(parts)]

    def restored(self, path: str, index: int) -> ShardSnapshot:
        """What a server begins with."""
        written = self.complete[path]
        part = self._parts[written][index]
        return resumed(index, self._servers, self._kept[written], part.models, part.tables)


def _copied(model: ModelSnapshot) -> ModelSnapshot:
    states = {name: state.copy() for name, state in model.states.items()}
    vectors = tuple(vector.copy() for vector in model.vectors)
    return dataclasses.replace(model, values=model.values.copy(), states=states, vectors=vectors)
