"""Rows of a table as the output of a torch module: forward pulls, backward collects, a step sends.

Invariants:
- A module has no parameters: its rows are on the servers, and `to` and `state_dict` do not touch them.
- What backward brings is summed by id at once, in memory of its own, and sent once, by the step after it.
- Padding is taken out before anything travels: its id never gets a row.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd.function import once_differentiable

from headwater.errors import ConfigurationError, UsageError
from headwater.kernels.arrange import Ids, Plan, as_ids
from headwater.spec.initializers import Initializer, Normal
from headwater.spec.lifetime import AfterCount, Expiry
from headwater.spec.rules import Rule
from headwater.worker import Worker

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Output = TypeVar("Output")

INITIAL = Normal(std=0.01)
"""What rows start from by default: small, and different, so that they can part."""


class Collected:
    """Gradients of rows that backward brought and no step has sent yet.

    Attributes:
        rows: a tensor of float32[u, dim] for each backward, of which only `.grad` matters. It is what a
            group of a torch optimizer lists, so whatever goes through those finds the gradients.
    """

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []
        self._plans: list[Plan] = []

    def add(self, plan: Plan, sums: Array) -> None:
        """Take over `sums`, float32[u, dim]: a gradient for each of `plan.ids`."""
        gradient = torch.from_numpy(sums)
        rows = gradient.new_zeros(()).expand(sums.shape)
        rows.grad = gradient
        self.rows.append(rows)
        self._plans.append(plan)

    def parts(self) -> list[tuple[Plan, Array]]:
        """The gradients there are, with their plans."""
        pairs = zip(self._plans, self.rows, strict=True)
        return [(plan, rows.grad.numpy()) for plan, rows in pairs if rows.grad is not None]

    def merge(self, other: Collected) -> None:
        """Take over what another one has."""
        self.rows += other.rows
        self._plans += other._plans
        other.clear()

    def clear(self) -> None:
        """Forget all."""
        self.rows.clear()
        self._plans.clear()


class TableModule(torch.nn.Module):
    """What `Embedding` and `EmbeddingBag` have in common.

    Attributes:
        table: the `headwater.Table`; modules of one name share it.
        dim: columns of a row.
        padding_idx: the id that stands for nothing, or None.
        collected: what the next step of the optimizer sends.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        dim: int,
        rule: Rule,
        *,
        initializer: Initializer = INITIAL,
        seed: int = 0,
        admission: AfterCount | None = None,
        expiry: Expiry | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        _check_padding(padding_idx)
        self.table = worker.table(
            name, dim, rule, initializer=initializer, seed=seed, admission=admission, expiry=expiry
        )
        self.dim = dim
        self.padding_idx = padding_idx
        self.collected = Collected()
        self._anchor = torch.zeros((), requires_grad=True)  # what makes autograd record a look-up

    def prefetch(self, ids: Any) -> None:
        """Have the rows of `ids` ready for the forward of the same ids that follows the next step.

        As `Table.prefetch`: they come with the answer of that step, and are of its version. Does not block.
        A table has one prefetch at a time, the last.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
        """
        self.table.prefetch(self.asked(ids))

    def asked(self, ids: Any) -> Ids:
        """int64[n]: what a forward of these ids asks the table for. Raises UsageError as `prefetch`."""
        given, _ = host_ids(ids)
        given = given.reshape(-1)
        kept = self.kept(given)
        return given if kept is None else given[kept]

    def kept(self, given: Ids) -> Mask | None:
        """Which of int64[n] ids are not padding; None where all are kept."""
        if self.padding_idx is None:
            return None
        kept: Mask = given != self.padding_idx
        return None if kept.all() else kept

    def extra_repr(self) -> str:
        """Name, dim and padding."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.table.name!r}, {self.dim}{padding}"

    def __deepcopy__(self, memo: dict[int, Any]) -> TableModule:
        """A module of the same table, with nothing collected."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            made.__dict__[name] = value if name == "table" else copy.deepcopy(value, memo)
        made.collected = Collected()
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Not possible: what it stands for is on the servers.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{type(self).__name__} of table {self.table.name!r} cannot be pickled: its rows are on the "
            f"servers. Save the module's state_dict(), and make the module anew with a worker"
        )


