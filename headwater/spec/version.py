"""Which version of a training a reader sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Of models and tables together, ordered.

    Attributes:
        generation: how often training began anew from a checkpoint; what came before has a smaller one.
        number: of commits in the log.
    """

    generation: int
    number: int

    def __str__(self) -> str:
        return f"version {self.number}" + (f" of generation {self.generation}" if self.generation else "")
