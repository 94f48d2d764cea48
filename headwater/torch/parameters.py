"""A module's parameters and their places in a model's window.

Invariants:
- A float32 parameter on the CPU *is* its place in the window; any other keeps memory of its own and is
  copied, through pinned memory where it is on a GPU.
- Every tensor here has a storage of its own, of its own size, that keeps the window mapped as long as it
  lives: `torch.save` writes no more than the tensor, and nothing dangles after `leave`.
- What the user holds as a gradient of an earlier backward stays what it was, as in torch.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from headwater.errors import ConfigurationError, GradientError, UsageError
from headwater.kernels import finite, finite_sum, stage

Array = NDArray[np.float32]


class BoundParameter:
    """One parameter of a module, bound to its gradient and its value in the window.

    Construction moves a float32 parameter of the CPU onto the window, whose value it thereby takes.

    Attributes:
        name, parameter: as in the module.
        gradient, value: float32 tensors over the window's memory.
        mapped: whether the parameter itself lies in the window.
    """

    def __init__(
        self, module: torch.nn.Module, name: str, parameter: torch.nn.Parameter, gradient: Array, value: Array
    ) -> None:
        prefix, _, self._leaf = name.rpartition(".")
        self._owner = module.get_submodule(prefix)
        self._module = module
        self.name = name
        self.parameter = parameter
        self._gradients = gradient.reshape(-1)
        self.value = torch.from_numpy(value)
        self._address = self.value.data_ptr()  # `share_memory_` changes that of every tensor of the storage
        self._kind = (parameter.device, parameter.dtype)
        self.mapped = self._kind == (torch.device("cpu"), torch.float32)
        on_gpu = parameter.device.type == "cuda"
        self._pinned = torch.empty_like(parameter, device="cpu", pin_memory=True) if on_gpu else None
        self._renew_gradient()
        if self.mapped:
            parameter.data = self.value

    # ── gradients ───────────────────────────────────────────────────────────────────────────────

    def watch(self) -> RemovableHandle:
        """From now on, move each gradient into the window as soon as backward has it, while it is in cache.

        Only of mapped parameters. The hook keeps nothing alive.
        """
        mine = weakref.ref(self)

        def take(parameter: torch.Tensor) -> None:
            bound = mine()
            if bound is not None:
                bound._take_fresh()

        handle: RemovableHandle = self.parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        return handle

    def _take_fresh(self) -> None:
        """Exchange a gradient that backward allocated for the window's, which later ones add to."""
        grad = self.parameter.grad
        if grad is None or grad is self.gradient or grad.requires_grad or not _is_plain(grad):
            return
        self._protect_held_gradient()
        stage(grad.numpy().reshape(-1), self._gradients, False)
        self.parameter.grad = self.gradient

    def _protect_held_gradient(self) -> None:
        """Give whoever kept the gradient of an earlier backward that tensor with memory of its own."""
        if sys.getrefcount(self.gradient) > self._references:
            self.gradient.data = self.gradient.clone()
            self._renew_gradient()

    def _renew_gradient(self) -> None:
        self.gradient = torch.from_numpy(self._gradients.reshape(self.parameter.shape))
        self._references = sys.getrefcount(self.gradient)

    def to_host(self) -> torch.Tensor:
        """The gradient that a step must send, on the CPU; of a GPU's parameter after `wait_for_copies`.

        Raises:
            GradientError: it is sparse.
        """
        grad = self.parameter.grad
        assert grad is not None
        if grad.layout is not torch.strided:
            raise GradientError(
                f"the gradient of parameter {self.name!r} is sparse, but models are dense: "
                f"make its layer with sparse=False"
            )
        if grad is not self.gradient:
            grad = grad.detach()
        return grad if self._pinned is None else self._pinned.copy_(grad, non_blocking=True)

    def is_finite(self, host: torch.Tensor, add: bool) -> bool:
        """Whether the window would be finite with what `to_host` returned in it, or added there."""
        if host is self.gradient:
            return finite(self._gradients)
        source = _flat(host)
        return finite_sum(source, self._gradients) if add else finite(source)

    def stage(self, host: torch.Tensor, add: bool = False) -> bool:
        """Have what `to_host` returned in the window, or add it there; whether it is finite then.

        A gradient that is in the window already is read once more: what was written to it through `.data` or
        an array that shares its memory left no trace.
        """
        if host is self.gradient:
            return finite(self._gradients)
        if not add:
            self._protect_held_gradient()
        return stage(_flat(host), self._gradients, add)

    # ── values ──────────────────────────────────────────────────────────────────────────────────

    def load(self) -> None:
        """Copy the window's value into a parameter that has memory of its own; after `wait_for_copies`."""
        if self._pinned is not None:
            self._pinned.copy_(self.value)
            self.parameter.data.copy_(self._pinned, non_blocking=True)
        elif not self.mapped:
            self.parameter.data.copy_(self.value)

    def store(self) -> None:
        """Copy the parameter into the window's value; blocks until it is there."""
        if not self.mapped:
            self.value.copy_(self.parameter.detach())

    def check(self) -> None:
        """Refuse to go on with a parameter that is not where construction left it.

        Raises:
            UsageError: it was moved, converted or replaced; names it and says what to do.
        """
        parameter = self.parameter
        in_place = self._owner._parameters.get(self._leaf) is parameter
        if not in_place and not any(parameter is other for other in self._module.parameters()):
            raise UsageError(
                f"parameter {self.name!r} of the module was replaced by another one, which would not be "
                f"trained: replace parameters (as load_state_dict(assign=True) does) before you make the "
                f"DistributedOptimizer, or copy values with torch.no_grad() and copy_"
            )
        if (parameter.device, parameter.dtype) != self._kind:
            raise UsageError(
                f"parameter {self.name!r} is {_kind(parameter.device, parameter.dtype)} now and was "
                f"{_kind(*self._kind)} when the DistributedOptimizer was made: convert and move the module "
                f"before you make it"
            )
        if self.mapped and parameter.data_ptr() != self._address:
            raise UsageError(
                f"parameter {self.name!r} was moved off the memory that the servers write to (by .data = …, "
                f"share_memory or the like): copy into it instead, with torch.no_grad() and copy_"
            )


