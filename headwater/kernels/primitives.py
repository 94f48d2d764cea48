"""What generated loops need beyond Python: float32 memory at raw addresses, and how to compile.

Imported only by generated modules, so that numba is loaded with the first kernel and not before.

Invariants:
- Never fastmath, never parallel: the same bits whatever the machine, the length and the cut.
- An address belongs to one *lane*; memory of different lanes never overlaps. That is the promise that
  lets loops over any number of vectors run in vector registers without checks.
- Nothing here owns or checks memory: who passes an address keeps it alive and long enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

inner = njit(error_model="numpy")
"""For functions that only compiled functions call."""

outer = functools.partial(njit, cache=True, nogil=True, error_model="numpy")
"""For kernels, with the one signature they are compiled for: `@outer("void(int64)")`."""

LINE = 16
"""Elements in a cache line of 64 bytes."""

BLOCK = 128
"""Elements that pass through the cache at once: enough to hide the loops' own cost."""

STREAMED = 1 << 20
"""Answers of at least so many elements (4 MiB) bypass the cache: the reader would find no trace of them there
anyway, and memory need not be read before it is overwritten. Smaller ones are read from the cache."""

WINDOWS, VALUES, LANES = 0, 1, 32
"""Lanes: gradients, sums and answers; a model's values; from 2 on one for each state."""

_intrinsic: Callable[..., Any] = intrinsic(prefer_literal=True)
"""For operations of which an argument, the lane, must be a constant."""

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(_FLOAT, LINE)


def _at(builder: Any, address: Any, index: Any, element: Any = _FLOAT) -> Any:
    """Pointer to `element` at float32 number `index` from `address`."""
    place = builder.gep(builder.inttoptr(address, _FLOAT.as_pointer()), [index])
    return builder.bitcast(place, element.as_pointer())


def _in_lane(builder: Any, instruction: Any, lane: Any) -> Any:
    """Tell LLVM that a load or store of this lane touches no other lane's memory."""
    module = builder.module
    domain = module.add_metadata(["headwater"])
    scopes = [module.add_metadata([f"lane {number}", domain]) for number in range(LANES)]
    own = scopes.pop(lane.literal_value)
    instruction.set_metadata("alias.scope", module.add_metadata([own]))
    instruction.set_metadata("noalias", module.add_metadata(scopes))
    return instruction


@_intrinsic
def load(typing_context: Any, address: Any, index: Any, lane: Any) -> Any:
    """The float32 number `index` from `address`; `lane` is a constant."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _in_lane(builder, builder.load(_at(builder, *arguments[:2]), align=4), lane)

    return types.float32(types.int64, types.int64, lane), generate


@_intrinsic
def store(typing_context: Any, address: Any, index: Any, value: Any, lane: Any) -> Any:
    """Set the float32 number `index` from `address` to `value`, rounded; `lane` is a constant."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _in_lane(builder, builder.store(arguments[2], _at(builder, *arguments[:2]), align=4), lane)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, lane), generate


