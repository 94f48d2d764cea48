"""Where checkpoints lie: a folder on a local path, or behind fsspec.

Invariants:
- A local file appears under its name whole and on disk, or not at all. A remote one may be cut short when its
  writer died: only a manifest says what counts.
- What goes wrong with files leaves this package as CheckpointError, with the path and what to do.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeAlias

from headwater.checkpoint.direct import direct
from headwater.checkpoint.remote import RemoteFolder
from headwater.errors import CheckpointError, ConfigurationError
from headwater.spec.amounts import path as path_of

Location: TypeAlias = str | os.PathLike[str]
"""A local path, or a URL that fsspec knows."""

DRAFT = ".partial"
"""What the name of a local folder or file ends with while it is being written."""


class Source(Protocol):
    """An open file to read from."""

    def seek(self, offset: int, /) -> object:
        """Go to byte `offset`."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read up to len(buffer) bytes; 0 at the end."""


class Sink(Protocol):
    """An open file to write to."""

    def write(self, data: memoryview, /) -> int | None:
        """Write some of `data`; returns how much."""


def write_all(sink: Sink, data: memoryview) -> None:
    """Write all of `data`."""
    while data:
        data = data[sink.write(data) or 0 :]


class Folder(Protocol):
    """A folder of files; every method may block for the disk or network and raise CheckpointError."""

    url: str

    def inside(self, name: str) -> Folder:
        """The folder `name` of this one, there or not."""

    def exists(self) -> bool:
        """Whether it is there; an empty one of an object store never is."""

    def entries(self) -> dict[str, int | None]:
        """Name → size in bytes, None for folders; empty where this folder does not exist."""

    def make(self) -> None:
        """Make it, with its parents, unless it is there."""

    def read(self, name: str) -> AbstractContextManager[Source]:
        """Open a file."""

    def write(self, name: str) -> AbstractContextManager[Sink]:
        """Write a file, replacing what has its name; it is durable when the block ends."""

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens where there is none."""

    def draft(self, name: str) -> str:
        """The name under which a folder `name` is prepared."""

    def publish(self, name: str) -> None:
        """Give the finished draft of `name` its name."""


def open_folder(location: Location) -> Folder:
    """The folder at a path or URL; nothing is touched.

    Raises:
        ConfigurationError: a URL whose file system is not installed or does not exist.
    """
    path = path_of("a directory or file", location)
    path = path.removeprefix("file://")
    if "://" in path:
        return RemoteFolder(path)
    if not path:
        raise ConfigurationError("the path of a checkpoint is empty: name a directory")
    return LocalFolder(Path(path).absolute())


def split(location: Location) -> tuple[Folder, str]:
    """The folder in which `location` lies, and its name there."""
    path = path_of("a directory or file", location).rstrip("/")
    if "://" not in path:
        path = os.path.abspath(path)
    parent, _, name = path.rpartition("/")
    return open_folder(parent or "/"), name


class LocalFolder:
    """A directory of this machine, or one that is mounted here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = str(path)

    def inside(self, name: str) -> LocalFolder:
        """As `Folder.inside`."""
        return LocalFolder(self.path / name)

    def exists(self) -> bool:
        """As `Folder.exists`."""
        with _failures("look at", self.path):
            return self.path.is_dir()

    def entries(self) -> dict[str, int | None]:
        """As `Folder.entries`."""
        found: dict[str, int | None] = {}
        with _failures("list", self.path), suppress(FileNotFoundError, NotADirectoryError):
            for path in self.path.iterdir():
                with suppress(FileNotFoundError):  # removed since
                    found[path.name] = None if path.is_dir() else path.stat().st_size
        return found

    def make(self) -> None:
        """As `Folder.make`."""
        with _failures("make", self.path):
            new = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for path in new:
                _sync(path.parent)

    @contextmanager
    def read(self, name: str) -> Iterator[Source]:
        """As `Folder.read`."""
        path = self.path / name
        with _failures("read", path), open(path, "rb", buffering=0) as file:
            yield file

    @contextmanager
    def write(self, name: str) -> Iterator[Sink]:
        """As `Folder.write`."""
        path, draft = self.path / name, self.path / (name + DRAFT)
        with _failures("write", path):
            try:
                with direct(draft) as sink:
                    yield sink
                os.replace(draft, path)
            except BaseException:
                with suppress(OSError):  # what went wrong first is what matters
                    draft.unlink(missing_ok=True)
                raise
            _sync(self.path)

    def delete(self, name: str) -> None:
        """As `Folder.delete`."""
        path = self.path / name
        with _failures("remove", path), suppress(FileNotFoundError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def draft(self, name: str) -> str:
        """As `Folder.draft`."""
        return name + DRAFT

    def publish(self, name: str) -> None:
        """As `Folder.publish`: atomic."""
        path = self.path / name
        with _failures("write", path):
            os.rename(self.path / (name + DRAFT), path)
            _sync(self.path)


def _sync(directory: Path) -> None:
    """Make names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounts have no such call for names
            raise
    finally:
        os.close(descriptor)


_FULL = "free some space or use another directory; what was complete before stays usable"
_FORBIDDEN = "give this user the right to, or use another directory"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOENT: (
        "it is not there, or not on this machine: nodes of several machines need one directory, on a file "
        "system that all of them mount, or an fsspec URL such as s3://bucket/run"
    ),
    errno.ENOTDIR: "a part of that path is a file: use another directory",
}


@contextmanager
def _failures(action: str, path: Path) -> Iterator[None]:
    """Turn what the system refuses into CheckpointError."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk or the network it is mounted over")
        raise CheckpointError(
            f"cannot {action} {path}: {error.strerror or error}{_free(error, path)}: {advice}"
        ) from error


def _free(error: OSError, path: Path) -> str:
    """What is left on a full disk."""
    if error.errno != errno.ENOSPC:
        return ""
    try:
        return f", {shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free"
    except OSError:  # it vanished meanwhile
        return ""
