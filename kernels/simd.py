"""Vector building blocks of the CPU kernels, as numba intrinsics.

The attention tiles are written in LLVM IR with explicit `fma` over vectors of 16 floats: the order of every addition is
then fixed by the source, not chosen by a vectoriser, so a row's result cannot depend on which rows share its tile.
bfloat16 travels as uint16, since numpy has no such type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from dspark.kernels.cpu import inner, intrinsic

LANES = 16
TILE = 4
"""Query vectors that one tile handles together: each K/V vector that is loaded serves all of them."""
MANY_REGISTERS = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
"""Sixteen floats fit into one of 32 registers, not into two of 16. How many sums are kept at a time changes no bit of them."""

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT = ir.IntType(64)


LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts."""
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


@intrinsic
def bits_to_float(typing_context: Any, bits: Any) -> Any:
    """uint32 -> float32, same bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def float_to_bits(typing_context: Any, value: Any) -> Any:
    """float32 -> uint32, same bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def to_float(typing_context: Any, element: Any) -> Any:
    """An element of a cache or activation array (uint16 holding bfloat16, or float32) -> float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == types.float32:
            return args[0]
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), _FLOAT)

    return types.float32(element), codegen


@intrinsic
def store_as(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] = value for a contiguous 1-d array of float32 or of uint16 holding bfloat16 (nearest even)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]])
        if signature.args[0].dtype == types.float32:
            builder.store(args[2], pointer)
            return context.get_dummy_value()
        builder.store(_bfloat16_bits(builder, args[2], ir.IntType(32), ir.IntType(16)), pointer)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.float32), codegen


def _bfloat16_bits(builder: Any, value: Any, words: Any, halves: Any) -> Any:
    """float32 -> bfloat16 bits, to nearest even; words, halves: types of 32 and 16 bits, scalar or vector as `value`."""

    def integer(number: int) -> Any:
        return ir.Constant(words, [number] * words.count if isinstance(words, ir.VectorType) else number)

    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, integer(16)), integer(1))
    rounded = builder.add(bits, builder.add(odd, integer(0x7FFF)))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), integer(0x7FC00000), rounded)
    return builder.trunc(builder.lshr(chosen, integer(16)), halves)


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _vector_load(builder: Any, array_type: Any, data: Any, offset: Any) -> Any:
    """16 consecutive elements from `offset`, as floats."""
    pointer = builder.gep(data, [offset])
    if array_type.dtype == types.float32:
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
    halves = ir.VectorType(ir.IntType(16), LANES)
    words = ir.VectorType(ir.IntType(32), LANES)
    packed = builder.load(builder.bitcast(pointer, halves.as_pointer()), align=2)
    shift = ir.Constant(words, [16] * LANES)
    return builder.bitcast(builder.shl(builder.zext(packed, words), shift), _VECTOR)


def _broadcast(builder: Any, data: Any, offset: Any) -> Any:
    return _splat(builder, builder.load(builder.gep(data, [offset]), align=4))


def _splat(builder: Any, scalar: Any) -> Any:
    """The scalar in every lane."""
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
    )
    return builder.call(function, [a, b, c])


def _across(builder: Any, name: str, vector: Any) -> Any:
    """Reduce over the lanes, in order."""
    arguments = [ir.Constant(_FLOAT, 0.0)] if name == "fadd" else []
    kind = ir.FunctionType(_FLOAT, [one.type for one in arguments] + [_VECTOR])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}f32")
    return builder.call(function, [*arguments, vector])


def _constant(value: int) -> Any:
    return ir.Constant(_INT, value)


@intrinsic
def dot(typing_context: Any, a: Any, a_offset: Any, b: Any, b_offset: Any, size: Any) -> Any:
    """Σ_i a[a_offset + i] · b[b_offset + i] in float32, i < size (a multiple of 16): by lane, then over the lanes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a_data = _data(context, builder, signature.args[0], args[0])
        b_data = _data(context, builder, signature.args[2], args[2])
        total = cgutils.alloca_once(builder, _VECTOR)
        builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
        with cgutils.for_range(builder, builder.lshr(args[4], _constant(4))) as loop:
            step = builder.shl(loop.index, _constant(4))
            left = _vector_load(builder, signature.args[0], a_data, builder.add(args[1], step))
            right = _vector_load(builder, signature.args[2], b_data, builder.add(args[3], step))
            builder.store(_fma(builder, left, right, builder.load(total)), total)
        return _across(builder, "fadd", builder.load(total))

    i = types.int64
    return types.float32(a, i, b, i, i), codegen


