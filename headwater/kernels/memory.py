"""Access to memory by address, and the hash of ids, for generated loops.

Imported only by generated modules, as `headwater.kernels.primitives` is.

Invariants:
- Nothing here checks an address or keeps its memory alive: who passes it does.
- `mix` is the hash of `headwater.placement`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BYTE, INT, LONG, FLOAT, DOUBLE = (
    ir.IntType(8),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
    ir.DoubleType(),
)

inlined = njit(error_model="numpy", forceinline=True)
"""For small functions within the innermost loops."""


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line at int64 `address`; any address is harmless."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, INT, INT, INT])
        name = "llvm.prefetch.p0"
        known = builder.module.globals.get(name)
        read, keep, data = INT(0), INT(3), INT(1)
        builder.call(known or ir.Function(builder.module, kind, name), [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def bits_of(typing_context: Any, number: Any) -> Any:
    """int64 with the bits of a float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], LONG)

    return types.int64(types.float64), generate


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """float64 with the bits of an int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], DOUBLE)

    return types.float64(types.int64), generate


def _accessors(numba_type: Any, llvm_type: Any, scope: str = "", others: tuple[str, ...] = ()) -> Any:
    """`read(address, index)` and `write(address, index, value)` of elements of one type.

    With a scope, the compiler may assume that what is read or written through these never overlaps what
    is through accessors of the `others`: without that, loops over several rows are not vectorised.
    """

    def place(builder: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], llvm_type.as_pointer())
        return builder.gep(pointer, [arguments[1]])

    def finish(builder: Any, instruction: Any) -> Any:
        instruction.align = 4
        if scope:
            _mark(builder.module, instruction, scope, others)
        return instruction

    @intrinsic
    def read(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return finish(builder, builder.load(place(builder, arguments)))

        return numba_type(types.int64, types.int64), generate

    @intrinsic
    def write(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            finish(builder, builder.store(arguments[2], place(builder, arguments)))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), generate

    return read, write


def _mark(module: Any, instruction: Any, scope: str, others: tuple[str, ...]) -> None:
    domain = module.add_metadata([ir.MetaDataString(module, "headwater")])
    nodes = {name: module.add_metadata([ir.MetaDataString(module, name), domain]) for name in (scope, *others)}
    instruction.set_metadata("alias.scope", module.add_metadata([nodes[scope]]))
    instruction.set_metadata("noalias", module.add_metadata([nodes[name] for name in others]))


def disjoint(count: int) -> list[Any]:
    """`count` pairs of (read, write) of float32; what one pair touches no other pair touches."""
    names = [f"memory{i}" for i in range(count)]
    return [
        _accessors(types.float32, FLOAT, name, tuple(other for other in names if other != name))
        for name in names
    ]


read_int, write_int = _accessors(types.int32, INT)
read_long, write_long = _accessors(types.int64, LONG)


@inlined
def mix(value: Any) -> Any:
    """uint64 → uint64, one to one (the finaliser of splitmix64, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@inlined
def place_of(row: Any, addresses: Any, shift: Any, row_bytes: Any) -> Any:
    """Address of a row in slabs (`headwater.shard.slabs`)."""
    chunk = row >> shift
    return addresses[np.uint64(chunk)] + (row - (chunk << shift)) * row_bytes