def wait_for_copies(bounds: Sequence[BoundParameter]) -> None:
    """Block until copies from and to the GPUs of these parameters are done."""
    for device in {bound.parameter.device for bound in bounds if not bound.mapped}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def find_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that need a gradient, by their first name; one that is used twice appears once.

    Raises:
        ConfigurationError: two parameters share memory, or one has no shape yet; names them.
    """
    owners: dict[tuple[torch.device, int], str] = {}
    found: dict[str, torch.nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ConfigurationError(
                f"parameter {name!r} has no shape yet: run the module once before you make the "
                f"DistributedOptimizer"
            )
        if parameter.numel():
            other = owners.setdefault(_memory_of(parameter), name)
            if other != name:
                raise ConfigurationError(
                    f"parameters {other!r} and {name!r} share memory, which they would lose on the servers: "
                    f"use one Parameter in both places, or clone one of them"
                )
        if parameter.requires_grad:
            found[name] = parameter
    return found


def tied_names(module: torch.nn.Module, trained: Mapping[str, torch.nn.Parameter]) -> dict[str, str]:
    """Other names of parameters that are used in several places → the name that they are trained under."""
    names = {parameter: name for name, parameter in trained.items()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: names[one] for name, one in every if one in names and names[one] != name}


def _memory_of(parameter: torch.nn.Parameter) -> tuple[torch.device, int]:
    """What no other parameter may have: on the CPU a storage, elsewhere (where nothing moves) an address."""
    if parameter.device.type == "cpu":
        return parameter.device, parameter.untyped_storage().data_ptr()
    return parameter.device, parameter.data_ptr()


def _flat(host: torch.Tensor) -> Array:
    """float32[n], contiguous."""
    flat: Array = host.to(torch.float32).contiguous().numpy().reshape(-1)
    return flat


def _is_plain(grad: torch.Tensor) -> bool:
    """Whether a kernel can read this tensor's memory as it is."""
    return (
        grad.layout is torch.strided
        and grad.dtype is torch.float32
        and grad.device.type == "cpu"
        and grad.is_contiguous()
    )


def _kind(device: torch.device, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} on {device}"
