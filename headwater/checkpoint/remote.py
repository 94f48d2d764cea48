"""Folders behind fsspec: object stores and other file systems that are reached by URL.

There is no rename to rely on, so a folder is written under its own name and its manifest last, and there is
no lock. fsspec is imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headwater.errors import CheckpointError, ConfigurationError, HeadwaterError


class RemoteFolder:
    """A folder at a URL such as `s3://bucket/run`; the methods are those of `store.Folder`.

    Raises:
        ConfigurationError: fsspec, or what it needs for that kind of URL, is not installed.
    """

    def __init__(self, url: str, opened: tuple[Any, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._system, self._path = opened or _opened(self.url)

    def inside(self, name: str) -> RemoteFolder:
        """The folder `name` of this one, there or not."""
        return RemoteFolder(f"{self.url}/{name}", (self._system, f"{self._path}/{name}"))

    def exists(self) -> bool:
        """Whether there is anything in it."""
        with self._failures("look for", ""):
            self._system.invalidate_cache()  # another process may have written since
            return bool(self._system.isdir(self._path))

    def entries(self) -> dict[str, int | None]:
        """Name → size in bytes, None for folders."""
        with self._failures("list", ""):
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._path, detail=True)
            except FileNotFoundError:
                return {}
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: None
            if entry["type"] == "directory"
            else entry["size"]
            for entry in found
            if entry["name"].rstrip("/") != self._path.rstrip("/")  # some stores list a folder in itself
        }

    def make(self) -> None:
        """Make it; object stores have nothing to make."""
        with self._failures("make", ""):
            self._system.makedirs(self._path, exist_ok=True)

    @contextmanager
    def read(self, name: str) -> Iterator[Any]:
        """Open a file; ranges of it are fetched as they are asked for."""
        with self._failures("read", name), self._system.open(f"{self._path}/{name}", "rb") as file:
            yield file

    @contextmanager
    def write(self, name: str) -> Iterator[Any]:
        """Write a file; most stores show it when the block ends."""
        with self._failures("write", name), self._system.open(f"{self._path}/{name}", "wb") as file:
            yield file

    def delete(self, name: str) -> None:
        """Remove a file or a folder."""
        with self._failures("remove", name):
            self._system.invalidate_cache()
            try:
                self._system.rm(f"{self._path}/{name}", recursive=True)
            except FileNotFoundError:
                return

    def draft(self, name: str) -> str:
        """The name itself: the manifest, written last, is what makes it a checkpoint."""
        return name

    def publish(self, name: str) -> None:
        """Nothing to do."""

    @contextmanager
    def _failures(self, action: str, name: str) -> Iterator[None]:
        """Turn whatever a file system of fsspec raises into CheckpointError."""
        try:
            yield
        except HeadwaterError:
            raise
        except Exception as error:  # each has errors of its own, of no common class
            url = f"{self.url}/{name}" if name else self.url
            raise CheckpointError(
                f"cannot {action} {url}: {type(error).__name__}: {error}: "
                "check the URL, the credentials and the network"
            ) from error


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise ConfigurationError(
            f"{url} needs fsspec, which is not installed: pip install '.[files]' in a clone, "
            "or use a local path"
        ) from error
    protocol = url.partition("://")[0]
    try:
        system, path = fsspec.core.url_to_fs(url)
        return system, path.rstrip("/")
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"fsspec cannot open {protocol}:// ({error}): install what it asks for, or use a local path"
        ) from error
