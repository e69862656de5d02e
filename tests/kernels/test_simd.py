"""The vector building blocks are exact where exactness is promised, and sum in the promised order."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark.kernels import simd
from dspark.kernels.simd import LANES, TILE


@numba.njit(error_model="numpy")
def exp_of_all(x, out):
    for i in range(x.size):
        out[i] = simd.exp(x[i])


@numba.njit
def exp_between(values, begin, end, highest):
    simd.exp_below(values, begin, end, highest)


@numba.njit
def widen(elements, out):
    for i in range(elements.size):
        out[i] = simd.to_float(elements[i])


@numba.njit
def narrow(values, out):
    for i in range(values.size):
        simd.store_as(out, i, values[i])


@numba.njit
def sum_between(values, begin, end):
    return simd.sum_of(values, begin, end)


@numba.njit
def highest_between(values, begin, end):
    return simd.highest_of(values, begin, end)


@numba.njit
def dot_at(a, a_offset, b, b_offset, size):
    return simd.dot(a, a_offset, b, b_offset, size)


@numba.njit
def score(queries, keys, key_offset, scores, score_offset, stride, dim):
    simd.score_tile(queries, keys, key_offset, scores, score_offset, stride, dim)


@numba.njit
def add_wide_values(weights, weight_offset, stride, values, value_offset, sums, sum_offset, dim):
    simd.wide_value_tile(weights, weight_offset, stride, values, value_offset, sums, sum_offset, dim)


@numba.njit
def add_narrow_values(weights, weight_offset, stride, values, value_offset, sums, sum_offset, dim):
    simd.value_tile(weights, weight_offset, stride, values, value_offset, sums, sum_offset, dim)


def exponentials(x: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.empty_like(x)
    exp_of_all(x, out)
    return out


def bf16_bits(values: Any) -> NDArray[np.uint16]:
    return torch.as_tensor(values, dtype=torch.float32).bfloat16().view(torch.uint16).numpy()


def small_integers(*shape: int) -> NDArray[np.float32]:
    """Sums of their products are exact in float32 in any order."""
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float32)


def test_exp_has_a_relative_error_below_2e_7_up_to_88() -> None:
    x = np.concatenate([np.linspace(-87, 88, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(exponentials(x) / exact - 1).max() < 2e-7


def test_exp_is_exactly_one_at_zero_and_exactly_zero_below_minus_87() -> None:
    assert exponentials(np.array([0.0, -0.0, -87.001, -1e30, -np.inf], np.float32)).tolist() == [1, 1, 0, 0, 0]


def test_exp_of_vectors_has_the_same_bits_and_leaves_the_rest_alone() -> None:
    x = np.linspace(-100, 87, 16 * 5000).astype(np.float32)
    x[:4] = [-np.inf, 0.0, -87.0, np.nextafter(np.float32(-87.0), np.float32(-88.0))]
    values = x.copy()
    exp_between(values, 0, x.size, np.float32(0.0))
    np.testing.assert_array_equal(values, exponentials(x))
    values = x.copy()
    exp_between(values, 32, 64, np.float32(3.5))
    np.testing.assert_array_equal(values[32:64], exponentials(x[32:64] - np.float32(3.5)))
    np.testing.assert_array_equal(np.delete(values, np.s_[32:64]), np.delete(x, np.s_[32:64]))


def test_bfloat16_bits_are_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    out = np.empty(every.size, np.float32)
    widen(every, out)
    wanted = torch.from_numpy(every).view(torch.bfloat16).float().numpy()
    assert np.array_equal(out, wanted, equal_nan=True)


def test_storing_as_bfloat16_rounds_to_the_nearest_even_like_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    halfway = (np.arange(1 << 16, dtype=np.uint32) << 16) | 0x8000
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45], np.float32)
    values = np.concatenate([bits.view(np.float32), halfway.view(np.float32), special])
    out = np.empty(values.size, np.uint16)
    narrow(values, out)
    stored = torch.from_numpy(out).view(torch.bfloat16)
    wanted = torch.from_numpy(values).bfloat16()
    assert torch.equal(stored.isnan(), wanted.isnan())
    assert torch.equal(stored.nan_to_num(0.0), wanted.nan_to_num(0.0))


def test_storing_as_float32_keeps_every_bit() -> None:
    values = np.array([1.0, -0.0, 1e-45, 3.4e38, np.inf], np.float32)
    out = np.empty_like(values)
    narrow(values, out)
    assert out.tobytes() == values.tobytes()


@pytest.mark.parametrize("vectors", [1, 2, 5])
def test_sum_adds_lane_by_lane_and_then_across_the_lanes_in_order(vectors: int) -> None:
    values = np.random.default_rng(vectors).standard_normal((vectors + 2) * LANES).astype(np.float32)
    lanes = np.zeros(LANES, np.float32)
    for vector in range(1, 1 + vectors):
        lanes += values[vector * LANES : (vector + 1) * LANES]
    wanted = np.float32(0.0)
    for lane in lanes:
        wanted += lane
    assert sum_between(values, LANES, (1 + vectors) * LANES) == wanted


def test_sum_and_highest_of_nothing_are_zero_and_minus_infinity() -> None:
    values = np.ones(LANES, np.float32)
    assert sum_between(values, 0, 0) == 0.0
    assert highest_between(values, 0, 0) == -np.inf


@pytest.mark.parametrize("at", range(2 * LANES))
def test_highest_finds_the_largest_in_any_lane_and_looks_no_further(at: int) -> None:
    values = np.full(4 * LANES, 9.0, np.float32)
    values[LANES : 3 * LANES] = -np.inf
    values[LANES + at] = -2.5
    assert highest_between(values, LANES, 3 * LANES) == -2.5


@pytest.mark.parametrize("size", [16, 80, 576])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_dot_multiplies_the_two_stretches_named_by_the_offsets(size: int, kind: str) -> None:
    a, b = small_integers(size + 7), small_integers(size + 3)
    wanted = float(a[7:] @ b[3:])
    if kind == "float32":
        assert dot_at(a, 7, b, 3, size) == wanted
    else:
        assert dot_at(bf16_bits(a), 7, bf16_bits(b), 3, size) == wanted


@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_score_tile_writes_four_rows_of_sixteen_products_and_nothing_else(dim: int, kind: str) -> None:
    queries, keys = small_integers(dim, TILE), small_integers(3 + dim * LANES)
    stride, offset = 48, 16
    scores = np.full((TILE, stride), 99.0, np.float32)
    stored = keys if kind == "float32" else bf16_bits(keys)
    score(queries.ravel(), stored, 3, scores.ravel(), offset, stride, dim)
    assert np.array_equal(scores[:, offset : offset + LANES], queries.T @ keys[3:].reshape(dim, LANES))
    assert (scores[:, :offset] == 99.0).all()
    assert (scores[:, offset + LANES :] == 99.0).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("add", "width"), [(add_narrow_values, 16), (add_wide_values, simd.WIDE)])
def test_value_tile_adds_weighted_values_to_its_columns_only(add: Any, width: int, kind: str) -> None:
    dim, stride = 80, 32
    weights, values, sums = small_integers(TILE, stride), small_integers(LANES, dim), small_integers(TILE, dim)
    wanted = sums.copy()
    wanted[:, 16 : 16 + width] += weights[:, 8 : 8 + LANES] @ values[:, 16 : 16 + width]
    stored = values if kind == "float32" else bf16_bits(values).reshape(LANES, dim)
    add(weights.ravel(), 8, stride, stored.ravel(), 16, sums.ravel(), 16, dim)
    assert np.array_equal(sums, wanted)