@intrinsic
def score_tile(
    typing_context: Any, queries: Any, keys: Any, key_offset: Any, scores: Any, score_offset: Any, stride: Any, dim: Any
) -> Any:
    """scores[m·stride + score_offset + t] = Σ_d queries[d, m] · keys[key_offset + d·16 + t], m < 4, t < 16.

    queries: flat [dim, 4] float32; keys: flat float32 or bfloat16 bits, one block of 16 keys laid out [dim, 16].
    Even and odd d are summed apart (two chains hide the latency of fma), then added.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        query_data = _data(context, builder, signature.args[0], args[0])
        key_data = _data(context, builder, signature.args[1], args[1])
        score_data = _data(context, builder, signature.args[3], args[3])
        key_offset, score_offset, stride, dim = args[2], args[4], args[5], args[6]
        sums = [cgutils.alloca_once(builder, _VECTOR) for _ in range(2 * TILE)]
        for one in sums:
            builder.store(ir.Constant(_VECTOR, [0.0] * LANES), one)
        together = TILE if MANY_REGISTERS else TILE // 2
        for first in range(0, TILE, together):
            with cgutils.for_range(builder, builder.lshr(dim, _constant(1))) as loop:
                for parity in range(2):
                    d = builder.add(builder.shl(loop.index, _constant(1)), _constant(parity))
                    offset = builder.add(key_offset, builder.mul(d, _constant(LANES)))
                    key = _vector_load(builder, signature.args[1], key_data, offset)
                    for m in range(first, first + together):
                        at = builder.add(builder.mul(d, _constant(TILE)), _constant(m))
                        total = sums[parity * TILE + m]
                        builder.store(
                            _fma(builder, _broadcast(builder, query_data, at), key, builder.load(total)), total
                        )
        for m in range(TILE):
            result = builder.fadd(builder.load(sums[m]), builder.load(sums[TILE + m]))
            at = builder.add(score_offset, builder.mul(stride, _constant(m)))
            target = builder.bitcast(builder.gep(score_data, [at]), _VECTOR.as_pointer())
            builder.store(result, target, align=4)
        return context.get_dummy_value()

    i = types.int64
    return types.void(queries, keys, i, scores, i, i, i), codegen


def _make_value_tile(vectors: int) -> Callable[..., None]:
    @intrinsic
    def value_tile(
        typing_context: Any,
        weights: Any,
        weight_offset: Any,
        stride: Any,
        values: Any,
        value_offset: Any,
        sums: Any,
        sum_offset: Any,
        dim: Any,
    ) -> Any:
        """sums[m·dim + sum_offset + c] += Σ_t weights[m·stride + weight_offset + t] · values[value_offset + t·dim + c],

        m < 4, t < 16 in order, c < 16·vectors. values: flat float32 or bfloat16 bits, one block laid out [16, dim].
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            weight_data = _data(context, builder, signature.args[0], args[0])
            value_data = _data(context, builder, signature.args[3], args[3])
            sum_data = _data(context, builder, signature.args[5], args[5])
            weight_offset, stride, value_offset, sum_offset, dim = args[1], args[2], args[4], args[6], args[7]
            totals = [[cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)] for _ in range(TILE)]

            def memory(m: int, v: int) -> Any:
                at = builder.add(builder.add(sum_offset, _constant(v * LANES)), builder.mul(dim, _constant(m)))
                return builder.bitcast(builder.gep(sum_data, [at]), _VECTOR.as_pointer())

            for m in range(TILE):
                for v in range(vectors):
                    builder.store(builder.load(memory(m, v), align=4), totals[m][v])
            with cgutils.for_range(builder, _constant(LANES)) as loop:
                row = builder.add(value_offset, builder.mul(loop.index, dim))
                loaded = [
                    _vector_load(builder, signature.args[3], value_data, builder.add(row, _constant(v * LANES)))
                    for v in range(vectors)
                ]
                for m in range(TILE):
                    at = builder.add(builder.add(weight_offset, loop.index), builder.mul(stride, _constant(m)))
                    weight = _broadcast(builder, weight_data, at)
                    for v in range(vectors):
                        total = totals[m][v]
                        builder.store(_fma(builder, weight, loaded[v], builder.load(total)), total)
            for m in range(TILE):
                for v in range(vectors):
                    builder.store(builder.load(totals[m][v]), memory(m, v), align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(weights, i, i, values, i, sums, i, i), codegen

    return value_tile


def _prefetch(builder: Any, data: Any, offset: Any) -> None:
    """Ask for the element at `offset` to be brought to the second-level cache; an address that is nowhere does no harm."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), "llvm.prefetch.p0i8"
    )
    to_read, second_level, of_data = (ir.Constant(number, value) for value in (0, 2, 1))
    builder.call(function, [builder.bitcast(builder.gep(data, [offset]), pointer), to_read, second_level, of_data])


def _make_panel_tile(rows: int) -> Callable[..., None]:
    @intrinsic
    def panel_tile(
        typing_context: Any,
        x: Any,
        x_offset: Any,
        size: Any,
        panel: Any,
        panel_offset: Any,
        sums: Any,
        ahead: Any,
        ahead_step: Any,
    ) -> Any:
        """sums[16·m + c] = Σ_k x[x_offset + m·size + k] · panel[panel_offset + 16·k + c], m < rows, c < 16,

        k < size in order, each by one `fma`: the same bits whatever `rows`. x, sums: flat float32; panel: flat float32
        or bfloat16 bits. Meanwhile panel[ahead + k·ahead_step] come to the second-level cache, as far as they exist.
        """

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x_data = _data(context, builder, signature.args[0], args[0])
            panel_data = _data(context, builder, signature.args[3], args[3])
            sum_data = _data(context, builder, signature.args[5], args[5])
            x_offset, size, panel_offset, ahead, ahead_step = args[1], args[2], args[4], args[6], args[7]
            totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(rows)]
            for total in totals:
                builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
            firsts = [builder.add(x_offset, builder.mul(size, _constant(m))) for m in range(rows)]
            with cgutils.for_range(builder, size) as loop:
                at = builder.add(panel_offset, builder.mul(loop.index, _constant(LANES)))
                weight = _vector_load(builder, signature.args[3], panel_data, at)
                _prefetch(builder, panel_data, builder.add(ahead, builder.mul(loop.index, ahead_step)))
                for total, first in zip(totals, firsts, strict=True):
                    value = _broadcast(builder, x_data, builder.add(first, loop.index))
                    builder.store(_fma(builder, value, weight, builder.load(total)), total)
            for m, total in enumerate(totals):
                target = builder.gep(sum_data, [_constant(m * LANES)])
                builder.store(builder.load(total), builder.bitcast(target, _VECTOR.as_pointer()), align=4)
            return context.get_dummy_value()

        i = types.int64
        return types.void(x, i, i, panel, i, sums, i, i), codegen

    return panel_tile


def _make_reduction(name: str, start: float) -> Callable[..., float]:
    @intrinsic
    def reduction(typing_context: Any, values: Any, begin: Any, end: Any) -> Any:
        """Reduce float32 values[begin:end], a multiple of 16: each lane in order, then over the lanes in order."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            data = _data(context, builder, signature.args[0], args[0])
            total = cgutils.alloca_once(builder, _VECTOR)
            builder.store(ir.Constant(_VECTOR, [start] * LANES), total)
            vectors = builder.lshr(builder.sub(args[2], args[1]), _constant(4))
            pair = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR])
            with cgutils.for_range(builder, vectors) as loop:
                at = builder.add(args[1], builder.shl(loop.index, _constant(4)))
                value = _vector_load(builder, signature.args[0], data, at)
                if name == "fadd":
                    result = builder.fadd(builder.load(total), value)
                else:
                    function = cgutils.get_or_insert_function(builder.module, pair, f"llvm.maxnum.v{LANES}f32")
                    result = builder.call(function, [builder.load(total), value])
                builder.store(result, total)
            return _across(builder, name, builder.load(total))

        return types.float32(values, types.int64, types.int64), codegen

    return reduction


