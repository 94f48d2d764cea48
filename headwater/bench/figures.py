"""What a benchmark reports: a figure, the limit measured in the same run, their ratio and its target."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from headwater.bench.resnet import resnet50_shapes


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: each case `repeats` times in turns, `rounds` rounds a time, on this model."""

    repeats: int
    rounds: int
    shapes: Mapping[str, tuple[int, ...]]

    def tensors(self, value: float = 0.0) -> dict[str, NDArray[np.float32]]:
        """The model's tensors, every page of them written."""
        return {name: np.full(shape, value, dtype=np.float32) for name, shape in self.shapes.items()}


FULL = Effort(repeats=11, rounds=12, shapes=resnet50_shapes())
QUICK = Effort(repeats=3, rounds=4, shapes=resnet50_shapes())


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a report.

    Attributes:
        figure, limit: medians, both in `unit`.
        limit_name: what the limit is.
        ratio: of the two times where the most is a target, of the two rates where the least is.
        target: what the ratio must not exceed (`at_most`) or must reach; None where none was set.
        interval: where the true ratio lies with a probability of 95 %; None where it was not found.
    """

    case: str
    figure: float
    unit: str
    limit_name: str
    limit: float
    ratio: float
    target: float | None = None
    at_most: bool = True
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the ratio is what it must be; None without a target."""
        if self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target


def rounds_per_second(
    case: str, seconds: Sequence[float], limit_name: str, limit: Sequence[float], target: float | None = None
) -> Figure:
    """From seconds a round; the ratio is of times and `target` its most."""
    figure, best = median(seconds), median(limit)
    return Figure(case, 1 / figure, "rounds/s", limit_name, 1 / best, figure / best, target)


def complain(line: str) -> None:
    """Take what a node prints: standard output is the report's."""
    print(line, file=sys.stderr)


def machine() -> dict[str, str]:
    """What the figures depend on besides Headwater."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "headwater": version("headwater"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
