"""One version of everything that a follower keeps, pinned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from headwater.errors import ClosedError, ConfigurationError
from headwater.follower.subject import Subject
from headwater.kernels.arrange import as_ids
from headwater.machines.follower import Slot
from headwater.messages import DataProgress
from headwater.spec.amounts import whole
from headwater.spec.version import Version


class View:
    """One version of all models and tables, until it is closed; a context manager.

    Reading enters no lock and makes no system call. What it returns lies in the follower's memory, which the
    next versions take once the view is closed: copy what is to last. Any thread may read it.

    Attributes:
        version: which one it is.
        positions: where the workers were in their data at that version, as the log recorded it.
    """

    def __init__(
        self, slot: Slot, subject: Subject, behind: Callable[[Version], int], close: Callable[[Slot], None]
    ) -> None:
        assert slot.version is not None
        self.version = slot.version
        self.positions: DataProgress = slot.copy.recorded
        self._slot: Slot | None = slot
        self._subject = subject
        self._behind = behind
        self._close = close
        self._models = {
            name: subject.views(id, slot.copy.vectors[id], slot.copy.layouts[id])
            for name, id in subject.models.items()
        }
        self._tables = {name: slot.copy.tables[id] for name, id in subject.tables.items()}

    def __repr__(self) -> str:
        return f"<View of {self.version}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let newer versions have the memory; idempotent."""
        slot, self._slot = self._slot, None
        if slot is not None:
            self._close(slot)

    @property
    def age(self) -> float:
        """Seconds since the servers said that this is the newest version."""
        return max(0.0, time.monotonic() - self._open().as_of)

    @property
    def behind(self) -> int:
        """How many newer versions the follower has heard of."""
        return self._behind(self.version)

    def parameters(self, model: str) -> Mapping[str, NDArray[Any]]:
        """Each tensor of a model by name, read-only, without a copy.

        float32, or `ml_dtypes.bfloat16` where the follower was made with that dtype.

        Raises:
            ConfigurationError: no such model is followed; lists those that are.
            ClosedError: the view is closed.
        """
        self._open()
        found = self._models.get(model) if isinstance(model, str) else None
        if found is None:
            raise ConfigurationError(_unknown("model", model, self._models))
        return MappingProxyType(found)

    def rows(self, table: str, ids: Any) -> NDArray[np.float32]:
        """The rows of `ids` (whole numbers of any shape) as float32[*ids.shape, dim], the caller's.

        An id without a row has its initial value, as a worker's `pull` gives it.

        Raises:
            ConfigurationError: no such table is followed; lists those that are.
            UsageError: the ids are no integers, or do not fit int64.
            ClosedError: the view is closed.
        """
        self._open()
        found = self._tables.get(table) if isinstance(table, str) else None
        if found is None:
            raise ConfigurationError(_unknown("table", table, self._tables))
        wanted = as_ids(ids)
        return found.read(wanted.reshape(-1)).reshape(*wanted.shape, found.spec.dim)

    def scan(
        self, table: str, batch: int = 65_536
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """All rows of a table at this version: int64[n] ids and float32[n, dim], `batch` at a time.

        Raises: as `rows`; ConfigurationError for a batch below 1.
        """
        self._open()
        if not isinstance(table, str) or table not in self._tables:
            raise ConfigurationError(_unknown("table", table, self._tables))
        return self._scanned(table, whole("batch", batch))

    def _scanned(self, table: str, batch: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        for part in self._tables[table].scan(batch):
            self._open()
            yield part

    def _open(self) -> Slot:
        if self._slot is None:
            raise ClosedError(f"the view of {self.version} is closed: pin another one")
        return self._slot


def _unknown(what: str, name: str, known: Mapping[str, Any]) -> str:
    return f"no {what} {name!r} is followed, only {', '.join(map(repr, known)) or 'none'}"
