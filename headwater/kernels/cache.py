"""Generated modules on disk: written, compiled once for all processes, loaded.

Invariants:
- A module lies under the hash of its text and of everything that its machine code comes from, so an edited
  rule, template or library never meets old code. (numba's own cache keeps a caller's old machine code
  when a function it calls was edited.)
- Code is imported from the directory, so it is private to the user: anything else is refused.
- A module that was compiled once is loaded without numba (see `objects`) and without a lock: no process can
  hold up another one. Of several processes that need the same new module, one compiles and the others wait,
  for a limited time: a process that is stopped while it compiles holds up nobody for longer. Two that compile
  the same do no harm.
- A forked process has nothing of a lock that another thread of its parent held.
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
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from headwater.errors import ConfigurationError, EnvironmentFailure
from headwater.kernels import objects
from headwater.loggers import logger

_log = logger("headwater.kernels")

_PATIENCE_S, _LIMIT_S = 5.0, 60.0
"""After how many seconds a wait for another process that compiles is told, and given up."""
_AGAIN_S = 0.05

_loaded: dict[str, ModuleType] = {}
_threads: dict[str, threading.Lock] = {}
"""By name of the module: one thread loads it."""
_making = threading.RLock()
"""One thread links or compiles: neither numba's import nor its compiler is made for two at once."""
_held: set[int] = set()
"""Descriptors of the lock files that this process has open."""


def load(text: str) -> ModuleType:
    """Import the module with this source text; its functions are compiled where no process has done so.

    Blocks while it is compiled, here or, for at most a minute, in another process.

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
        with _threads.setdefault(name, threading.Lock()):
            if name not in _loaded:
                _loaded[name] = _loaded_from(folder, name, text)
            return _loaded[name]
    except OSError as error:
        raise EnvironmentFailure(
            f"compiled kernels cannot be stored ({error}): set XDG_CACHE_HOME"
        ) from error


def _loaded_from(folder: Path, name: str, text: str) -> ModuleType:
    path, compiled = folder / f"{name}.py", folder / "compiled"

    def is_there() -> bool:
        return compiled.exists() and path.exists() and path.read_text() == text

    if not is_there():
        with _only_one_process(folder / "lock"):
            if not is_there():
                _write(path, text)
                with _making:
                    module = _imported(name, path)
                objects.store(folder, module)
                compiled.touch()
                return module
    with _making:
        return objects.restore(folder, name) or _imported(name, path)


def _digest(text: str) -> str:
    """Of the text, of the functions that it imports from here, and of what compiles them."""
    names = ("primitives.py", "memory.py", "lines.py", "objects.py")
    imported = "".join((Path(__file__).parent / name).read_text() for name in names)
    versions = [importlib.metadata.version(package) for package in ("numba", "llvmlite")]
    parts = "\0".join([text, imported, *versions, sys.version, objects.processor()])
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
    """Compile alone, or after a limited wait beside another process."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _held.add(descriptor)
    try:
        if _locked(descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Wait for the lock; False where it cannot be had in time, or at all on this file system."""
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            waited = time.monotonic() - began
        except OSError:
            return False
        holder = os.pread(descriptor, 32, 0).decode(errors="replace") or "unknown"
        if waited > _LIMIT_S:
            _log.warning(
                "process %s has compiled a kernel for %.0f s: it is compiled here too", holder, waited
            )
            return False
        if waited > _PATIENCE_S and not told:
            told = True
            _log.warning("waits for process %s, which compiles a kernel that is needed here", holder)
        time.sleep(_AGAIN_S)


def _forget_locks() -> None:
    """In a forked process: the threads that held them are not there, and their parent's locks stay its
    own."""
    global _making
    _making = threading.RLock()
    _threads.clear()
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)


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
