"""A module's buffers, such as the running averages of BatchNorm: kept equal on all workers, or left alone.

They are a model of their own, `NAME.buffers`, and travel with the steps of the parameters: what is sent
is the change since the last read. Only persistent buffers of a floating type do; counters stay local.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from headwater.errors import RegistrationError
from headwater.spec.amounts import one_of
from headwater.spec.rules import SGD, Accumulate
from headwater.worker import Worker
from headwater.worker.model import Model

BufferMode: TypeAlias = Literal["rank0", "mean", "local"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_mode(mode: str) -> None:
    """Raise ConfigurationError unless `mode` is a BufferMode."""
    one_of("buffers", mode, ("rank0", "mean", "local"))


class SharedBuffers:
    """The buffers that travel, under one of these modes.

    - "rank0": everybody has what rank 0 has, as torch's DistributedDataParallel.
    - "mean": everybody's changes count. In synchronous training each buffer becomes the mean over the
      round's contributors, weighted as they are, however gradients are combined; in the other modes the
      changes add up as they come.
    - "local": nothing travels.
    """

    def __init__(self, worker: Worker, module: torch.nn.Module, name: str, mode: BufferMode) -> None:
        self._module = module
        self._mode = mode
        self._names = [] if mode == "local" else _travelling(module)
        self._sends = mode == "mean" or worker.rank == 0
        self._sign = 1.0 if mode == "rank0" else -1.0
        self._served: dict[str, torch.Tensor] = {}
        self._last: dict[str, torch.Tensor] = {}
        self._carried: set[str] = set()
        self.model: Model | None = None
        if self._names:
            rule = Accumulate() if mode == "rank0" else SGD(lr=1.0)
            merge = None if mode == "rank0" else "mean"
            values = {name: self._buffer(name) for name in self._names}
            self.model = worker.model(name, values, rule, merge=merge, nonfinite="off")
            self.model.local.adapter = self
            self.discard_changes()

    @staticmethod
    def known(worker: Worker, module: torch.nn.Module, name: str, mode: BufferMode) -> SharedBuffers | None:
        """Those of the model of this name, if the worker has one: the same buffers.

        Raises:
            RegistrationError: it has another module's buffers, or travels in another way.
        """
        model = worker.models.get(name)
        if model is None or mode == "local":
            return None
        known = model.local.adapter
        if not isinstance(known, SharedBuffers) or known._module is not module:
            raise RegistrationError(
                f"model {name!r} of this worker has the buffers of another module: pass name=… to the "
                f"DistributedOptimizer of each module"
            )
        if known._mode != mode:
            raise RegistrationError(
                f"the buffers of {name!r} travel with buffers={known._mode!r}, got buffers={mode!r}: "
                f"pass the same"
            )
        return known

    def carry(self) -> None:
        """Have the next step, which carries a gradient, carry what changed here too.

        What is not finite stays here; the next answer repairs it.
        """
        if self.model is None or not self._sends:
            return
        for name in self._names:
            change = torch.from_numpy(self.model.gradients[name])
            change.copy_(self._change(name))
            if change.any() and change.isfinite().all():
                change.mul_(self._sign)
                self.model.local.carry(name)
                self._carried.add(name)

    def before_read(self) -> None:
        """Nothing: a step carries what the program wrote to buffers, as it does what a forward did."""

    def after_read(self) -> None:
        """Take over what the servers have; changes that no step has brought them yet stay on top of it.

        So a batch whose step was skipped, or came too late, leaves its mark on averages, as in torch.
        """
        assert self.model is not None
        brought = self._carried if self.model.local.took else set()
        self._carried = set()
        for name in self._names:
            change = self._change(name)
            if name in brought or not self._sends or not change.isfinite().all():
                self._take(name)
                continue
            new = torch.from_numpy(self.model.parameters[name])
            if not new.equal(self._served[name]):
                self._buffer(name).copy_(new + change)
                self._served[name], self._last[name] = new.clone(), new.clone()

    def discard_changes(self) -> None:
        """Have in the module's buffers what the servers have."""
        for name in self._names:
            self._take(name)

    def _take(self, name: str) -> None:
        assert self.model is not None
        self._served[name] = torch.tensor(self.model.parameters[name])
        self._buffer(name).copy_(self._served[name])
        self._last[name] = self._host(name).clone()

    def _change(self, name: str) -> torch.Tensor:
        """What has changed in a buffer since what it has of the servers was put there."""
        return self._host(name) - self._last[name]

    def _host(self, name: str) -> torch.Tensor:
        return self._buffer(name).to("cpu", torch.float32)

    def push(self) -> None:
        """Assign the module's buffers to the servers; blocks for an exchange."""
        if self.model is not None:
            for name in self._names:
                torch.from_numpy(self.model.parameters[name]).copy_(self._buffer(name))
            self.model.local.assign(self._names)
            self.discard_changes()

    def _buffer(self, name: str) -> torch.Tensor:
        """Looked up each time: a module may replace its buffers."""
        return self._module.get_buffer(name).detach()


def _travelling(module: torch.nn.Module) -> list[str]:
    persistent = module.state_dict(keep_vars=True).keys()
    return [name for name, buffer in module.named_buffers() if name in persistent and buffer.dtype in _DTYPES]
