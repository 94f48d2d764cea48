"""Access to memory by address for loops over ids and rows, and the hash of ids.

Imported only by generated modules, as `headwater.kernels.primitives` is.

Invariants:
- Nothing here checks an address or keeps its memory alive: who passes it does.
- `mix` is the hash of `headwater.spec.placement`, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BYTE, INT, LONG, DOUBLE = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.DoubleType()

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


def _accessors(numba_type: Any, llvm_type: Any) -> Any:
    """`read(address, index)` and `write(address, index, value)` of elements of one type."""

    def place(builder: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], llvm_type.as_pointer())
        return builder.gep(pointer, [arguments[1]])

    @intrinsic
    def read(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(place(builder, arguments), align=4)

        return numba_type(types.int64, types.int64), generate

    @intrinsic
    def write(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.store(arguments[2], place(builder, arguments), align=4)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, numba_type), generate

    return read, write


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