def _line_operation(emit: Callable[[Any, Any, Any], None]) -> Callable[..., Any]:
    """`operation(destination, source, index)` on the `LINE` elements from number `index` on."""

    def operation(typing_context: Any, destination: Any, source: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            destination, source, index = arguments
            line = builder.load(_at(builder, source, index, _FLOATS), align=4)
            emit(builder, _at(builder, destination, index, _FLOATS), line)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return intrinsic(operation)


def _copy(builder: Any, destination: Any, line: Any) -> None:
    builder.store(line, destination, align=4)


def _add(builder: Any, destination: Any, line: Any) -> None:
    builder.store(builder.fadd(builder.load(destination, align=4), line), destination, align=4)


def _stream(builder: Any, destination: Any, line: Any) -> None:
    bypassing = builder.store(line, destination, align=4 * LINE)
    bypassing.set_metadata("nontemporal", builder.module.add_metadata([_INT32(1)]))


copy_line = _line_operation(_copy)
add_line = _line_operation(_add)
stream_line = _line_operation(_stream)
"""Like copy_line, but past the cache; `destination` is a multiple of 64, and `fence` comes after the last."""


@intrinsic
def square_line(typing_context: Any, sums: Any, source: Any, index: Any, divisor: Any) -> Any:
    """sums += (source / divisor)², for `LINE` elements from number `index` on: the quotient is float32, its
    square and the sums, one each at the address `sums`, are float64."""
    doubles = ir.VectorType(ir.DoubleType(), LINE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, source, index, divisor = arguments
        place = builder.inttoptr(sums, doubles.as_pointer())
        every = builder.insert_element(_FLOATS(ir.Undefined), divisor, _INT32(0))
        every = builder.shuffle_vector(every, _FLOATS(ir.Undefined), ir.VectorType(_INT32, LINE)([0] * LINE))
        line = builder.fdiv(builder.load(_at(builder, source, index, _FLOATS), align=4), every)
        wide = builder.fpext(line, doubles)
        total = builder.fadd(builder.load(place, align=8), builder.fmul(wide, wide))
        builder.store(total, place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), generate


@intrinsic
def multiply_lines(typing_context: Any, sums: Any, first: Any, second: Any, index: Any) -> Any:
    """sums += first · second, for `LINE` elements from number `index` on: the products, which float64 has
    exactly, and the sums, one each at the address `sums`, are float64."""
    doubles = ir.VectorType(ir.DoubleType(), LINE)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, first, second, index = arguments
        place = builder.inttoptr(sums, doubles.as_pointer())
        wide = [
            builder.fpext(builder.load(_at(builder, source, index, _FLOATS), align=4), doubles)
            for source in (first, second)
        ]
        total = builder.fadd(builder.load(place, align=8), builder.fmul(*wide))
        builder.store(total, place, align=8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


_DOUBLES = ir.VectorType(ir.DoubleType(), LINE)


def _wide(builder: Any, address: Any, index: Any) -> Any:
    """`LINE` float32 from number `index` on, as float64."""
    return builder.fpext(builder.load(_at(builder, address, index, _FLOATS), align=4), _DOUBLES)


def _every(builder: Any, value: Any) -> Any:
    """`LINE` times the same float64."""
    line = builder.insert_element(_DOUBLES(ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(line, _DOUBLES(ir.Undefined), ir.VectorType(_INT32, LINE)([0] * LINE))


TOGETHER = 4
"""Vectors that `scale_lines` and `fold_products` read side by side."""

_AHEAD = 2048
"""Bytes ahead of what is read that memory is asked for. Vectors are read by turns, a page of 4 KiB of each,
and the processor's own reading ahead begins anew with every page."""


def _ask_ahead(builder: Any, address: Any, index: Any) -> None:
    """Have memory behind float32 number `index` from `address` brought to the cache; it need not exist."""
    byte = ir.IntType(8).as_pointer()
    name = "llvm.prefetch"
    kind = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
    place = builder.add(address, builder.add(builder.mul(index, _INT64(4)), _INT64(_AHEAD)))
    ask = builder.module.declare_intrinsic(name, [byte], kind)
    builder.call(ask, [builder.inttoptr(place, byte), _INT32(0), _INT32(3), _INT32(1)])


def _numbers(builder: Any, address: Any, kind: Any, count: int) -> list[Any]:
    """So many int64 or float64 from an address on."""
    first = builder.inttoptr(address, kind.as_pointer())
    return [builder.load(builder.gep(first, [_INT64(number)])) for number in range(count)]


def _scale(count: int) -> Callable[..., Any]:
    """`operation(sums, places, coefficients, n)`: float64[n] at `sums` += coefficients[0] · source 0 + …, in
    this order; `places`, `coefficients`: addresses of int64[count], those of the sources, and of
    float64[count]. Products and sums are rounded to float64 each."""

    def operation(typing_context: Any, sums: Any, places: Any, coefficients: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, places, coefficients, n = arguments
            sources = _numbers(builder, places, _INT64, count)
            scales = [_every(builder, one) for one in _numbers(builder, coefficients, ir.DoubleType(), count)]
            first = builder.inttoptr(sums, ir.DoubleType().as_pointer())
            with cgutils.for_range(builder, builder.sdiv(n, _INT64(LINE))) as loop:
                index = builder.mul(loop.index, _INT64(LINE))
                there = builder.bitcast(builder.gep(first, [index]), _DOUBLES.as_pointer())
                total = builder.load(there, align=8)
                for source, scale in zip(sources, scales, strict=True):
                    _ask_ahead(builder, source, index)
                    total = builder.fadd(total, builder.fmul(_wide(builder, source, index), scale))
                builder.store(total, there, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    return intrinsic(operation)


scale_line, scale_lines = _scale(1), _scale(TOGETHER)


@intrinsic
def round_line(typing_context: Any, out: Any, index: Any, sums: Any) -> Any:
    """out = sums, rounded to float32, for `LINE` elements from number `index` on; `sums`: of float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, index, sums = arguments
        here = builder.gep(builder.inttoptr(sums, ir.DoubleType().as_pointer()), [index])
        wide = builder.load(builder.bitcast(here, _DOUBLES.as_pointer()), align=8)
        builder.store(builder.fptrunc(wide, _FLOATS), _at(builder, out, index, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _fold(step: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """`operation(sums, one, n)`: float64[LINE] at the address `sums` becomes what `step` makes of float32[n];
    element i counts for number i mod `LINE`, in the order of i."""

    def operation(typing_context: Any, sums: Any, one: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, one, n = arguments
            total = cgutils.alloca_once(builder, _DOUBLES)
            builder.store(_DOUBLES([0.0] * LINE), total)
            with cgutils.for_range(builder, builder.sdiv(n, _INT64(LINE))) as loop:
                index = builder.mul(loop.index, _INT64(LINE))
                _ask_ahead(builder, one, index)
                builder.store(step(builder, builder.load(total), _wide(builder, one, index)), total)
            builder.store(builder.load(total), builder.inttoptr(sums, _DOUBLES.as_pointer()), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return intrinsic(operation)


def _fold_products(count: int) -> Callable[..., Any]:
    """`operation(sums, one, others, n)`: as `_fold`, of the products of float32[n] with as many each of the
    vectors whose addresses are int64[count] at `others`; `sums`: of float64[count, LINE]."""

    def operation(typing_context: Any, sums: Any, one: Any, others: Any, n: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, one, others, n = arguments
            places = _numbers(builder, others, _INT64, count)
            totals = [cgutils.alloca_once(builder, _DOUBLES) for _ in places]
            for total in totals:
                builder.store(_DOUBLES([0.0] * LINE), total)
            with cgutils.for_range(builder, builder.sdiv(n, _INT64(LINE))) as loop:
                index = builder.mul(loop.index, _INT64(LINE))
                line = _wide(builder, one, index)
                for place, total in zip(places, totals, strict=True):
                    _ask_ahead(builder, place, index)
                    product = builder.fmul(line, _wide(builder, place, index))
                    builder.store(builder.fadd(builder.load(total), product), total)
            first = builder.inttoptr(sums, _DOUBLES.as_pointer())
            for number, total in enumerate(totals):
                builder.store(builder.load(total), builder.gep(first, [_INT64(number)]), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), generate

    return intrinsic(operation)


def _magnitude(builder: Any, line: Any) -> Any:
    positive = builder.fcmp_ordered(">=", line, _DOUBLES([0.0] * LINE))
    return builder.select(positive, line, builder.fneg(line))


def _larger(builder: Any, most: Any, value: Any) -> Any:
    """The larger one; NaN where either is."""
    take = builder.or_(builder.fcmp_ordered(">", value, most), builder.fcmp_unordered("!=", value, value))
    return builder.select(take, value, most)


fold_magnitudes = _fold(lambda builder, total, line: builder.fadd(total, _magnitude(builder, line)))
fold_largest = _fold(lambda builder, total, line: _larger(builder, total, _magnitude(builder, line)))
fold_product, fold_products = _fold_products(1), _fold_products(TOGETHER)


@intrinsic
def fence(typing_context: Any) -> Any:
    """Make streamed lines visible to other processes before anything that follows."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def block_of_sums(typing_context: Any) -> Any:
    """Address of `BLOCK` elements on the caller's stack."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = cgutils.alloca_once(builder, ir.ArrayType(_FLOAT, BLOCK))
        place.align = 4 * LINE
        return builder.ptrtoint(place, _INT64)

    return types.int64(), generate


@inner
def address_of(array: Any, n: Any) -> Any:
    """The address of float32[n].

    Raises:
        ValueError: another length.
    """
    if len(array) != n:
        raise ValueError("vectors of one model differ in length")
    return array.ctypes.data


@inner
def add_up(sums: Any, gradients: Any, at: Any, size: Any) -> None:
    """sums = gradients[0] + gradients[1] + … up to the last but one, `size` elements at byte `at` of each."""
    lines = size - size % LINE
    first = gradients[0] + at
    for i in range(0, lines, LINE):
        copy_line(sums, first, i)
    for i in range(lines, size):
        store(sums, i, load(first, i, WINDOWS), WINDOWS)
    for gradient in gradients[1:-1]:
        here = gradient + at
        for i in range(0, lines, LINE):
            add_line(sums, here, i)
        for i in range(lines, size):
            store(sums, i, load(sums, i, WINDOWS) + load(here, i, WINDOWS), WINDOWS)


@inner
def send(answers: Any, values: Any, at: Any, size: Any, streamed: Any) -> None:
    """Copy `size` elements at byte `at` of `values` to the same place of each of the answers."""
    here = values + at
    lines = size - size % LINE
    for answer in answers:
        there = answer + at
        if streamed and there % (4 * LINE) == 0:
            for i in range(0, lines, LINE):
                stream_line(there, here, i)
        else:
            for i in range(0, lines, LINE):
                copy_line(there, here, i)
        for i in range(lines, size):
            store(there, i, load(here, i, VALUES), WINDOWS)
