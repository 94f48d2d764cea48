"""MXNet's KVStore verbs over a Headwater cluster: `init`, `push`, `pull` and what goes with them.

Every key is a model of one tensor. A push and the following pull of a key are one step of the worker. What
was pushed is summed, over the values of one push and over all workers, as MXNet sums it. The optimizer gets
the sum; where there is none, the sum takes the place of the value.

Invariants:
- A push that nobody pulled leaves as a step of its own before the next one of that key.
- All workers make the same calls in the same order, as they do with MXNet's `dist_sync`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ConfigurationError, GradientError, NonFiniteError, UsageError
from headwater.kernels import finite
from headwater.kernels.codecs import decode, encode
from headwater.kvstore.arguments import (
    Key,
    Value,
    array_of,
    check_key,
    check_out,
    in_place,
    npz,
    pairs_of,
    rows_of,
    targets_of,
    written_to,
)
from headwater.kvstore.optimizers import rule_of
from headwater.runtime.inquiry import ask
from headwater.spec.amounts import shown, text
from headwater.spec.codecs import Codec, OneBit, TwoBit
from headwater.spec.rules import Assign, Rule
from headwater.worker.model import Model
from headwater.worker.model_spec import as_array
from headwater.worker.worker import Worker

_TYPES = {"dist_sync": True, "dist": True, "dist_device_sync": True, "dist_async": False}
"""Whether a type has rounds."""

_TENSOR = "value"


def create(worker: Worker, type: str = "dist_sync") -> KVStore:
    """A store over the cluster that `worker` is a member of.

    Args:
        type: "dist_sync" (also "dist", "dist_device_sync") in a cluster whose mode has rounds, "dist_async"
            in one whose mode has none.

    Raises:
        ConfigurationError: another type, or one that the cluster's mode does not fit.
    """
    if not isinstance(type, str) or type not in _TYPES:
        raise ConfigurationError(f"kvstore type {type!r} is unknown: pass one of {', '.join(_TYPES)}")
    if _TYPES[type] != worker.mode.rounds:
        wanted = "sync" if _TYPES[type] else "async"
        raise ConfigurationError(
            f"kvstore type {type!r} needs a cluster with sync={wanted!r}, this one has {worker.sync!r}"
        )
    return KVStore(worker, type)


class _Entry:
    """A key: its initial value until its model exists, whether something was pushed, and its residual."""

    def __init__(self, value: NDArray[Any]) -> None:
        self.shape, self.dtype = value.shape, value.dtype
        self.initial: NDArray[np.float32] | None = np.array(value, dtype=np.float32)
        self.model: Model | None = None
        self.times = 0
        self.pushed = False
        self.residual: NDArray[np.float32] | None = None


class KVStore:
    """Keys and their values on the servers; made by `create`. Used by one thread, the worker's.

    Keys are all integers or all texts. Values come and go as NumPy arrays; a key keeps the shape and dtype of
    `init`, and is float32 on the servers.
    """

    def __init__(self, worker: Worker, type: str) -> None:
        self._worker = worker
        self._type = type
        self._entries: dict[Key, _Entry] = {}
        self._rule: Rule = Assign()
        self._codec: Codec | None = None
        self._batch: list[tuple[Key, NDArray[Any]]] | None = None

    # ── what it is ──────────────────────────────────────────────────────────────────────────────

    @property
    def type(self) -> str:
        """As given to `create`."""
        return self._type

    @property
    def rank(self) -> int:
        """This worker's rank, from 0."""
        return self._worker.rank

    @property
    def num_workers(self) -> int:
        """How many workers were declared."""
        return self._worker.workers

    def is_capable(self, capability: str) -> bool:
        """Whether the store can do something: "optimizer" (update on the servers), in any case of letters.

        Raises:
            ConfigurationError: an unknown capability.
        """
        if text("is_capable: capability", capability).lower() != "optimizer":
            raise ConfigurationError(f"capability {capability!r} is unknown: expected 'optimizer'")
        return True

    def num_dead_node(self, node_id: int = 0, timeout: float = 60) -> int:
        """How many declared workers are neither there nor finished. Blocks for the coordinator's answer.

        `node_id` and `timeout` are there for MXNet's sake.
        """
        statistics = ask(self._worker.address, self._worker.security)
        alive = {node.rank for node in statistics.nodes if node.role == "worker"} | set(statistics.finished)
        return sum(rank not in alive for rank in range(self.num_workers))

    def barrier(self) -> None:
        """Block until every worker is here; as `Worker.barrier`, which also raises."""
        self._flush()
        self._worker.barrier()

    # ── keys ────────────────────────────────────────────────────────────────────────────────────

    def init(self, key: Key | Sequence[Key], value: Value | Sequence[Value]) -> None:
        """Give one or several keys their first values; the lowest rank's count. Never compressed.

        All or nothing.

        Raises:
            UsageError: a key that has been initialised, or is of another type than the others.
            GradientError: no array of floating point numbers.
        """
        new: dict[Key, _Entry] = {}
        for given, array in pairs_of(key, value):
            one = check_key(given, self._entries or new)
            if one in self._entries or one in new:
                raise UsageError(f"key {one!r} has been initialised: push to it, or use another key")
            new[one] = _Entry(array_of(one, array))
        self._entries.update(new)

    def push(self, key: Key | Sequence[Key], value: Value | Sequence[Any], priority: int = 0) -> None:
        """Push one value, or the sum of several, to each key; `priority` is there for MXNet's sake.

        Does not block, unless something was pushed to the key already and not pulled: that leaves first. All
        or nothing: on an error nothing is pushed.

        Args:
            key: a key, or a list of them.
            value: for one key an array or a list of arrays, which are summed; for a list of keys one such
                each.

        Raises:
            UsageError: a key that was not initialised.
            GradientError: another shape than the key's, or no floating point numbers.
            NonFiniteError: NaN or infinity.
        """
        totals: list[tuple[Key, _Entry, NDArray[np.float32]]] = []
        for given, arrays in pairs_of(key, value):
            one, entry = self._known(given)
            totals.append((one, entry, self._summed(one, entry, arrays)))
        for one, entry, total in totals:
            self._stage(one, entry, total)

    def pull(
        self, key: Key | Sequence[Key], out: Any = None, priority: int = 0, ignore_sparse: bool = True
    ) -> Any:
        """The value of each key; takes the step of what was pushed before. Blocks for the servers.

        Args:
            out: an array, or a list of arrays for one key, to be written to; with a list of keys one such
                each. Inside of `batch` it is required, and written when the batch ends.

        Returns:
            a new array of the key's dtype, or `out`; with a list of keys a list.

        Raises:
            UsageError: a key that was not initialised, or no `out` inside of `batch`.
            GradientError: `out` is no array of the key's shape.
        """
        keys_given: Sequence[Any] = key if isinstance(key, list | tuple) else [key]
        single = keys_given is not key
        known = [self._known(one) for one in keys_given]
        outs = [out] if single else (targets_of(out) if out is not None else [None] * len(known))
        if len(outs) != len(known):
            raise UsageError(f"pull: got {len(known)} keys and {len(outs)} arrays: pass one for each key")
        for (one, entry), given in zip(known, outs, strict=True):
            check_out(one, entry.shape, given)
        keys = [one for one, _ in known]
        if self._batch is not None:
            if any(array is None for array in outs):
                raise UsageError("pull inside of batch(): pass out=, which is written when the batch ends")
            self._batch += [
                (k, target) for k, given in zip(keys, outs, strict=True) for target in targets_of(given)
            ]
            return out
        values = self._read(keys)
        results = [written_to(values[k], given) for k, given in zip(keys, outs, strict=True)]
        return results[0] if single else results

    def pushpull(self, key: Key | Sequence[Key], value: Any, out: Any = None, priority: int = 0) -> Any:
        """`push`, then `pull`, as one step.

        Raises:
            UsageError: with gradient compression, as MXNet; and as `push` and `pull`.
        """
        if self._codec is not None:
            raise UsageError("pushpull does not go with gradient compression: call push and pull")
        self.push(key, value, priority)
        return self.pull(key, out if out is not None else in_place(value), priority)

    def broadcast(self, key: Key | Sequence[Key], value: Any, out: Any = None, priority: int = 0) -> Any:
        """`init`, then `pull`: everybody gets the lowest rank's value."""
        self.init(key, value)
        return self.pull(key, out, priority)

    @contextmanager
    def batch(self) -> Iterator[KVStore]:
        """Make all pushes and pulls of a `with` block one step; arrays given as `out` are written at its end.

        Raises:
            UsageError: inside of another one.
        """
        if self._batch is not None:
            raise UsageError("batch() inside of batch(): end the outer one first")
        self._flush()
        self._batch = []
        try:
            yield self
            wanted = self._batch
            values = self._read(list(dict.fromkeys(key for key, _ in wanted)))
            for key, target in wanted:
                target[...] = values[key]
        finally:
            self._batch = None

    # ── rows ────────────────────────────────────────────────────────────────────────────────────

    def row_sparse_push(self, key: Key, ids: Any, rows: Any, priority: int = 0) -> None:
        """Push a gradient that is zero but for some rows; rows of repeated ids are summed.

        Args:
            ids: integers of any shape, numbers of rows of the key.
            rows: an array of shape `ids.shape + value.shape[1:]`.

        Raises:
            UsageError: a key that was not initialised, or with gradient compression.
            GradientError: ids out of range or of another kind, or another shape.
        """
        key, entry = self._known(key)
        if self._codec is not None:
            raise UsageError("gradient compression does not go with row_sparse_push: push the whole value")
        numbers = rows_of(key, entry.shape, ids)
        array = as_array(f"rows of key {key!r}", rows)
        expected = np.shape(ids) + entry.shape[1:]
        if array.shape != expected:
            raise GradientError(f"key {key!r}: rows have shape {array.shape}, expected {expected}")
        total = np.zeros(entry.shape, dtype=np.float32)
        np.add.at(total, numbers, array.reshape(len(numbers), *entry.shape[1:]).astype(np.float32))
        self._stage(key, entry, _finite(key, total))

    def row_sparse_pull(self, key: Key, ids: Any, out: Any = None, priority: int = 0) -> NDArray[Any]:
        """Some rows of a key's value, as `pull` has it.

        Returns:
            a new array of shape `ids.shape + value.shape[1:]`, or `out`.

        Raises:
            UsageError: a key that was not initialised, or inside of `batch`.
            GradientError: ids out of range or of another kind, or `out` is no array of that shape.
        """
        key, entry = self._known(key)
        if self._batch is not None:
            raise UsageError("row_sparse_pull inside of batch(): pull after the batch has ended")
        numbers = rows_of(key, entry.shape, ids)
        check_out(key, np.shape(ids) + entry.shape[1:], out)
        value = self._read([key])[key]
        rows: NDArray[Any] = value[numbers].reshape(np.shape(ids) + entry.shape[1:])
        written: NDArray[Any] = written_to(rows, out)
        return written

    # ── the optimizer ───────────────────────────────────────────────────────────────────────────

    def set_optimizer(self, optimizer: Any, **settings: Any) -> None:
        """Have the servers apply this to what is pushed from now on, to all keys; also after `init`.

        Args:
            optimizer: a rule of Headwater; the name of one ("sgd", "adam", …) with its settings as keywords;
                or an optimizer of torch, of which the kind and the settings are taken. No code travels.

        Keys that were pushed to or pulled go on with the values that they have, and begin with new states.

        Raises:
            ConfigurationError: none of these, or settings that the rule does not have.
        """
        self._flush()
        self._rule = rule_of(optimizer, settings)
        started = [key for key, entry in self._entries.items() if entry.model is not None]
        for key, value in self._read(started).items():
            entry = self._entries[key]
            entry.initial, entry.model = np.array(value, dtype=np.float32), None
            entry.times += 1

    def save_optimizer_states(self, fname: str, dump_optimizer: bool = False) -> None:
        """Write the states of all keys to an `.npz` file; the rule itself is in it as text.

        Raises:
            UsageError: no optimizer was set.
        """
        if isinstance(self._rule, Assign):
            raise UsageError("save_optimizer_states: no optimizer was set: call set_optimizer first")
        self._flush()
        arrays: dict[str, Any] = {}
        for number, (key, entry) in enumerate(self._entries.items()):
            arrays[f"{number}.key"] = np.array(repr(key))
            for name, state in self._model(key, entry).state()[_TENSOR].items():
                arrays[f"{number}.{name}"] = np.asarray(state)
        if dump_optimizer:
            arrays["optimizer"] = np.array(repr(self._rule))
        with open(npz(fname), "wb") as file:
            np.savez(file, **arrays)

    def load_optimizer_states(self, fname: str) -> None:
        """Give the servers what `save_optimizer_states` wrote; every worker calls it, rank 0's file counts.

        Raises:
            UsageError: no optimizer was set, or the file is of other keys.
        """
        if isinstance(self._rule, Assign):
            raise UsageError("load_optimizer_states: no optimizer was set: call set_optimizer first")
        self._flush()
        with np.load(npz(fname), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        for number, (key, entry) in enumerate(self._entries.items()):
            if str(found.get(f"{number}.key")) != repr(key):
                raise UsageError(f"{fname} has no states of key {key!r}: initialise the same keys in order")
            prefix = f"{number}."
            state = {
                name.removeprefix(prefix): array if array.ndim else array.item()
                for name, array in found.items()
                if name.startswith(prefix) and name != f"{number}.key"
            }
            model = self._model(key, entry)
            if self.rank == 0:
                model.load_state({_TENSOR: state})
        self._worker.barrier()

    def set_gradient_compression(self, params: Mapping[str, Any]) -> None:
        """Compress what is pushed from now on; what is lost is kept and added to the key's next push.

        Args:
            params: {"type": "2bit" | "1bit", "threshold": number}; 0.5 by default.

        Raises:
            ConfigurationError: another type, an impossible threshold, or compression that is on already:
                it cannot be turned off or changed.
        """
        if self._codec is not None:
            raise ConfigurationError(f"gradient compression is {self._codec} already and cannot be changed")
        if not isinstance(params, Mapping):
            raise ConfigurationError(f"gradient compression: got {shown(params)}, expected a dict")
        unknown = set(params) - {"type", "threshold"}
        kind = params.get("type")
        if unknown or not isinstance(kind, str) or kind not in ("2bit", "1bit"):
            raise ConfigurationError(
                f"gradient compression: got {shown(dict(params))}, "
                "expected {'type': '2bit' or '1bit', 'threshold': number}"
            )
        threshold = params.get("threshold", 0.5)
        self._codec = TwoBit(threshold) if kind == "2bit" else OneBit(threshold)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _known(self, key: Any) -> tuple[Key, _Entry]:
        found = check_key(key, self._entries)
        if found not in self._entries:
            there = ", ".join(map(repr, self._entries)) or "none"
            raise UsageError(f"key {key!r} was not initialised: call init first; initialised are {there}")
        return found, self._entries[found]

    def _model(self, key: Key, entry: _Entry) -> Model:
        """The key's model; the first use declares it, which blocks until the lowest rank has."""
        if entry.model is None:
            assert entry.initial is not None
            name = f"kvstore/{key}" + (f"/{entry.times}" if entry.times else "")
            merge = None if self._rule.always_sum else "sum"
            entry.model = self._worker.model(name, {_TENSOR: entry.initial}, self._rule, merge=merge)
            entry.initial = None
        return entry.model

    def _summed(self, key: Key, entry: _Entry, arrays: Any) -> NDArray[np.float32]:
        listed = isinstance(arrays, list | tuple) and len(arrays) > 0 and not np.isscalar(arrays[0])
        several = arrays if listed else [arrays]
        total = np.zeros(entry.shape, dtype=np.float32)
        for array in several:
            given = array_of(key, array)
            if given.shape != entry.shape:
                raise GradientError(
                    f"key {key!r} has shape {entry.shape}, got {given.shape}: a key keeps the shape of init"
                )
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
                total += given
        return _finite(key, total)

    def _stage(self, key: Key, entry: _Entry, total: NDArray[np.float32]) -> None:
        model = self._model(key, entry)
        if entry.pushed and self._batch is None:
            self._flush()
        if self._codec is not None:
            total = self._compressed(entry, total)
        model.push({_TENSOR: total})
        entry.pushed = True

    def _compressed(self, entry: _Entry, total: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the servers make of the bytes; what they lose stays with the key."""
        assert self._codec is not None
        left = total.reshape(-1)
        if entry.residual is not None:
            left += entry.residual
        (data,) = encode(self._codec, left, 0, [left.size])
        sent = np.empty_like(left)
        decode(self._codec, data, 0, sent)
        entry.residual = left
        return sent.reshape(total.shape)

    def _flush(self) -> None:
        """Take the step of what was pushed."""
        if any(entry.pushed for entry in self._entries.values()):
            self._worker.step(read=False)
            for entry in self._entries.values():
                entry.pushed = False

    def _read(self, keys: Iterable[Key]) -> dict[Key, NDArray[Any]]:
        """The values of keys after the step of what was pushed, in their dtypes."""
        models = {key: self._model(key, self._entries[key]) for key in keys}
        if any(entry.pushed for entry in self._entries.values()):
            self._worker.step(read=list(models.values()))
            for entry in self._entries.values():
                entry.pushed = False
        return {
            key: model.pull(copy=True)[_TENSOR].astype(self._entries[key].dtype, copy=False)
            for key, model in models.items()
        }


def _finite(key: Key, total: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is pushed to a key, before anything is made of it. Raises NonFiniteError."""
    if not finite(total.reshape(-1)):
        raise NonFiniteError(f"key {key!r}: what is pushed comes to NaN or infinity; nothing was pushed")
    return total
