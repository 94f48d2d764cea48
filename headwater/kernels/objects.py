"""Machine code of compiled kernels on disk, and how it is called without numba.

Importing numba and having it load what it stored takes half a second of CPU in every process, and linking the
code alone next to nothing. So numba compiles, its code is stored beside the module's text, and llvmlite links
it. The code calls functions of numba's extension modules, which are loaded without numba. Where anything is
missing, numba loads the module.

Invariants:
- Code is linked only when its checksum is right. What it depends on, the processor too, is in the name of its
  folder (see `cache`).
- A call checks its arguments as numba's dispatcher does, before anything is read, and raises TypeError.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite.binding as llvm
import msgspec
import numpy as np

from headwater.loggers import logger

_log = logger("headwater.kernels")

_NAME = "objects"
_HELPERS = {
    "numba._helperlib": ("_helperlib", "numba_"),
    "numba._dynfunc": ("_dynfunc", ""),
    "numba.core.runtime._nrt_python": ("core/runtime/_nrt_python", "NRT_"),
}
"""Extension modules of numba: where each lies, and what its functions are called with in compiled code."""


class Argument(msgspec.Struct, frozen=True):
    """What a kernel takes in one place.

    `kind`: "array", "int", "float", "bool" or "tuple". `dtype`, `ndim`: of an array, and of those in a tuple
    of `count`; `writes`: whether the kernel may write to it.
    """

    kind: str
    dtype: str = ""
    ndim: int = 0
    writes: bool = False
    count: int = 0


class Kernel(msgspec.Struct, frozen=True):
    """One compiled function: its object file, and the names in there of its entry and of its environment."""

    name: str
    code: bytes
    entry: str
    environment: str
    arguments: tuple[Argument, ...]


@functools.cache
def processor() -> str:
    """What the code is made for: the processor of this machine, and what it can."""
    return f"{llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def store(folder: Path, module: ModuleType) -> None:
    """Write the code of what numba has just compiled for `module`; nothing where it was in numba's cache.

    Raises:
        OSError: it cannot be written.
    """
    kernels = []
    for name, function in vars(module).items():
        if name in _own(module) and _has_signature(function):
            kernel = _kernel(name, *function.overloads.values())
            if kernel is None:
                return
            kernels.append(kernel)
    if not kernels:
        return
    encoded = msgspec.msgpack.encode(kernels)
    draft = folder / f"{_NAME}.{os.getpid()}"
    draft.write_bytes(hashlib.sha256(encoded).digest() + encoded)
    os.replace(draft, folder / _NAME)


def restore(folder: Path, name: str) -> ModuleType | None:
    """The functions of the module that was stored here, as a module; None where numba must load it."""
    try:
        stored = _read(folder / _NAME)
        return None if stored is None else _link(name, stored)
    except (OSError, RuntimeError, ImportError, AttributeError, KeyError) as error:
        # numba of another make, or a system that forbids it: slower, and the same bits.
        _log.info("kernels are loaded by numba: %s: %s", type(error).__name__, error)
        return None


# ── storing ─────────────────────────────────────────────────────────────────────────────────────


def _own(module: ModuleType) -> set[str]:
    """Names of functions that the module itself defines for callers in Python."""
    return {name for name, it in vars(module).items() if getattr(it, "__module__", "") == module.__name__}


def _has_signature(function: Any) -> bool:
    """Whether it was compiled for callers in Python. Others are compiled for each kind of argument that these
    pass them, and are part of their code."""
    return isinstance(getattr(function, "overloads", None), dict) and not function._can_compile


def _kernel(name: str, *results: Any) -> Kernel | None:
    """What is stored of a function with one signature; None where that is not all there is to it."""
    if len(results) != 1 or results[0].environment.consts:
        return None
    [result] = results
    library, description = result.library, result.fndesc
    try:
        _, kind, data = library.serialize_using_object_code()
    except RuntimeError:  # it was not compiled here
        return None
    arguments = tuple(_argument(one) for one in result.signature.args)
    if kind != "object" or None in arguments:
        return None
    entry, environment = description.llvm_cpython_wrapper_name, description.env_name
    return Kernel(name, data[0], entry, environment, arguments)  # type: ignore[arg-type]  # none is None


def _argument(given: Any) -> Argument | None:
    from numba import types  # it is here already, as it has compiled

    if isinstance(given, types.Array):
        if given.layout != "C":
            return None
        return Argument("array", str(given.dtype), given.ndim, given.mutable)
    if isinstance(given, types.BaseTuple):
        elements: Any = given
        kinds = {_argument(one) for one in elements}
        if not kinds:
            return Argument("tuple")
        one = kinds.pop()
        if kinds or one is None or one.kind not in ("array", "float"):
            return None
        return Argument("tuple", one.dtype, one.ndim, one.writes, len(given))
    if isinstance(given, types.Boolean):
        return Argument("bool")
    if isinstance(given, types.Integer):
        return Argument("int")
    return Argument("float") if isinstance(given, types.Float) else None


# ── linking ─────────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> list[Kernel] | None:
    """What is stored there, undamaged; None otherwise."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    return msgspec.msgpack.decode(data[32:], type=list[Kernel])