def _vector(value: float) -> Any:
    return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)


def _exp(builder: Any, x: Any) -> Any:
    """`exp` of a vector: its operations in its order, so the same bits."""
    words = ir.VectorType(ir.IntType(32), LANES)

    def integers(value: int) -> Any:
        return ir.Constant(words, [value] * LANES)

    tiny = builder.fcmp_ordered("<", x, _vector(-87.0))
    x = builder.select(tiny, _vector(-87.0), x)
    shifted = builder.fadd(builder.fmul(x, _vector(1.4426950408889634)), _vector(128.5))
    power = builder.sub(builder.fptosi(shifted, words), integers(128))
    n = builder.sitofp(power, _VECTOR)
    rest = builder.fsub(x, builder.fmul(n, _vector(LN2_HIGH)))
    rest = builder.fsub(rest, builder.fmul(n, _vector(LN2_LOW)))
    p = _vector(EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = builder.fadd(builder.fmul(p, rest), _vector(coefficient))
    p = builder.fmul(builder.fmul(p, rest), rest)
    p = builder.fadd(builder.fadd(p, rest), _vector(1.0))
    two_to_n = builder.bitcast(builder.shl(builder.add(power, integers(127)), integers(23)), _VECTOR)
    return builder.select(tiny, _vector(0.0), builder.fmul(p, two_to_n))


def _vector_store(builder: Any, array_type: Any, data: Any, offset: Any, value: Any) -> None:
    """16 floats to consecutive elements from `offset`; bfloat16 bits are rounded to nearest even, as by `store_as`."""
    pointer = builder.gep(data, [offset])
    if array_type.dtype == types.float32:
        builder.store(value, builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
        return
    words, halves = ir.VectorType(ir.IntType(32), LANES), ir.VectorType(ir.IntType(16), LANES)
    narrow = _bfloat16_bits(builder, value, words, halves)
    builder.store(narrow, builder.bitcast(pointer, halves.as_pointer()), align=2)


@intrinsic
def exp_below(typing_context: Any, values: Any, begin: Any, end: Any, highest: Any) -> Any:
    """values[i] = e^(values[i] - highest), begin ≤ i < end, a multiple of 16 float32 elements."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _data(context, builder, signature.args[0], args[0])
        highest = _splat(builder, args[3])
        with cgutils.for_range(builder, builder.lshr(builder.sub(args[2], args[1]), _constant(4))) as loop:
            at = builder.add(args[1], builder.shl(loop.index, _constant(4)))
            value = builder.fsub(_vector_load(builder, signature.args[0], data, at), highest)
            _vector_store(builder, signature.args[0], data, at, _exp(builder, value))
        return context.get_dummy_value()

    i = types.int64
    return types.void(values, i, i, types.float32), codegen


@intrinsic
def silu_mul_row(
    typing_context: Any, gate_up: Any, offset: Any, width: Any, count: Any, out: Any, out_offset: Any
) -> Any:
    """out[out_offset + i] = g / (1 + e^-g) · gate_up[offset + width + i], g = gate_up[offset + i], i < count, a multiple of 16.

    gate_up, out: flat float32 or bfloat16 bits.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = _data(context, builder, signature.args[0], args[0])
        target = _data(context, builder, signature.args[4], args[4])
        with cgutils.for_range(builder, builder.lshr(args[3], _constant(4))) as loop:
            step = builder.shl(loop.index, _constant(4))
            at = builder.add(args[1], step)
            gate = _vector_load(builder, signature.args[0], source, at)
            up = _vector_load(builder, signature.args[0], source, builder.add(at, args[2]))
            in_range = builder.fcmp_ordered(">", gate, _vector(-88.0))
            opposite = builder.select(in_range, builder.fsub(_vector(-0.0), gate), _vector(88.0))
            sigmoid_of = builder.fadd(_vector(1.0), _exp(builder, opposite))
            result = builder.fmul(builder.fdiv(gate, sigmoid_of), up)
            _vector_store(builder, signature.args[4], target, builder.add(args[5], step), result)
        return context.get_dummy_value()

    i = types.int64
    return types.void(gate_up, i, i, i, out, i), codegen


highest_of = _make_reduction("fmax", float("-inf"))
sum_of = _make_reduction("fadd", 0.0)
WIDE = 64 if MANY_REGISTERS else LANES
"""Columns of the wide value tile."""
wide_value_tile = _make_value_tile(WIDE // LANES)
value_tile = _make_value_tile(1)
panel_tile_1, panel_tile_2, panel_tile_3, panel_tile_4, panel_tile_5, panel_tile_6 = map(_make_panel_tile, range(1, 7))


@inner
def exp(x):
    """e^x in float32 for x ≤ 88, exactly 0 below -87; relative error < 2e-7."""
    tiny = x < np.float32(-87.0)
    x = np.float32(-87.0) if tiny else x
    power = np.int32(x * np.float32(1.4426950408889634) + np.float32(128.5)) - np.int32(128)  # floor(x / ln 2 + ½)
    n = np.float32(power)
    r = x - n * np.float32(LN2_HIGH)
    r = r - n * np.float32(LN2_LOW)
    p = np.float32(EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = p * r + np.float32(coefficient)
    p = p * r * r + r + np.float32(1.0)
    two_to_n = bits_to_float(np.uint32(power + np.int32(127)) << np.uint32(23))
    return np.float32(0.0) if tiny else p * two_to_n
