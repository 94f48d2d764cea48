"""Gradients that a commit needs measured: who is measured together, and what the servers have said of it.

A model that is clipped needs the norm of the merged gradient, one that is merged by lengths the products of
all pairs of gradients. Lost with the sequencer, and asked anew by the next one.

Invariant: a measurement counts for exactly those whose exchanges it was made of, so nobody who comes or goes
meanwhile makes it wrong.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from headwater.log.norms import Node, total
from headwater.log.pending import PendingExchange
from headwater.log.rda import coefficients
from headwater.messages import Ratio, Scales, Sum, Sums

LARGEST = -2
"""Stands for the tensor of what is a largest magnitude and no sum."""

_Key: TypeAlias = tuple[tuple[int, int], ...]
"""Member and number of each exchange."""

_What: TypeAlias = tuple[int, int, int, int]
"""Model, tensor and the two updates of what is summed, as in `Sum`."""


@dataclass(slots=True, eq=False)
class _Measure:
    key: _Key
    position: int
    version: int
    parts: dict[int, tuple[Sum, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MeasuredGradients:
    """Of one commit, as its entry has them.

    Attributes:
        norms: (model, norm of the merged gradient) of each model that was measured.
        scales: of each tensor that is merged by lengths.
        correlations: (model, cosine of the merged gradient and the last one) of each model that keeps that.
        ratios: of each tensor whose rule is layerwise.
    """

    norms: tuple[tuple[int, float], ...] = ()
    scales: tuple[Scales, ...] = ()
    correlations: tuple[tuple[int, float], ...] = ()
    ratios: tuple[Ratio, ...] = ()


NOT_MEASURED = MeasuredGradients()


class Measures:
    """For `servers` servers."""

    def __init__(self, servers: int) -> None:
        self._servers = servers
        self._of: dict[int, _Measure] = {}
        self._at: dict[int, _Measure] = {}

    def __bool__(self) -> bool:
        """Whether a server has yet to say something, so that what everybody waits for may still come."""
        return any(len(measure.parts) < self._servers for measure in self._at.values())

    def under_way(self, exchanges: Sequence[PendingExchange], version: int) -> bool:
        """Whether servers have been asked to measure exactly these; in this version, where that matters."""
        measure = self._of.get(exchanges[0].member)
        if measure is None or measure.key != _key(exchanges):
            return False
        return measure.version == version or not any(one.held and one.held.current for one in exchanges)

    def begin(self, exchanges: Sequence[PendingExchange], position: int, version: int) -> None:
        """The entry at `position` asks for them, in this version; what was asked of some of them before, with
        others, is void."""
        for exchange in exchanges:
            self.forget(exchange)
        measure = self._at[position] = _Measure(_key(exchanges), position, version)
        self._of.update((exchange.member, measure) for exchange in exchanges)

    def add(self, server: int, sums: Iterable[Sums]) -> None:
        """A server's parts; those that nobody asks for any more change nothing."""
        for one in sums:
            if one.position in self._at:
                self._at[one.position].parts[server] = one.parts

    def result(self, exchanges: Sequence[PendingExchange]) -> MeasuredGradients | None:
        """What the servers have measured of these; None until every server has said its part."""
        measure = self._of[exchanges[0].member]
        if len(measure.parts) < self._servers:
            return None
        of: defaultdict[_What, list[Node]] = defaultdict(list)
        for server in measure.parts.values():
            for part in server:
                what = part.model, part.tensor, part.first, part.second
                of[what].append((part.level, part.index, part.value))
        weights = [exchange.weight for exchange in exchanges]
        return _measured({what: total(nodes) for what, nodes in of.items()}, weights)

    def totals(self, exchanges: Sequence[PendingExchange]) -> tuple[float, ...] | None:
        """The reductions that these asked for, by number; None until every server has said its part."""
        measure = self._of[exchanges[0].member]
        if len(measure.parts) < self._servers:
            return None
        parts = [part for server in measure.parts.values() for part in server]
        numbers = range(1 + max((part.first for part in parts), default=-1))
        return tuple(_total([part for part in parts if part.first == number]) for number in numbers)

    def missing(self, exchange: PendingExchange) -> list[int]:
        """The servers whose part of what this exchange is measured in is still out."""
        measure = self._of.get(exchange.member)
        return [i for i in range(self._servers) if i not in measure.parts] if measure is not None else []

    def forget(self, exchange: PendingExchange) -> None:
        """Its exchange is over, or measured otherwise."""
        measure = self._of.get(exchange.member) if self._of else None
        if measure is not None:
            del self._at[measure.position]
            for member, _ in measure.key:
                del self._of[member]


def _measured(sums: Mapping[_What, float], weights: Sequence[float]) -> MeasuredGradients:
    """From the sums of all servers, and the weights of the updates."""
    squares: defaultdict[int, float] = defaultdict(float)
    scales: list[Scales] = []
    ratios: list[Ratio] = []
    alike: defaultdict[int, Likeness] = defaultdict(Likeness)
    last = len(weights)
    for model, tensor in sorted({(model, tensor) for model, tensor, *_ in sums}):
        products = {pair[2:]: value for pair, value in sums.items() if pair[:2] == (model, tensor)}
        if tensor < 0:
            squares[model] += products[0, 0]
            if (1, 1) in products:
                alike[model].add(products[1, 1], products[1, 2], products[2, 2])
            continue
        if (-1, -1) in products:
            ratios.append(Ratio(model, tensor, trust(products[-1, -1], products[-2, -2])))
            continue
        contributors = {i: weights[i] for i, j in products if i == j != last}
        factors, length = coefficients(products, contributors)
        scales.append(Scales(model, tensor, tuple(factors.get(i, 0.0) for i in range(len(weights)))))
        squares[model] += length * length
        if (last, last) in products:
            crossed = math.fsum(factor * products.get((i, last), 0.0) for i, factor in factors.items())
            alike[model].add(length * length, crossed, products[last, last])
    return MeasuredGradients(
        tuple((model, math.sqrt(squares[model])) for model in sorted(squares)),
        tuple(scales),
        tuple((model, cosine) for model in sorted(alike) if (cosine := alike[model].cosine) is not None),
        tuple(ratios),
    )


def trust(values: float, directions: float) -> float:
    """‖values‖ / ‖directions‖ from sums of squares; 1 where one of them is 0 (You et al. 2020)."""
    return math.sqrt(values) / math.sqrt(directions) if values > 0 and directions > 0 else 1.0


@dataclass(slots=True)
class Likeness:
    """Sums for the cosine between what is merged and what was merged last."""

    merged: float = 0.0
    crossed: float = 0.0
    last: float = 0.0

    def add(self, merged: float, crossed: float, last: float) -> None:
        """Of another part of the model."""
        self.merged, self.crossed, self.last = self.merged + merged, self.crossed + crossed, self.last + last

    @property
    def cosine(self) -> float | None:
        """From -1 to 1; None where one of the two is 0, or not finite."""
        square = self.merged * self.last
        if not 0.0 < square < math.inf:
            return None
        length = math.sqrt(square)
        return max(-1.0, min(1.0, self.crossed / length))


def _total(parts: Sequence[Sum]) -> float:
    if any(part.tensor == LARGEST for part in parts):
        values = [part.value for part in parts]
        return math.nan if any(map(math.isnan, values)) else max(values)
    return total((part.level, part.index, part.value) for part in parts)


def _key(exchanges: Iterable[PendingExchange]) -> _Key:
    return tuple((exchange.member, exchange.id.number) for exchange in exchanges)
