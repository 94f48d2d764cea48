"""`hw.publish`: versions of a running training as files that inference engines pull, until it ends.

Invariants:
- Training never waits for a disk, an engine or this process.
- A version that could not be written leaves those that are complete as they are; the next one is full.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from headwater.checkpoint.store import Location
from headwater.errors import ClusterEndedError, ConfigurationError, WeightsError
from headwater.follower.changes import Change
from headwater.follower.public import Follower
from headwater.follower.view import View
from headwater.loggers import logger
from headwater.spec.amounts import shown, text, whole
from headwater.spec.every import Every
from headwater.spec.words import option
from headwater.weights.notify import Notification
from headwater.weights.writer import PublishedVersion, TableDelta, WeightsWriter
from headwater.wire.security import TLS, Security

_log = logger("headwater.publish")


def publish(
    address: str,
    to: Location,
    *,
    model: str | None = None,
    tables: str | Iterable[str] = (),
    every: str | int | float | Every = "10s",
    full_every: int = 20,
    names: Mapping[str, str] | None = None,
    dtype: str = "float32",
    dialect: str = "sglang",
    keep: int = 40,
    checksum: str | None = None,
    notify: str | Notification | None = None,
    versions: int | None = None,
    wrote: Callable[[PublishedVersion, View], None] = lambda version, view: None,
    token: str | None = None,
    tls: TLS | None = None,
    security: Security | None = None,
) -> int:
    """Write versions of a model of the cluster at `address` to a directory until training ends; blocks.

    The format is described in docs/weights-format.md; `hw.load_weights` reads it.

    Args:
        to: a directory or a URL that fsspec knows; one publisher at a time writes there.
        model: its name; None where the cluster has one only.
        tables: names of tables whose rows go beside the weights.
        every: seconds such as "10s", or commits such as 100. A version that is still being written when the
            next is due makes versions rarer.
        full_every, names, dtype, dialect, keep, checksum: as of `WeightsWriter`: how often a version is full,
            tensor → its name in the engine, "float32" or "bfloat16", "sglang" or "modelexpress", how many
            versions stay, which digests.
        notify: an engine's endpoint, http or https, which is told of each version; or how to tell it.
        versions: how many to write; None: until training ends.
        wrote: called after each version, with the training's version that it is.
        token, tls: as the cluster was given; or `security`, both as one.

    Returns how many versions were written. A version that the disk or the engine refuses is logged; the next
    one makes up for it.

    Raises:
        ConfigurationError: an impossible argument, a name that does not exist, or a directory that another
            publisher writes.
        WeightsError: the directory cannot be made or read.
        ConnectionLostError, RefusedError: as of `hw.follow`.
    """
    told = Notification(notify) if isinstance(notify, str) else notify
    if told is not None and not isinstance(told, Notification):
        raise ConfigurationError(f"notify must be a URL or a Notification, got {shown(notify)}")
    versions = None if versions is None else whole("versions", versions)
    if not callable(wrote):
        raise ConfigurationError(f"wrote must be a function, got {shown(wrote)}")
    models = () if model is None else (text("model", model),)
    short = {"bf16": "bfloat16", "fp32": "float32"}
    with (
        WeightsWriter(
            to,
            dtype=short.get(dtype, dtype) if isinstance(dtype, str) else dtype,
            dialect=dialect,
            full_every=full_every,
            keep=keep,
            names=names,
            checksum=checksum,
        ) as writer,
        Follower(
            address,
            models or None,
            tables,
            every,
            security=security or Security(token, tls),
        ) as follower,
    ):
        name = _only(follower.models, model)
        _check_names(follower, name, names)
        written = 0
        for view, change in follower.versions(runs=False):
            done = _write(writer, name, view, change)
            if done is not None:
                written += 1
                _tell(told, str(to), done)
                wrote(done, view)
            if versions is not None and written >= versions:
                return written
        failure = follower.failure
        if failure is not None and not isinstance(failure, ClusterEndedError):
            raise failure
        return written


def _only(known: Iterable[str], model: str | None) -> str:
    there = tuple(known)
    if model is not None:
        return model
    if len(there) != 1:
        raise ConfigurationError(
            f"{option('model')}: the cluster has the models {', '.join(map(repr, there)) or 'none'}: say "
            f"which one to publish"
        )
    return there[0]


def _check_names(follower: Follower, model: str, names: Mapping[str, str] | None) -> None:
    with follower.pin() as view:
        tensors = view.parameters(model)
        for name in names or ():
            if name not in tensors:
                raise ConfigurationError(
                    f"{option('names')}: model {model!r} has no tensor {name!r}: it has {', '.join(tensors)}"
                )


def _write(writer: WeightsWriter, model: str, view: View, change: Change) -> PublishedVersion | None:
    """One version; None where the file system refuses it."""
    rows = {
        name: functools.partial(_rows, view, name, change if change.base is not None else None)
        for name in change.tables
    }
    version = view.version.generation, view.version.number
    try:
        return writer.write(
            view.parameters(model),
            version=version,
            positions=msgspec.to_builtins(view.positions),
            tables=rows,
        )
    except WeightsError as error:
        _log.warning("%s was not published: %s", view.version, error)
        return None


def _rows(view: View, table: str, change: Change | None, full: bool) -> TableDelta:
    """What goes into a version: all rows of a full one, and otherwise what was touched."""
    if not full and change is not None and not change.tables[table].full:
        found = change.tables[table]
        return TableDelta(found.ids, found.rows, found.deleted, full=False)
    parts = list(view.scan(table))
    ids: NDArray[Any] = np.concatenate([ids for ids, _ in parts]) if parts else np.empty(0, np.int64)
    rows = np.concatenate([rows for _, rows in parts]) if parts else view.rows(table, ids)
    return TableDelta(ids, rows, np.empty(0, np.int64), full=True)


def _tell(notification: Notification | None, directory: str, done: PublishedVersion) -> None:
    if notification is None:
        return
    try:
        notification.post(done.number, directory, done.path)
    except WeightsError as error:
        _log.warning("%s; the next version will be told", error)
