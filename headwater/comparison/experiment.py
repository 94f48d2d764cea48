"""An experiment: which modes meet which stragglers, how often, and what is compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from headwater.comparison.target import Target, parse_target
from headwater.errors import ConfigurationError
from headwater.spec.amounts import one_of, shown, whole
from headwater.spec.cluster import ClusterConfig
from headwater.spec.seconds import seconds
from headwater.spec.stragglers import Straggler, parse_straggler
from headwater.spec.sync import Mode, parse_sync
from headwater.spec.words import option
from headwater.worker.plan import SplitKind

Value = TypeVar("Value")

_CALIBRATION = 30
_LARGEST = 10_000


@dataclass(frozen=True, slots=True)
class Experiment:
    """All that is said of a comparison beside the cluster, checked.

    Attributes:
        modes, stragglers: in the order in which they are shown.
        seeds: how many; seeds are 0, 1, ….
        target: what is compared.
        smooth: how many logged values are averaged before they are compared with the target.
        simulate: numbers of workers to predict.
        step_s: how long an undisturbed step takes, in seconds; None: measured before.
        engine: "local" or "inline".
        splits: "static", or "dynamic" where modes without rounds lease splits.
    """

    modes: tuple[str, ...]
    stragglers: tuple[Straggler, ...]
    seeds: int
    target: Target
    smooth: int = 10
    simulate: tuple[int, ...] = ()
    step_s: float | None = None
    engine: str = "local"
    splits: SplitKind = "static"

    @staticmethod
    def of(
        config: ClusterConfig,
        *,
        modes: Sequence[str | Mode],
        stragglers: Sequence[str | Straggler],
        seeds: int,
        until: str,
        smooth: int,
        simulate: Sequence[int],
        step_s: float | None,
        engine: str,
        splits: SplitKind = "static",
    ) -> Experiment:
        """What a user says, checked.

        Raises:
            ConfigurationError: impossible or contradictory arguments; nothing was started.
        """
        of_modes = tuple(str(parse_sync(mode)) for mode in _several("modes", modes))
        slow = tuple(parse_straggler(one) for one in _several("stragglers", stragglers))
        _refuse_twice("modes", of_modes)
        _refuse_twice("stragglers", [str(one) for one in slow])
        seeds, smooth = whole(option("seeds"), seeds, 1, 2**31), whole(option("smooth"), smooth, 1, 2**31)
        if not isinstance(simulate, Iterable):
            raise ConfigurationError(
                f"{option('simulate')}: got {shown(simulate)}, expected numbers of workers"
            )
        sizes = tuple([whole(option("simulate"), size, 1, _LARGEST) for size in simulate])
        step_s = None if step_s is None else seconds(option("step_s"), step_s)
        one_of(option("engine"), engine, ("local", "inline"))
        one_of(option("splits"), splits, ("static", "dynamic"))
        for one in slow:
            _check_straggler(one, config, engine)
        return Experiment(of_modes, slow, seeds, parse_target(until), smooth, sizes, step_s, engine, splits)

    def runs(self) -> Iterator[tuple[Straggler, int, str]]:
        """Straggler, seed and mode of each run, in an order that spreads what changes on the machine.

        All modes of one seed come after each other, and every seed begins with another mode.
        """
        for straggler in self.stragglers:
            for seed in range(self.seeds):
                turn = seed % len(self.modes)
                for mode in (*self.modes[turn:], *self.modes[:turn]):
                    yield straggler, seed, mode

    @property
    def calibration(self) -> int:
        """Steps of each worker in the runs that measure how long things take."""
        return _CALIBRATION


def check_folder(folder: str | Path) -> Path:
    """Where a report goes; made if it is not there.

    Raises:
        ConfigurationError: it cannot be made, or is a file.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{option('out')}: cannot make the folder {path}: {error.strerror}"
        ) from error
    return path


def _several(name: str, values: Sequence[Value]) -> Sequence[Value]:
    if isinstance(values, str) or not values:
        raise ConfigurationError(f"{option(name)}: got {values!r}, expected a list of at least one")
    return values


def _refuse_twice(name: str, texts: Sequence[str]) -> None:
    twice = sorted({text for text in texts if list(texts).count(text) > 1})
    if twice:
        raise ConfigurationError(f"{option(name)}: {', '.join(twice)} stands there twice: leave one out")


def _check_straggler(straggler: Straggler, config: ClusterConfig, engine: str) -> None:
    for rank in straggler.ranks():
        if rank >= config.workers:
            raise ConfigurationError(
                f"{option('stragglers')}: {straggler} names worker {rank}, and there are "
                f"{config.workers}: ranks are 0 to {config.workers - 1}"
            )
        if straggler.outage(rank) is not None and engine == "inline":
            raise ConfigurationError(
                f"{option('stragglers')}: {straggler} kills a process, and with engine='inline' all workers "
                "are threads of this one: use engine='local'"
            )
        if straggler.outage(rank) is not None and config.workers == 1:
            raise ConfigurationError(
                f"{option('stragglers')}: {straggler} kills the only worker: "
                f"pass {option('workers', 2)} or more"
            )
