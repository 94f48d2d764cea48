"""`hw.follow`: a copy of a training's models and tables, kept beside it, one whole version at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ClosedError, ConfigurationError, HeadwaterError, StalledError, UsageError
from headwater.follower.changes import Change, change
from headwater.follower.keeper import Keeper, Wish
from headwater.follower.statistics_of import FollowerStatistics, statistics_of
from headwater.follower.view import View
from headwater.machines.follower import FollowerMachine, Slot
from headwater.spec.amounts import whole
from headwater.spec.every import Every
from headwater.spec.seconds import seconds
from headwater.spec.version import Version
from headwater.wire.security import TLS, Security

_FIRST_S = 60.0
_READ_S = 10.0


def follow(
    address: str,
    models: str | Iterable[str] | None = None,
    tables: str | Iterable[str] | None = None,
    every: str | int | float | Every = "1s",
    *,
    token: str | None = None,
    tls: TLS | None = None,
    dtype: str = "float32",
    max_age: float | None = None,
    max_behind: int | None = None,
    pins: int = 2,
    deadline: float = _FIRST_S,
) -> Follower:
    """Keep a copy of models and tables of the cluster at `address`; blocks until its first version is there.

    `address` may be that of a follower (`headwater serve follower`). On its machine its memory is read, and
    there is no copy of one's own.

    A follower takes no turn: training neither waits for it nor counts it.

    Args:
        models, tables: names, () for none; None: all that there are once training has begun.
        every: how often it takes a newer version: seconds such as "1s", or commits such as 1 or 100.
        token, tls: as the cluster was given.
        dtype: of the parameters, "float32" or "bfloat16" (rounded to nearest even); rows are float32.
        max_age: seconds; an older version is not read. A read waits for a newer one, or for the servers to
            say that there is none.
        max_behind: versions; one with more newer ones is not read. Each read asks the servers.
        pins: versions that readers may hold, the current one included, ≥ 1. There is memory for one more.
        deadline: seconds until the first version must be there. Where training has not begun, names that do
            not exist yet are waited for as long.

    Raises:
        ConfigurationError: an impossible argument, or a name that does not exist; lists those that do.
        ConnectionLostError: nobody answers at that address.
        RefusedError: one side does not admit the other.
        StalledError: there was no version in time; says why.
    """
    return Follower(
        address,
        models,
        tables,
        every,
        security=Security(token, tls),
        dtype=dtype,
        max_age=max_age,
        max_behind=max_behind,
        pins=pins,
        deadline=deadline,
    )


class Follower:
    """What `hw.follow` returns; a context manager. Any thread may use it; a forked child may not.

    Attributes:
        max_age, max_behind: as given.
    """

    def __init__(
        self,
        address: str,
        models: str | Iterable[str] | None = None,
        tables: str | Iterable[str] | None = None,
        every: str | int | float | Every = "1s",
        *,
        security: Security,
        dtype: str = "float32",
        max_age: float | None = None,
        max_behind: int | None = None,
        pins: int = 2,
        deadline: float = _FIRST_S,
    ) -> None:
        self.max_age = None if max_age is None else seconds("max_age", max_age)
        self.max_behind = None if max_behind is None else whole("max_behind", max_behind, 0)
        bounded = max_age is not None or max_behind is not None
        wish = Wish.of(address, models, tables, every, security, dtype, bounded=bounded)
        self._machine = FollowerMachine(whole("pins", pins, 1))
        self._keeper = Keeper(wish, self._machine)
        self._process = os.getpid()
        self._closed = False
        limit = seconds("deadline", deadline)
        self._keeper.begin(limit)
        try:
            self._wait(lambda: self._machine.current is not None, limit, "a first version")
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        current = self._machine.current
        return f"<Follower of {self._keeper.wish.address} at {current.version if current else 'no version'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Follow no more; views stay readable until they are closed. Blocks shortly; idempotent."""
        if os.getpid() != self._process:
            return
        self._closed = True
        self._keeper.close()

    # ── reading ─────────────────────────────────────────────────────────────────────────────────

    @property
    def version(self) -> Version:
        """What `pin` would give now, where no bound is set."""
        with self._keeper.changed:
            return self._machine.shown

    def pin(self, *, deadline: float = _READ_S) -> View:
        """One version of everything; it stays as it is until the view is closed. A context manager.

        Blocks only where `max_age` or `max_behind` is set, for at most `deadline` seconds.

        Raises:
            StalledError: what is here is older than allowed, and nothing newer came; says why.
            ClosedError: the follower is closed.
            UsageError: this process was forked from the one that follows.
        """
        self._check("pin")
        limit = seconds("deadline", deadline)
        keeper = self._keeper
        with keeper.changed:
            if keeper.wish.bounded:
                self._wait_for_bounds(limit)
            slot = self._machine.pin()
            subject = keeper.subject
        assert subject is not None
        return View(slot, subject, self._behind, self._unpin)

    def _wait_for_bounds(self, deadline: float) -> None:
        """Holding the lock."""
        keeper, began = self._keeper, time.monotonic()
        until = began + deadline
        while (why := self._too_old(began)) is not None:
            now = time.monotonic()
            if keeper.failure is not None or now >= until or self._closed:
                waited = f"within {deadline:g} s" if keeper.failure is None else "any more"
                raise StalledError(f"{why}, and nothing newer came {waited}: {self._whom()}")
            keeper.asked = max(keeper.asked, began)
            keeper.hurry = keeper.heard >= began
            keeper.changed.notify_all()
            keeper.changed.wait(until - now)

    def _too_old(self, began: float) -> str | None:
        """Why the current version may not be read, for somebody who asked at `began`; None: it may."""
        current, keeper = self._machine.current, self._keeper
        assert current is not None
        shown = self._machine.shown
        age = time.monotonic() - current.as_of
        if self.max_age is not None and age > self.max_age:
            return f"{shown} is {age:.2f} s old, max_age is {self.max_age:g}"
        if self.max_behind is None:
            return None
        if keeper.heard < began:
            return f"how many versions {shown} is behind is not known since {age:.2f} s"
        behind = self._machine.behind(shown)
        if behind > self.max_behind:
            return f"{shown} is {behind} versions behind, max_behind is {self.max_behind}"
        return None

    def wait(self, version: int | Version | None = None, *, deadline: float | None = None) -> Version:
        """Block until a version at least as new is shown, by default one newer than now; returns what is.

        `version`: a number, of any generation, or a `Version`. `deadline`: seconds; None: none.

        Raises:
            StalledError: it did not come in time, or never will; says what it waits for.
        """
        self._check("wait")
        limit = None if deadline is None else seconds("deadline", deadline)
        if version is None:
            wanted: int | Version = Version(self.version.generation, self.version.number + 1)
        else:
            wanted = version
        number = wanted.number if isinstance(wanted, Version) else whole("version", wanted, 0)
        keeper = self._keeper
        with keeper.changed:
            keeper.waiting.append(number)
            keeper.changed.notify_all()
        try:
            self._wait(lambda: self._is_shown(wanted), limit, f"version {number}")
        finally:
            with keeper.changed:
                keeper.waiting.remove(number)
        return self.version

    def _is_shown(self, wanted: int | Version) -> bool:
        shown = self._machine.shown
        return shown >= wanted if isinstance(wanted, Version) else shown.number >= wanted

    def changes(self) -> Iterator[Change]:
        """What leads from each version to the next that this iterator takes; first all values.

        A slow caller gets several versions' changes as one: none is left out. It keeps one version pinned.
        Ends with the follower, or once the cluster has ended. Blocks for the next version.

        Raises:
            ConfigurationError: the follower was made with one pin, which this would keep.
        """
        self._check("changes")
        if self._machine.pins < 2:
            raise ConfigurationError(
                "changes() keeps a version pinned beside the newest: pass pins=2 or more"
            )
        return self._changes()

    def _changes(self) -> Iterator[Change]:
        versions = self.versions()
        try:
            for _, found in versions:
                yield found
        finally:
            versions.close()

    def versions(self, *, runs: bool = True) -> Generator[tuple[View, Change], None, None]:
        """As `changes`, each with a view of the version that it leads to, which is there until the next.

        `runs` False: of tables only, which spares a pass over both versions of the models.
        """
        keeper = self._keeper
        touched: dict[int, NDArray[np.int64] | None] = {}

        def collect(slot: Slot) -> None:
            for id, ids in slot.copy.touched.items():
                before = touched.get(id, np.empty(0, np.int64))
                touched[id] = None if ids is None or before is None else np.concatenate([before, ids])

        before: Slot | None = None
        with keeper.changed:
            keeper.listeners.append(collect)
        try:
            while True:
                with keeper.changed:
                    while self._machine.current is before and keeper.failure is None and not self._closed:
                        keeper.changed.wait()
                    if self._machine.current is before:
                        return
                    after = self._machine.pin()
                    taken, subject = dict(touched), keeper.subject
                    touched.clear()
                assert subject is not None
                former, before = before, after
                known = former if former is not None and _same_training(former, after) else None
                ids = {id: taken.get(id) for id in subject.table_specs}
                found = change(subject, known, after, ids, runs=runs)
                if former is not None:
                    self._unpin(former)
                yield View(after, subject, self._behind, lambda slot: None), found
        finally:
            with keeper.changed:
                keeper.listeners.remove(collect)
            if before is not None:
                self._unpin(before)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are followed, by name."""
        subject = self._keeper.subject
        return tuple(subject.models) if subject is not None else ()

    @property
    def failure(self) -> HeadwaterError | None:
        """Why nothing newer will come; None while something may."""
        return self._keeper.failure

    # ── what a person sees ──────────────────────────────────────────────────────────────────────

    def statistics(self) -> FollowerStatistics:
        """A snapshot; does not block."""
        return statistics_of(self._keeper)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _behind(self, version: Version) -> int:
        return self._machine.behind(version)

    def _unpin(self, slot: Slot) -> None:
        with self._keeper.changed:
            self._machine.unpin(slot)
            self._keeper.changed.notify_all()

    def _check(self, what: str) -> None:
        if os.getpid() != self._process:
            raise UsageError(
                f"{what}: this follower belongs to process {self._process}, and this is process "
                f"{os.getpid()}, forked from it, which its thread does not follow into: call hw.follow here"
            )
        if self._closed:
            raise ClosedError(f"{what}: the follower is closed")

    def _wait(self, done: Callable[[], bool], limit: float | None, what: str) -> None:
        keeper = self._keeper
        until = None if limit is None else time.monotonic() + limit
        with keeper.changed:
            while not done():
                if keeper.failure is not None and self._machine.current is None:
                    raise keeper.failure
                if keeper.failure is not None:
                    raise StalledError(f"{what} will not come: {keeper.failure}")
                if self._closed:
                    raise ClosedError(f"{what} will not come: the follower was closed")
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise StalledError(f"{what} did not come within {limit:g} s: {self._whom()}")
                keeper.changed.wait(left)

    def _whom(self) -> str:
        """For whom a reader waits."""
        if self._keeper.reason:
            return self._keeper.reason
        return f"it waits for training to commit; the newest version is {self._machine.newest}"


def _same_training(one: Slot, other: Slot) -> bool:
    assert one.version is not None
    assert other.version is not None
    return one.version.generation == other.version.generation