def _link(name: str, kernels: Sequence[Kernel]) -> ModuleType:
    helpers = _helpers()
    make, environment = helpers["numba._dynfunc"].make_function, helpers["numba._dynfunc"].Environment
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    for kernel in kernels:
        engine.add_object_file(llvm.ObjectFileRef.from_data(kernel.code))
    engine.finalize_object()
    module = ModuleType(name)
    for kernel in kernels:
        its_own = environment({})
        place = engine.get_global_value_address(kernel.environment)
        entry = engine.get_function_address(kernel.entry)
        if not (place and entry):
            raise RuntimeError(f"{kernel.name} is not in its object file")
        ctypes.c_void_p.from_address(place).value = id(its_own)
        code = make(module, kernel.name, "", entry, its_own, (engine, its_own))  # which keeps both
        setattr(module, kernel.name, _checked(kernel, code))
    return module


@functools.cache
def _helpers() -> dict[str, ModuleType]:
    """numba's extension modules, loaded without numba, whose functions the linker then knows."""
    found = {}
    for name, (place, prefix) in _HELPERS.items():
        found[name] = sys.modules.get(name) or _extension(name, place)
        for function, address in getattr(found[name], "c_helpers", {}).items():
            llvm.add_symbol(function if function.startswith("_") else prefix + function, address)
    return found


def _extension(name: str, place: str) -> ModuleType:
    spec = importlib.util.find_spec("numba")  # does not import it
    if spec is None or spec.origin is None:
        raise ImportError("numba is not installed")
    base = Path(spec.origin).parent / place
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    path = next((str(base) + suffix for suffix in suffixes if os.path.exists(str(base) + suffix)), None)
    if path is None:
        raise ImportError(f"numba has no {place}")
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    found = importlib.util.spec_from_loader(name, loader, origin=path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    loader.exec_module(module)
    sys.modules[name] = module  # numba, where it is imported later, goes on with this one
    return module


# ── calling ─────────────────────────────────────────────────────────────────────────────────────


def _checked(kernel: Kernel, code: Callable[..., Any]) -> Callable[..., Any]:
    """`code`, called only with what it was compiled for: it reads memory as its signature says.

    The checks are written out as Python text, since they are on the way of every step.
    """
    names = [f"a{place}" for place in range(len(kernel.arguments))]
    known: dict[str, Any] = {"code": code, "ndarray": np.ndarray, "Integer": np.integer, "Real": np.floating}
    known["Bool"] = np.bool_

    def refused(*given: Any) -> TypeError:
        return TypeError(f"{kernel.name} takes {_described(kernel.arguments)}, got {_kinds(given)}")

    known["refused"] = refused
    checks = [
        check
        for name, argument in zip(names, kernel.arguments, strict=True)
        for check in _checks(name, argument, known)
    ]
    taken = ", ".join(names)
    lines = [f"def {kernel.name}({taken}):"]
    if checks:
        lines += [f"    if not ({' and '.join(checks)}):", f"        raise refused({taken})"]
    lines.append(f"    return code({taken})")
    exec("\n".join(lines), known)
    function: Callable[..., Any] = known[kernel.name]
    return function


def _checks(name: str, argument: Argument, known: dict[str, Any]) -> Sequence[str]:
    if argument.kind == "int":
        return (f"(type({name}) is int or isinstance({name}, Integer))",)
    if argument.kind == "bool":
        return (f"isinstance({name}, (bool, Bool))",)
    if argument.kind == "float":
        return (f"(type({name}) is float or isinstance({name}, (int, Integer, Real)))",)
    if argument.kind == "tuple":
        every = "" if not argument.count else _every(name, argument, known)
        return (f"type({name}) is tuple and len({name}) == {argument.count}{every}",)
    return (_array(name, argument, known),)


def _every(name: str, argument: Argument, known: dict[str, Any]) -> str:
    if argument.dtype:
        return "".join(
            f" and {_array(f'{name}[{place}]', argument, known)}" for place in range(argument.count)
        )
    return f" and all(isinstance(one, (float, int, Real, Integer)) for one in {name})"


def _array(name: str, argument: Argument, known: dict[str, Any]) -> str:
    dtype = f"d_{argument.dtype}"
    known[dtype] = np.dtype(argument.dtype)
    layout = (
        f"{name}.flags.carray" if argument.writes else f"{name}.flags.c_contiguous and {name}.flags.aligned"
    )
    kind = f"isinstance({name}, ndarray) and {name}.dtype == {dtype} and {name}.ndim == {argument.ndim}"
    return f"{kind} and {layout}"


def _described(arguments: Sequence[Argument]) -> str:
    said = []
    for one in arguments:
        array = f"{one.dtype}[{', '.join(':' * one.ndim)}]"
        said.append({"array": array, "tuple": f"{one.count} × {array}"}.get(one.kind, one.kind))
    return ", ".join(said)


def _kinds(given: Sequence[Any]) -> str:
    return ", ".join(
        f"{one.dtype}{list(one.shape)}" if isinstance(one, np.ndarray) else type(one).__name__
        for one in given
    )
