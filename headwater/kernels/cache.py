"""Generated modules on disk: written, compiled once for all processes, loaded.

Invariants:
- A module lies under the hash of its text and of everything that its machine code comes from, so an edited
  rule, template or library never meets old code. (numba's own cache keeps a caller's old machine code
  when a function it calls was edited.)
- Code is imported from the directory, so it is private to the user: anything else is refused.
- Of several processes that need the same new module, one compiles and the others wait, then load.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from headwater.errors import ConfigurationError, EnvironmentFailure

_loaded: dict[str, ModuleType] = {}
"""By name. The lock of `_only_one_process` keeps threads apart too, as each opens the file anew."""


def load(text: str) -> ModuleType:
    """Import the module with this source text; its functions are compiled where no process has done so.

    Blocks while another process compiles the same module.

    Raises:
        ConfigurationError: the cache directory is not this user's alone, or the text cannot be compiled.
        EnvironmentFailure: the cache cannot be written.
    """
    digest = _digest(text)
    name = f"headwater_kernel_{digest}"
    if name in _loaded:
        return _loaded[name]
    try:
        folder = _cache_directory() / digest
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{name}.py"
        with _only_one_process(folder / "lock"):
            if not path.exists() or path.read_text() != text:
                _write(path, text)
            return _loaded.setdefault(name, _loaded.get(name) or _imported(name, path))
    except OSError as error:
        raise EnvironmentFailure(
            f"compiled kernels cannot be stored ({error}): set XDG_CACHE_HOME"
        ) from error


def _digest(text: str) -> str:
    """Of the text, of the functions that it imports from here, and of what compiles them."""
    names = ("primitives.py", "memory.py", "lines.py")
    imported = "".join((Path(__file__).parent / name).read_text() for name in names)
    versions = [importlib.metadata.version(package) for package in ("numba", "llvmlite")]
    parts = "\0".join([text, imported, *versions, sys.version])
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def _cache_directory() -> Path:
    """`$XDG_CACHE_HOME/headwater/kernels`, or one in the temporary directory where that cannot be written."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(configured) if os.path.isabs(configured) else Path("~/.cache").expanduser()
        return _private(home / "headwater" / "kernels")
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return _private(Path(tempfile.gettempdir()) / f"headwater-kernels-{os.getuid()}")


def _private(folder: Path) -> Path:
    """Make `folder` unless it is there, and refuse it unless it is this user's alone.

    Raises:
        OSError: it cannot be made or written.
        ConfigurationError: another user owns or may write it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise ConfigurationError(
            f"{folder} must be a directory of this user with mode 700, since code is loaded from it: "
            "remove it, or set XDG_CACHE_HOME"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


@contextmanager
def _only_one_process(lock: Path) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    """Under its name only when complete."""
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text)
    os.replace(draft, path)


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: numba stores and finds its functions by the module's name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, importlib.import_module("numba.core.errors").NumbaError):
            raise ConfigurationError(f"{path} cannot be compiled: {error}") from error
        raise
    return module
