"""One process at a time: a lock on a file, and with it on a directory of checkpoints or published weights."""

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


class LockedError(Exception):
    """Another process holds the lock; the text says which, as far as it has signed."""


class FileLock:
    """The kernel's lock on the file at `path`, held until `release`, or until this process ends, however it
    ends.

    Does not block. The file is made where there is none, and stays.

    Raises:
        LockedError: somebody else holds it.
        OSError: the file cannot be made or written, or its file system has no locks.
    """

    def __init__(self, path: Path, mode: int = 0o644) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.sign()
        except BlockingIOError as error:
            holder = _holder(self._descriptor)
            self._close()
            raise LockedError(holder) from error
        except OSError:
            self._close()
            raise
        close_in_child(self)

    def sign(self, **more: str) -> None:
        """Say in the file who holds it, besides its process and host."""
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **more})
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def release(self) -> None:
        """Let others have it; may be called twice."""
        self._close()

    def close_descriptors(self) -> None:
        """A forked child would hold the lock after its parent's death."""
        self.release()


class DirectoryLock:
    """Held from construction to `release`, or until this process ends, however it ends.

    Does not block. Stores behind fsspec have no locks: there it is the user who must not give one directory
    to two of them. `what` writes there, for the text.

    Raises:
        ConfigurationError: another one holds it; the text names its process and host.
        CheckpointError: the directory cannot be made or written, or its file system has no locks.
    """

    def __init__(self, directory: Location, what: str = "cluster") -> None:
        folder = open_folder(directory)
        folder.make()
        self._lock = _locked(folder.path / LOCK, what) if isinstance(folder, LocalFolder) else None

    def sign(self, cluster: str) -> None:
        """Say whose the directory is."""
        if self._lock is not None:
            self._lock.sign(cluster=cluster)

    def release(self) -> None:
        """Let others have the directory; may be called twice."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _locked(path: Path, what: str) -> FileLock:
    try:
        return FileLock(path)
    except LockedError as error:
        raise ConfigurationError(
            f"{path.parent} is in use by another {what} ({error}): "
            "give each its own directory, or end that one"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}: use a directory that this user may write, "
            f"on a file system that has locks"
        ) from error


def _holder(descriptor: int) -> str:
    """Who signed; whoever holds the lock may be about to."""
    try:
        holder = json.loads(os.pread(descriptor, _LONGEST, 0))
        cluster = f", cluster {holder['cluster']}" if "cluster" in holder else ""
        return f"process {holder['pid']} on {holder['host']}{cluster}"
    except (ValueError, TypeError, KeyError):
        return "a process that is just starting"
