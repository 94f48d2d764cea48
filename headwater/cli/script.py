"""A user's script as a module: loaded as `python script.py` would, short of its main block.

Invariants:
- The module cannot be imported under its name, so workers get its functions by value: a script may have
  any file name, and its top level runs once, here.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from headwater.engines.by_value import hand_on_by_value
from headwater.errors import ConfigurationError, HeadwaterError

MODULE = "headwater_script"
"""What `__name__` is in the script, and so what `if __name__ == "__main__":` is compared with."""


class ScriptError(HeadwaterError):
    """The script raised while it was loaded; the text is its traceback."""


def load_function(target: str) -> Callable[..., Any]:
    """The function that SCRIPT[:FUNCTION] names; runs the script's top level.

    Raises:
        ConfigurationError: there is no such file, or no such function in it: lists those it has.
        ScriptError: the script raised.
    """
    path, name = _split(target)
    module = load_script(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigurationError(f"{path} has no function {name!r}: {_choices(module, path)}")
    return function  # type: ignore[no-any-return]


def load_script(path: Path) -> ModuleType:
    """Execute the file as the module `MODULE`; its folder goes first on `sys.path`, it alone in `sys.argv`.

    Raises:
        ConfigurationError: it cannot be read.
        ScriptError: it raised; SystemExit counts as raising.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read the script {path}: {error.strerror}") from error
    module = ModuleType(MODULE)
    module.__file__ = str(path.resolve())
    sys.modules[MODULE] = module
    cloudpickle.register_pickle_by_value(module)
    hand_on_by_value()
    sys.path.insert(0, str(path.resolve().parent))
    sys.argv = [str(path)]
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ScriptError(f"{path} failed while it was loaded\n\n{_own_frames(error)}") from error
    return module


def script_path(target: str) -> Path:
    """The file that SCRIPT[:FUNCTION] names."""
    return _split(target)[0]


def _split(target: str) -> tuple[Path, str]:
    """Path and function; a colon that is part of the path is left alone."""
    path, colon, name = target.rpartition(":")
    if colon and name.isidentifier() and not Path(target).exists():
        return Path(path), name
    return Path(target), "train"


def _choices(module: ModuleType, path: Path) -> str:
    """The functions that the script itself defines, as advice."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == MODULE]
    functions = [value.__name__ for value in own if inspect.isfunction(value)]
    if not functions:
        return "it defines no functions; write one that takes a worker"
    return f"it has {', '.join(functions)}; name one as {path}:{functions[0]}"


def _own_frames(error: BaseException) -> str:
    """The traceback without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