class Embedding(TableModule):
    """A `torch.nn.Embedding` whose rows are those of a table: any int64 is an id, negative ones too.

    Construction registers the table, or joins the one of this name; blocks for an exchange. The
    `DistributedOptimizer` of a module that contains this one sends its gradients with its step.

    Args:
        worker: joined, used by this thread.
        name, dim, rule, initializer, seed, admission, expiry: of the table, see `Worker.table`.
        padding_idx: the id whose output is zeros and which gets no gradient. Not counted from the end:
            −1 is the id −1.

    Raises:
        ConfigurationError: a `padding_idx` that is no int64.
        RegistrationError: not a table, or another one than already registered; names both.
    """

    def forward(self, ids: Any) -> torch.Tensor:
        """float32[*ids.shape, dim] on the device of `ids`; blocks for an exchange unless prefetched.

        `ids`: integers of any shape, with repeats, on any device. The rows are of one version. In training
        they are collected on backward, summed by id; without grad mode nothing is.

        Raises:
            UsageError: ids that are not integers, or do not fit int64.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        return uncompiled(self._look_up, ids)

    def _look_up(self, ids: Any) -> torch.Tensor:
        given, device = host_ids(ids)
        return cast(torch.Tensor, _LookUp.apply(self._anchor, self, given, device))  # type: ignore[no-untyped-call]


class _LookUp(torch.autograd.Function):
    """Ids → rows; on the way back, gradients of rows → the module's `collected`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, module: TableModule, given: Ids, device: torch.device
    ) -> torch.Tensor:
        flat = given.reshape(-1)
        ctx.kept = module.kept(flat)
        ctx.module = module
        ids = flat if ctx.kept is None else flat[ctx.kept]
        ctx.plan, rows = module.table.local.read(ids, lambda plan, rows: plan.scatter(rows))
        if ctx.kept is not None:
            some, rows = rows, np.zeros((len(flat), module.dim), dtype=np.float32)
            rows[ctx.kept] = some
        return torch.from_numpy(rows.reshape(*given.shape, module.dim)).to(device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        gradients = gradient.cpu().contiguous().numpy().reshape(-1, ctx.module.dim)
        if ctx.kept is not None:
            gradients = gradients[ctx.kept]
        ctx.module.collected.add(ctx.plan, sums_of(ctx.plan, gradients))
        return None, None, None, None


def uncompiled(look_up: Callable[..., Output], *arguments: Any) -> Output:
    """`look_up(*arguments)`, as a break in the graph where torch.compile sees it.

    To mark functions beforehand would import the compiler, a second, for everybody.
    """
    if torch.compiler.is_compiling():
        look_up = torch.compiler.disable(look_up)  # type: ignore[no-untyped-call]
    return look_up(*arguments)


def sums_of(plan: Plan, gradients: Array) -> Array:
    """float32[u, dim]: gradients of each given id, float32[n, dim], summed by id."""
    sums = np.empty((len(plan.ids), gradients.shape[1]), dtype=np.float32)
    if len(plan.ids):
        plan.combine(gradients, sums)
    return sums


def host_ids(ids: Any) -> tuple[Ids, torch.device]:
    """`ids` as an int64 array, and the device they came from.

    Raises:
        UsageError: not integers, or beyond int64.
    """
    if not isinstance(ids, torch.Tensor):
        return as_ids(ids), torch.device("cpu")
    if ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise UsageError(f"ids must be integers, got {ids.dtype}: convert them, for example with long()")
    return as_ids(ids.detach().cpu().numpy()), ids.device


def _check_padding(padding_idx: Any) -> None:
    is_id = isinstance(padding_idx, numbers.Integral) and not isinstance(padding_idx, bool)
    if padding_idx is not None and not (is_id and -(2**63) <= padding_idx < 2**63):
        raise ConfigurationError(
            f"padding_idx must be None or an integer that fits int64, got {padding_idx!r}"
        )
