"""One configuration of a cluster: everything that a user may say of it that holds wherever its nodes run.

`run`, `Cluster` and the command line take the fields of `ClusterConfig` as they are: their keywords, options,
environment variables and help are made from this file, so a new field is added here alone. What differs from
machine to machine (addresses, certificates, engines) is no part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypedDict, Unpack, runtime_checkable

from headwater import messages as m
from headwater.errors import ConfigurationError
from headwater.spec.amounts import one_of, whole
from headwater.spec.every import Every
from headwater.spec.keywords import means
from headwater.spec.placement import SLOTS
from headwater.spec.registry import load_rules
from headwater.spec.seconds import seconds
from headwater.spec.sync import Mode, parse_sync
from headwater.spec.user_settings import checked
from headwater.spec.words import option

OnServerLoss: TypeAlias = Literal["rewind", "stop"]


@runtime_checkable
class PathLike(Protocol):
    """A path as an object, such as `pathlib.Path`."""

    def __fspath__(self) -> str:
        """The path as text."""


class ClusterOptions(TypedDict, total=False):
    """The fields of `ClusterConfig` as keywords."""

    workers: int
    servers: int
    sync: str | Mode
    replicas: int
    settings: Mapping[str, Any] | None
    checkpoint: str | PathLike | None
    resume: bool
    every: str | int | Every
    keep: int
    on_server_loss: OnServerLoss | None
    min_workers: int
    patience: float
    deadline: float
    lease: float
    rules: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """What is said of a cluster, checked.

    Raises:
        ConfigurationError: an impossible value, or values that do not go together.
    """

    workers: int = field(
        default=2, metadata=means("Workers that must have joined before anything is committed.", least=1)
    )
    servers: int = field(
        default=1,
        metadata=means(
            "How many equal ranges every model is cut into: a server has one.", least=1, most=SLOTS
        ),
    )
    sync: str = field(
        default="sync",
        metadata=means(
            "When updates are committed and answers may be read: sync, async, ssp:N (lead at most N steps), "
            "sync:quorum=K,grace=SECONDS (backup workers), or a mode of your own by its name.",
            "MODE",
        ),
    )
    replicas: int = field(
        default=0,
        metadata=means("Standbys of every server, 0 or 1, which take over when it is lost.", least=0),
    )
    settings: Mapping[str, Any] = field(
        default_factory=dict,
        metadata=means(
            "Your own, for worker.settings: numbers, texts, None, and lists and dicts of those.", "KEY=VALUE"
        ),
    )
    checkpoint: str = field(
        default="",
        metadata=means(
            "Where checkpoints go: a directory or fsspec URL that every server reaches, of one cluster.",
            "DIR",
        ),
    )
    resume: bool = field(
        default=False,
        metadata=means(
            "Begin with the latest good checkpoint there and its positions; anew where there is none yet."
        ),
    )
    every: Every = field(
        default=Every(seconds=60.0),
        metadata=means("Between checkpoints: commits (100 or 100steps) or seconds (30s).", "N[steps]|Ns"),
    )
    keep: int = field(default=3, metadata=means("How many checkpoints stay.", least=1))
    on_server_loss: OnServerLoss | None = field(
        default=None,
        metadata=means(
            "When a shard is lost with all its copies: rewind to the latest checkpoint, the default where "
            "there are any, or stop.",
            "rewind|stop",
        ),
    )
    min_workers: int = field(
        default=1, metadata=means("With fewer workers than that nothing is committed.", least=1)
    )
    patience: float = field(
        default=10.0,
        metadata=means("Seconds after which a wait is reported, half the deadline at most.", "SECONDS"),
    )
    deadline: float = field(default=600.0, metadata=means("Seconds after which a wait fails.", "SECONDS"))
    lease: float = field(
        default=15.0,
        metadata=means("Seconds after which a node that is not heard of is declared dead.", "SECONDS"),
    )
    rules: tuple[str, ...] = field(
        default=(),
        metadata=means(
            "Modules with rules and modes of your own, which every node loads at its start.", "MODULE"
        ),
    )

    @classmethod
    def of(cls, **options: Unpack[ClusterOptions]) -> ClusterConfig:
        """The configuration that a user's keywords say, whose mode every server can know; raises as the
        class."""
        if isinstance(mode := options.get("sync"), Mode):
            parse_sync(mode)
        return cls(**options)  # type: ignore[arg-type]  # `__post_init__` checks and converts

    def __post_init__(self) -> None:
        self._load_rules()
        for one in dataclasses.fields(self):
            if one.metadata["least"] is not None:
                least, most = one.metadata["least"], one.metadata["most"]
                self._set(one.name, _count(one.name, getattr(self, one.name), least, most))
        for name in ("patience", "deadline", "lease"):
            self._set(name, seconds(option(name), getattr(self, name)))
        # A wait that ends before anybody has said for whom it is could only be reported as silence.
        self._set("patience", min(self.patience, self.deadline / 2))
        self._set("sync", str(self.sync if isinstance(self.sync, Mode) else parse_sync(self.sync)))
        self._set("settings", checked({} if self.settings is None else self.settings))
        self._set("checkpoint", _directory(self.checkpoint))
        self._set("every", Every.parse(self.every))
        if self.replicas > 1:
            raise ConfigurationError(f"{option('replicas')} must be 0 or 1, got {self.replicas!r}")
        if self.min_workers > self.workers:
            raise ConfigurationError(
                f"{option('min_workers')} must be at most {option('workers', self.workers)}, "
                f"got {self.min_workers}"
            )
        self._check_checkpoints()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _load_rules(self) -> None:
        """First of all, as a mode of the user's own is in one of them."""
        listed = isinstance(self.rules, Sequence) and not isinstance(self.rules, str)
        if not listed or not all(isinstance(name, str) for name in self.rules):
            raise ConfigurationError(
                f"{option('rules')}: got {self.rules!r}, expected a list of module names"
            )
        self._set("rules", tuple(self.rules))
        for module in self.rules:
            load_rules(module)

    def _check_checkpoints(self) -> None:
        if not isinstance(self.resume, bool):
            raise ConfigurationError(f"{option('resume')} must be True or False, got {self.resume!r}")
        if self.on_server_loss is not None:
            one_of(option("on_server_loss"), self.on_server_loss, ("rewind", "stop"))
        if self.checkpoint:
            return
        for name in ("resume", "every", "keep", "on_server_loss"):
            value = getattr(self, name)
            if value not in _WITHOUT_CHECKPOINTS[name]:
                raise ConfigurationError(
                    f"{option(name, value)} has no effect without checkpoints: "
                    f"pass {option('checkpoint', 'DIR')}, or leave it out"
                )

    @property
    def mode(self) -> Mode:
        """What `sync` means."""
        return parse_sync(self.sync)

    @property
    def rewinds(self) -> bool:
        """Whether training begins anew from a checkpoint when a shard is lost."""
        return bool(self.checkpoint) and self.on_server_loss != "stop"

    def assignment(
        self, role: m.ServerRole, index: int, restore: str = "", cluster: str = ""
    ) -> m.Assignment:
        """What a server or standby of this cluster is to be."""
        return m.Assignment(
            index,
            self.servers,
            self.sync,
            role,
            self.replicas,
            self.min_workers,
            self.patience,
            restore,
            cluster,
        )

    def kept(self) -> dict[str, Any]:
        """What must be the same when a coordinator starts again: all that members were told or go by."""
        names = ("workers", "servers", "sync", "settings", "patience", "deadline", "lease", "replicas")
        return {name: getattr(self, name) for name in (*names, "rewinds", "min_workers")}


_WITHOUT_CHECKPOINTS = {
    "resume": (False,),
    "every": (Every(seconds=60.0),),
    "keep": (3,),
    "on_server_loss": (None, "stop"),
}
"""The values that say nothing of checkpoints."""


def _count(name: str, value: Any, least: int, most: int) -> int:
    return whole(option(name), value, least, most)


def _directory(value: object) -> str:
    """ "" for none."""
    path = value.__fspath__() if isinstance(value, PathLike) else value
    if path is not None and not isinstance(path, str):
        raise ConfigurationError(f"{option('checkpoint')}: got {value!r}, expected a directory or URL")
    return path or ""
