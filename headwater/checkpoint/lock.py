"""One writer at a time for a directory of checkpoints or published weights."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self

from headwater.checkpoint.store import LocalFolder, Location, open_folder
from headwater.errors import CheckpointError, ConfigurationError
from headwater.wire.fork import close_in_child

LOCK = "headwater.lock"
_LONGEST = 4096


class DirectoryLock:
    """Held from construction to `release`, or until this process ends, however it ends.

    Does not block. The file stays, the kernel's lock on it goes. Stores behind fsspec have no locks:
    there it is the user who must not give one directory to two of them. `what` writes there, for the text.

    Raises:
        ConfigurationError: another one holds it; the text names its process and host.
        CheckpointError: the directory cannot be made or written, or its file system has no locks.
    """

    def __init__(self, directory: Location, what: str = "cluster") -> None:
        folder = open_folder(directory)
        folder.make()
        self._close = None
        if isinstance(folder, LocalFolder):
            descriptor = _locked(folder.path / LOCK, what)
            self._close = weakref.finalize(self, os.close, descriptor)
            close_in_child(self)

    def release(self) -> None:
        """Let others have the directory; may be called twice."""
        if self._close is not None:
            self._close()

    def close_descriptors(self) -> None:
        """A forked child would hold the lock after its parent's death."""
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _locked(path: Path, what: str) -> int:
    """Open, lock and sign the file; returns its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}: use a directory this user may write"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except BlockingIOError as error:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise ConfigurationError(
            f"{path.parent} is in use by another {what} ({holder}): "
            "give each its own directory, or end that one"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise CheckpointError(
            f"cannot lock {path}: {error.strerror}: use a file system that has locks"
        ) from error
    return descriptor


def _holder(descriptor: int) -> str:
    """Who signed; whoever holds the lock may be about to."""
    try:
        holder = json.loads(os.pread(descriptor, _LONGEST, 0))
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, TypeError, KeyError):
        return "a process that is just starting"
