"""The gated activation equals its reference also where e^x leaves the range of fp32, and no row sees another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dspark.kernels.silu_mul import silu_mul, silu_mul_reference

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 1536), (3, 7), (5, 80), (9, 33)]


def gate_up(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    return (6 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x = gate_up(rows, width, dtype)
    out = silu_mul(x)
    assert out.shape == (rows, width)
    assert out.dtype == dtype
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out.float(), silu_mul_reference(x.float()), rtol=half_ulp + 1e-6, atol=1e-30)


def test_is_finite_and_right_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[0.0, 200.0, -200.0, 3e38, -1e5, -87.5, -88.5, 87.5]])
    x = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x), atol=1e-30, rtol=1e-6)


def test_no_rows_give_no_rows() -> None:
    assert silu_mul(torch.empty(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_row_alone_has_the_bits_of_the_row_in_the_batch(rows: int, width: int, dtype: torch.dtype) -> None:
    x = gate_up(rows, width, dtype)
    assert torch.equal(torch.cat([silu_mul(row) for row in x.split(1)]), silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    x = gate_up(9, 33, dtype)
    set_threads(1)
    one = silu_mul(x)
    set_threads(2)
    assert torch.equal(silu_mul(x), one)
