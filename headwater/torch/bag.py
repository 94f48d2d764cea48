"""Bags of ids, each reduced to one row.

Invariants:
- Padding is taken out of its bag before anything else, so it counts nowhere.
- Conventions are those of torch.nn.EmbeddingBag; a bag without ids is zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from headwater.errors import ConfigurationError, UsageError
from headwater.kernels.arrange import Ids, Plan
from headwater.spec.initializers import Initializer
from headwater.spec.lifetime import AfterCount, Expiry
from headwater.spec.rules import Rule
from headwater.torch.embedding import INITIAL, Array, Mask, TableModule, host_ids, sums_of, uncompiled
from headwater.worker import Worker

BagMode: TypeAlias = Literal["sum", "mean", "max"]

_MODES: dict[str, int] = {"sum": 0, "mean": 1, "max": 2}
"""As torch.embedding_bag numbers them."""


class EmbeddingBag(TableModule):
    """A `torch.nn.EmbeddingBag` whose rows are those of a table: any int64 is an id, negative ones too.

    Args:
        worker: joined, used by this thread.
        name, dim, rule, initializer, seed, admission, expiry: of the table, see `Worker.table`.
        mode: what becomes of a bag's rows: "sum", "mean" or "max", column by column.
        padding_idx: the id that counts nowhere, as if it were not in its bag. Not counted from the end.
        include_last_offset: `offsets` has one entry more, the number of ids, as in the CSR format.

    Raises:
        ConfigurationError: another mode, or a `padding_idx` that is no int64.
        RegistrationError: not a table, or another one than already registered; names both.
    """

    def __init__(
        self,
        worker: Worker,
        name: str,
        dim: int,
        rule: Rule,
        *,
        mode: BagMode = "mean",
        initializer: Initializer = INITIAL,
        seed: int = 0,
        admission: AfterCount | None = None,
        expiry: Expiry | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> None:
        if mode not in _MODES:
            raise ConfigurationError(f"mode must be 'sum', 'mean' or 'max', got {mode!r}")
        super().__init__(
            worker,
            name,
            dim,
            rule,
            initializer=initializer,
            seed=seed,
            admission=admission,
            expiry=expiry,
            padding_idx=padding_idx,
        )
        self.mode = mode
        self.include_last_offset = include_last_offset

    def forward(
        self, input: Any, offsets: Any = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32[bags, dim] on the device of `input`; blocks for an exchange unless prefetched.

        Args:
            input: ids, integers [bags, length], or [n] with `offsets`.
            offsets: integers [bags], where each bag begins, from 0 on and not falling; with
                `include_last_offset` the number of ids, last.
            per_sample_weights: floats of the shape of `input`, each row's factor, with mode "sum"; they
                get gradients.

        Raises:
            UsageError: ids, offsets or weights that do not fit these rules; says which.
            ClosedError: the worker has left.
            StalledError: no answer within the deadline.
        """
        return uncompiled(self._look_up, input, offsets, per_sample_weights)

    def _look_up(self, input: Any, offsets: Any, per_sample_weights: torch.Tensor | None) -> torch.Tensor:
        given, device = host_ids(input)
        weights = self.checked(given.shape, per_sample_weights)
        return self.reduce(self.in_bags(given, offsets), weights, device)

    def in_bags(self, given: Ids, offsets: Any) -> Bags:
        """The ids of a forward in their bags, without padding. Raises UsageError as `forward`."""
        starts, ends = _bounds(given, offsets, self.include_last_offset)
        flat = given.reshape(-1)
        return Bags.of(flat, starts, ends, self.kept(flat))

    def reduce(self, bags: Bags, weights: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """float32[bags, dim]; `weights`: floats [n], of all ids that were given."""
        return cast(torch.Tensor, _Reduce.apply(self._anchor, weights, self, bags, device))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Name, dim, padding and mode."""
        return f"{super().extra_repr()}, mode={self.mode!r}"

    def checked(self, shape: tuple[int, ...], weights: torch.Tensor | None) -> torch.Tensor | None:
        """`weights` flat, where they go with ids of this shape. Raises UsageError."""
        if weights is None:
            return None
        if self.mode != "sum":
            raise UsageError(f"per_sample_weights go with mode='sum', this module has mode={self.mode!r}")
        if not isinstance(weights, torch.Tensor) or not weights.dtype.is_floating_point:
            got = getattr(weights, "dtype", type(weights).__name__)
            raise UsageError(f"per_sample_weights must be a tensor of floats, got {got}")
        if tuple(weights.shape) != shape:
            raise UsageError(
                f"per_sample_weights must have the ids' shape, {shape}, got {tuple(weights.shape)}"
            )
        return weights.reshape(-1)


def _bounds(given: Ids, offsets: Any, include_last: bool) -> tuple[Ids, Ids]:
    """Where each bag begins and ends among the ids: int64[bags] each.

    Raises:
        UsageError: not such offsets; says what is wrong with them.
    """
    if given.ndim == 2:
        if offsets is not None:
            raise UsageError("offsets go with 1-D ids; of 2-D ids each row is a bag: leave offsets out")
        ends = np.arange(1, len(given) + 1, dtype=np.int64) * given.shape[1]
        return ends - given.shape[1], ends
    if given.ndim != 1:
        raise UsageError(f"ids must be 1-D with offsets, or 2-D with a bag a row, got shape {given.shape}")
    if offsets is None:
        raise UsageError("1-D ids need offsets that say where each bag begins, got None")
    begins, _ = host_ids(offsets)
    check_offsets(begins, len(given), include_last)
    if include_last:
        return begins[:-1], begins[1:]
    return begins, np.append(begins[1:], len(given)) if len(begins) else begins


def check_offsets(begins: Ids, count: int, include_last: bool) -> None:
    """Refuse what cannot say where each bag of `count` ids begins; raises UsageError."""
    if begins.ndim != 1:
        raise UsageError(f"offsets must be 1-D, got shape {begins.shape}")
    if not len(begins):
        if include_last or count:
            raise UsageError(f"offsets is empty, but there are {count} ids: it must begin with 0")
        return
    if begins[0] != 0 or (np.diff(begins) < 0).any() or begins[-1] > count:
        raise UsageError(
            f"offsets must begin with 0, never fall and end at most at {count}, the number of ids, "
            f"got {begins[:8].tolist()}{'…' if len(begins) > 8 else ''}"
        )
    if include_last and begins[-1] != count:
        raise UsageError(
            f"with include_last_offset the last of offsets must be {count}, the number of ids, "
            f"got {begins[-1]}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """Ids in bags, without padding; all int64.

    Attributes:
        ids: [n], bag after bag.
        starts, counts: [bags], where each bag begins, and how many ids it has.
        kept: which ids of those that were given are these; None for all.
    """

    ids: Ids
    starts: torch.Tensor
    counts: torch.Tensor
    kept: Mask | None

    @classmethod
    def of(cls, flat: Ids, starts: Ids, ends: Ids, kept: Mask | None) -> Bags:
        if kept is not None:
            before = np.concatenate([[0], np.cumsum(kept)])
            flat, starts, ends = flat[kept], before[starts], before[ends]
        return cls(flat, torch.tensor(starts), torch.from_numpy(ends - starts), kept)

    def spread(self, per_bag: torch.Tensor) -> torch.Tensor:
        """[bags, …] → [n, …]: of each id, what its bag has."""
        return per_bag.repeat_interleave(self.counts, dim=0, output_size=len(self.ids))


class _Reduce(torch.autograd.Function):
    """Ids in bags → a row for each bag; back, gradients of rows → `collected`, and those of the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        weights: torch.Tensor | None,
        module: EmbeddingBag,
        bags: Bags,
        device: torch.device,
    ) -> torch.Tensor:
        ctx.module, ctx.bags = module, bags
        ctx.save_for_backward(weights)
        factors = _kept_weights(weights, bags)
        keeps_rows = ctx.needs_input_grad[1]

        def reduce(plan: Plan, rows: Array) -> tuple[torch.Tensor, torch.Tensor | None, Array | None]:
            if not len(plan.ids):
                return torch.zeros(len(bags.starts), module.dim), None, rows
            out, _, _, largest = torch.embedding_bag(
                torch.from_numpy(rows),
                torch.from_numpy(plan.inverse),
                bags.starts,
                mode=_MODES[module.mode],
                per_sample_weights=factors,
            )
            return out, largest, rows.copy() if keeps_rows else None

        ctx.plan, (out, ctx.largest, ctx.rows) = module.table.local.read(bags.ids, reduce)
        return out.to(device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor | None, None, None, None]:
        bags, plan = ctx.bags, ctx.plan
        (weights,) = ctx.saved_tensors
        gradient = gradient.cpu()
        if ctx.module.mode == "max":
            ctx.module.collected.add(plan, _sums_of_largest(plan, bags, ctx.largest, gradient))
            return None, None, None, None, None
        if ctx.module.mode == "mean":
            gradient = gradient / bags.counts.clamp(min=1).unsqueeze(1)
        by_id = bags.spread(gradient)
        of_weights = None
        if ctx.needs_input_grad[1]:
            rows = torch.from_numpy(plan.scatter(ctx.rows))
            of_weights = torch.zeros(len(weights))
            of_weights[_positions(bags)] = (rows * by_id).sum(dim=1)
            of_weights = of_weights.to(weights)
        factors = _kept_weights(weights, bags)
        if factors is not None:
            by_id.mul_(factors.unsqueeze(1))
        ctx.module.collected.add(plan, sums_of(plan, by_id.numpy()))
        return None, of_weights, None, None, None


def _positions(bags: Bags) -> Any:
    """Where the ids of bags stand among the weights that were given."""
    return slice(len(bags.ids)) if bags.kept is None else torch.from_numpy(np.flatnonzero(bags.kept))


def _kept_weights(weights: torch.Tensor | None, bags: Bags) -> torch.Tensor | None:
    """float32[n] on the CPU: the weights of the ids that count."""
    return None if weights is None else weights.detach().to("cpu", torch.float32)[_positions(bags)]


def _sums_of_largest(plan: Plan, bags: Bags, largest: torch.Tensor | None, gradient: torch.Tensor) -> Array:
    """float32[u, dim]: each bag's gradient where its largest value came from, summed by id."""
    sums = torch.zeros(len(plan.ids), gradient.shape[1])
    if largest is not None:
        filled = bags.counts > 0
        sums.scatter_add_(0, largest[filled], gradient[filled])
    return cast(Array, sums.numpy())
