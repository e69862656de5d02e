"""RMSNorm equals its reference, keeps the residual stream in fp32, and no row sees another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_inputs import norm_inputs
from torch import Tensor

from dspark.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 16), (1, 576), (3, 64), (5, 80), (7, 1536), (2, 4096)]


def assert_within_one_rounding(out: Tensor, wanted: Tensor) -> None:
    """`wanted` was computed in fp32."""
    half_ulp = 2.0**-8 if out.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out.float(), wanted, rtol=half_ulp + 2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_rms_norm_equals_the_reference(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, _, weight = norm_inputs(rows, hidden, dtype)
    out = rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    assert_within_one_rounding(out, rms_norm_reference(x.float(), weight.float(), EPS))


@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_an_fp32_stream_is_normed_into_the_weights_dtype(rows: int, hidden: int) -> None:
    _, residual, weight = norm_inputs(rows, hidden, torch.bfloat16)
    out = rms_norm(residual, weight, EPS)
    assert out.dtype == torch.bfloat16
    assert_within_one_rounding(out, rms_norm_reference(residual, weight.float(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_add_rms_norm_adds_in_place_and_norms_the_sum(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual, weight = norm_inputs(rows, hidden, dtype)
    expected_sum = residual + x.float()
    wanted = add_rms_norm_reference(x.float(), residual.clone(), weight.float(), EPS)
    out = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected_sum)
    assert out.dtype == dtype
    assert_within_one_rounding(out, wanted)


def test_eps_keeps_a_zero_row_zero_and_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 64), torch.ones(64), EPS), torch.zeros(2, 64))


def test_no_rows_give_no_rows() -> None:
    x, residual, weight = norm_inputs(1, 64, torch.float32)
    assert rms_norm(x[:0], weight, EPS).shape == (0, 64)
    assert add_rms_norm(x[:0], residual[:0], weight, EPS).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
def test_a_row_alone_has_the_bits_of_the_row_in_the_batch(rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual, weight = norm_inputs(rows, hidden, dtype)
    sums = residual.clone()
    plain, added = rms_norm(x, weight, EPS), add_rms_norm(x, sums, weight, EPS)
    for row in range(rows):
        own_sum = residual[row : row + 1].clone()
        assert torch.equal(rms_norm(x[row : row + 1], weight, EPS)[0], plain[row])
        assert torch.equal(add_rms_norm(x[row : row + 1], own_sum, weight, EPS)[0], added[row])
        assert torch.equal(own_sum[0], sums[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    x, residual, weight = norm_inputs(7, 1536, dtype)
    results = []
    for threads in (1, 2):
        set_threads(threads)
        sums = residual.clone()
        results.append((rms_norm(x, weight, EPS), add_rms_norm(x, sums, weight, EPS), sums))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
